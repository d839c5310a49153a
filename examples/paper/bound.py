r"""
PSNR at the fixed point against the bound of the penalty
========================================================

.. code-block:: bash

    python examples/paper/bound.py --task ct --bounds 0.7 0.8 0.85 0.9 0.95
    python examples/paper/bound.py --task ct --bounds 0.85 --saturation 0     # a network without saturation

Trains a supervised DEQ for each bound of :class:`deepinv_deq.losses.ContractionLoss`, and measures it on validation images. Each
training writes one file to ``examples/paper/bound``, which ``tables.py`` and ``figures.py`` read.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from data import DATA, HERE, SCALES, TASKS
from records import write
from settings import check_name
from training import run_cell

BOUNDS = HERE / "bound"


def measure(
    task: str,
    bound: float,
    scale: str,
    data: Path,
    epochs: int | None = None,
    seed: int = 0,
    saturation: float | None = None,
) -> dict[str, Any]:
    r"""Train with one bound, and write the results.

    :param int epochs: epochs of the training, default those of the scale.
    :param float saturation: of the network in the place of the task's; 0 for none.
    :return: what was written: mean PSNR in dB from every start and at a tenth of the tolerance, the largest spread over images in dB,
        the largest spectral radius, and the mean number of evaluations.
    """
    override = {"bound": bound} | ({"epochs": epochs} if epochs else {})
    override |= {} if saturation is None else {"saturation": saturation or None}
    with tempfile.TemporaryDirectory() as folder:
        record, _ = run_cell(
            task,
            "deq-id",
            "sup",
            scale,
            seed,
            data=data,
            override=override,
            validate=True,
            out=Path(folder),
            progress=False,
        )
    point = record["fixed_point"]
    found = {
        "task": task,
        "scale": scale,
        "seed": seed,
        "bound": bound,
        "saturation": record["config"]["saturation"],
        "steps": record["steps"],
        "seconds": record["seconds"],
        "tol": point["tol"],
        "psnr": {name: values["mean"] for name, values in point["psnr"].items()},
        "spread_db": max(point["spread_db"]["all"]),
        "spectral_radius": max(point["spectral_radius"]["all"]),
        "evaluations": statistics.mean(point["evaluations"]),
        "converged": point["converged"],
        "images": record["images"],
        "commit": record["commit"],
    }
    name = f"{task}_{scale}_{bound:g}_{found['saturation'] or 0:g}_{record['steps']}_{seed}.json"
    write(BOUNDS / name, json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="PSNR against the bound of the contraction penalty.")
    parser.add_argument("--task", required=True, help=", ".join(TASKS))
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--saturation", type=float, help="default: that of the task; 0 for none")
    parser.add_argument("--scale", default="small", help=", ".join(SCALES))
    parser.add_argument("--epochs", type=int, help="default: those of the scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images")
    args = parser.parse_args()
    check_name("task", args.task, TASKS)
    check_name("scale", args.scale, SCALES)
    if outside := [b for b in args.bounds if not 0 < b < 1]:
        sys.exit(f"error: --bounds must be in (0, 1), got {', '.join(map(str, outside))}.")
    for bound in args.bounds:
        found = measure(args.task, bound, args.scale, args.data, args.epochs, args.seed, args.saturation)
        print(
            f"{args.task} bound {bound:g}, saturation {found['saturation']}: {found['psnr']['tenth']:.2f} dB, spread {found['spread_db']:.3f} dB, "
            f"spectral radius {found['spectral_radius']:.3f}, {found['evaluations']:.0f} evaluations, {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
