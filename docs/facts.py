"""The facts of the landing page, from the committed records of ``tests/benchmarks``."""

import json
from pathlib import Path

from tests.benchmarks.names import AN_IMAGE_AT_A_TIME, OURS
from tests.benchmarks.ratios import Kind, best_peer, goal

RECORDS = Path(__file__).parents[1] / "tests" / "benchmarks" / "records"


def render() -> str:
    """A bullet list in reStructuredText."""
    parts, gpu = (json.loads((RECORDS / f"cost-{device}.json").read_text())["parts"] for device in ("cpu", "cuda"))
    less, less_gpu, single = _memory(parts), _memory(gpu), _memory(gpu, AN_IMAGE_AT_A_TIME)
    steps = [best_peer(gpu[f"equal iterations, {task}"]["rows"])[0] for task in ("ct", "mri")]
    errors = json.loads((RECORDS / "exactness.json").read_text())["rows"]
    double = max(max(errors[name].values()) for name in errors if "float64" in name and not name.startswith("second"))
    return "\n".join(
        [
            f"- **Exact gradients.** The largest relative error in float64 is {double:.0e}, against dense Jacobians and unrolled solves of small problems.",
            f"- **Little memory.** deepinv's own DEQ takes {less[0]:.0f} times (CT) and {less[1]:.0f} times (MRI) as much memory for a training step"
            f" (a batch of four images, 32-64-128 feature maps, records of {parts['memory']['date']}). We differentiate one image at a time.",
            "- **Fast at equal accuracy.** " + " ".join(_speed(parts, task) for task in ("ct", "mri")),
            f"- **On a GPU** the advantages are smaller (NVIDIA H200, records of {gpu['memory']['date']}). deepinv's DEQ takes {less_gpu[0]:.1f} (CT) and"
            f" {less_gpu[1]:.1f} times (MRI) our memory, and {single[0]:.1f} and {single[1]:.1f} times with ``Solver(chunk_size=1)``. For one image, Python overhead dominates: a training step of five iterations of the fastest other"
            f" implementation takes {steps[0]:.2f} (CT) and {steps[1]:.2f} (MRI) of the time of ours.",
        ]
    )


def _memory(parts: dict, ours: str = OURS) -> list[float]:
    """Memory of deepinv's own DEQ over ours."""
    rows = {(row["task"], row["method"]): row["MB"] for row in parts["memory"]["rows"]}
    return [rows[task, "deepinv DEQ"] / rows[task, ours] for task in ("ct", "mri")]


def _speed(parts: dict, task: str) -> str:
    """What a training step costs with the others, at the error of the gradient that was asked for."""
    part, name = parts[f"equal error, {task}"], {"ct": "ct-ei", "mri": "mri-ei"}[task]
    ratio, kind = best_peer(part["rows"])
    aim = f"a gradient within {100 * goal(part['rows']):.0f} % (record of {part['date']})"
    if kind is Kind.INEXACT:
        return f"With ``{name}``, no other implementation had {aim}."
    if kind is Kind.EXACT:
        return f"With ``{name}`` and {aim}, a training step of the fastest other implementation takes {ratio:.2f} times as long."
    return f"With ``{name}``, every other implementation was stopped before it had {aim}, after at least {ratio:.1f} times the time of our step."
