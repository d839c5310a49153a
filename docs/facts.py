"""The three facts of the landing page, from the committed records of ``tests/benchmarks``."""

import json
from pathlib import Path

RECORDS = Path(__file__).parents[1] / "tests" / "benchmarks" / "records"


def render() -> str:
    """A bullet list in reStructuredText."""
    parts = json.loads((RECORDS / "cost-cpu.json").read_text())["parts"]
    rows = {(row["task"], row["method"]): row["MB"] for row in parts["memory"]["rows"]}
    less = [rows[task, "deepinv DEQ"] / rows[task, "deepinv-deq"] for task in ("ct", "mri")]
    speed = [
        min(
            row["ratio"] for row in parts[f"equal error, {task}"]["rows"] if not row["method"].startswith("deepinv-deq")
        )
        for task in ("ct", "mri")
    ]
    old, new = parts["memory"]["date"], parts["equal error, mri"]["date"]
    if parts["equal error, ct"]["date"] != old:
        raise ValueError("CT was measured again: say in the sentences below which model each number is of.")
    errors = json.loads((RECORDS / "exactness.json").read_text())["rows"]
    double = max(max(errors[name].values()) for name in errors if "float64" in name and not name.startswith("second"))
    return "\n".join(
        [
            f"- **Exact gradients.** The largest relative error in float64 is {double:.0e}, against dense Jacobians and unrolled solves.",
            f"- **Little memory.** deepinv's own DEQ takes {less[0]:.0f} times (CT) and {less[1]:.0f} times (MRI) as much memory for a training step"
            f" (records of {old}, 32-64-128 feature maps).",
            f"- **Fast at equal accuracy.** For a training step with a gradient within 1 %, the fastest of the other implementations needs"
            f" {speed[0]:.1f} times (CT, record of {old}, 32-64-128 feature maps) and {speed[1]:.2f} times (MRI, record of {new}, ``mri-ei``) as long.",
        ]
    )
