"""The three facts of the landing page, from the committed records of ``tests/benchmarks``."""

import json
from pathlib import Path

from tests.benchmarks.ratios import best_peer, goal

RECORDS = Path(__file__).parents[1] / "tests" / "benchmarks" / "records"


def render() -> str:
    """A bullet list in reStructuredText."""
    parts = json.loads((RECORDS / "cost-cpu.json").read_text())["parts"]
    rows = {(row["task"], row["method"]): row["MB"] for row in parts["memory"]["rows"]}
    less = [rows[task, "deepinv DEQ"] / rows[task, "deepinv-deq"] for task in ("ct", "mri")]
    errors = json.loads((RECORDS / "exactness.json").read_text())["rows"]
    double = max(max(errors[name].values()) for name in errors if "float64" in name and not name.startswith("second"))
    return "\n".join(
        [
            f"- **Exact gradients.** The largest relative error in float64 is {double:.0e}, against dense Jacobians and unrolled solves of small problems.",
            f"- **Little memory.** deepinv's own DEQ takes {less[0]:.0f} times (CT) and {less[1]:.0f} times (MRI) as much memory for a training step"
            f" (a batch of four images, 32-64-128 feature maps, records of {parts['memory']['date']}). We differentiate one image at a time.",
            "- **Fast at equal accuracy.** " + " ".join(_speed(parts, task) for task in ("ct", "mri")),
        ]
    )


def _speed(parts: dict, task: str) -> str:
    """What a training step costs with the others, at the error of the gradient that was asked for."""
    part, name = parts[f"equal error, {task}"], {"ct": "ct-ei", "mri": "mri-ei"}[task]
    ratio, reached = best_peer(part["rows"])
    aim = f"a gradient within {100 * goal(part['rows']):.0f} % (record of {part['date']})"
    if reached:
        return f"With ``{name}`` and {aim}, a training step of the fastest other implementation takes {ratio:.2f} times as long."
    return f"With ``{name}``, every other implementation was stopped before it had {aim}, after at least {ratio:.1f} times the time of our step."
