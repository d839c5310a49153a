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
    goals = [parts[f"equal error, {task}"]["rows"][0].get("goal", 0.01) for task in ("ct", "mri")]
    dates = [parts[f"equal error, {task}"]["date"] for task in ("ct", "mri")]
    errors = json.loads((RECORDS / "exactness.json").read_text())["rows"]
    double = max(max(errors[name].values()) for name in errors if "float64" in name and not name.startswith("second"))
    return "\n".join(
        [
            f"- **Exact gradients.** The largest relative error in float64 is {double:.0e}, against dense Jacobians and unrolled solves.",
            f"- **Little memory.** deepinv's own DEQ takes {less[0]:.0f} times (CT) and {less[1]:.0f} times (MRI) as much memory for a training step"
            f" (records of {parts['memory']['date']}, 32-64-128 feature maps).",
            "- **Fast at equal accuracy.** For a training step, the fastest of the other implementations needs"
            f" {speed[0]:.1f} times as long with ``ct-ei`` (gradient within {100 * goals[0]:.0f} %, record of {dates[0]}),"
            f" and {speed[1]:.2f} times with ``mri-ei`` (within {100 * goals[1]:.0f} %, record of {dates[1]}).",
        ]
    )
