r"""
Put trained models into the package
===================================

.. code-block:: bash

    python examples/paper/ship.py --scale paper                      # ct-ei and mri-ei, after their cells were run with run.py
    python examples/paper/ship.py --tasks ct                         # ct-ei-small
    python examples/paper/ship.py --tasks ct --scale paper --bound 0.7   # the one of run.py --bound

Writes ``deepinv_deq/weights/models/ct-ei.pt`` and the others, which ``DEQReconstructor.from_pretrained("ct-ei")`` loads, from the
models that ``run.py`` left in ``runs/``: the DEQs trained with exact gradients and without ground truth, of seed 0.
"""

import argparse
import sys
from pathlib import Path

import torch
from data import DATA, ROOT, SCALES, TASKS, make_task
from evaluation import TEST_ITERATIONS
from losses import BEST
from models import make_model
from records import folder_of, is_outdated, path_of, read_record, variant_of
from weights import weights_of

from deepinv_deq import Solver

PLAIN = "paper"  # the scale whose models are ct-ei and mri-ei; others have the scale in their name
MODELS = ROOT / "deepinv_deq" / "weights" / "models"


def ship(
    task_name: str,
    scale: str,
    seed: int,
    data: Path,
    out: Path,
    bound: float | None = None,
    tol: float | None = None,
) -> Path:
    r"""Write the model of one task, with what it was trained on.

    :param float bound: of a training with ``run.py --bound``.
    :param float tol: tolerance of the model in the place of that of its record.
    :raises SystemExit: if its cell was not run.
    """
    record_path = path_of(scale, task_name, "deq-id", BEST[task_name], seed, variant_of(bound=bound))
    record = read_record(record_path)
    weights = folder_of(record_path) / "model.pt"
    if record is None or is_outdated(record) or not weights.exists():
        sys.exit(f"error: no {record_path} or no {weights}: run that cell first (python examples/paper/run.py).")
    task = make_task(task_name, scale, data)
    model = make_model(task, "deq-id", record["config"], weights_of(task_name, "unet", data))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    settings = record["config"]
    # the tolerance on record; unlike in training, a missed one warns
    model.solver = Solver("anderson", max_iter=TEST_ITERATIONS, tol=tol or settings["test_tol"])
    model.hook.solver = Solver("gmres", max_iter=settings["max_iter"], tol=settings["backward_tol"])
    kept = ("task", "loss", "scale", "size", "seed", "epochs", "bound", "contraction_weight", "views", "acceleration")
    about = {key: settings[key] for key in kept if key in settings}
    path = out / (f"{task_name}-ei.pt" if scale == PLAIN else f"{task_name}-ei-{scale}.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, psnr=record["psnr"]["mean"], psnr_start=record["psnr_start"]["mean"], **about)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put trained models into the package.")
    parser.add_argument("--scale", default="small", help=", ".join(SCALES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="whose models are written")
    parser.add_argument("--bound", type=float, help="bound of the penalty, where run.py was given one")
    parser.add_argument("--tol", type=float, help="tolerance of the model, default that of its record")
    args = parser.parse_args()
    for name in args.tasks:
        print(ship(name, args.scale, args.seed, args.data, MODELS, args.bound, args.tol))
