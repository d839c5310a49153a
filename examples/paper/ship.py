r"""
Put trained models into the package
===================================

.. code-block:: bash

    python examples/paper/ship.py            # after the cells below were run with run.py

Writes ``deepinv_deq/weights/models/ct-ei.pt`` and ``mri-ei.pt``, which ``DEQReconstructor.from_pretrained("ct-ei")`` loads, from the
models that ``run.py`` left in ``runs/``: the DEQs trained with exact gradients and without ground truth, of seed 0.
"""

import argparse
import sys
from pathlib import Path

import experiments as ex
import run
import torch

from deepinv_deq import Solver

MODELS = ex.HERE.parents[1] / "deepinv_deq" / "weights" / "models"


def ship(task_name: str, scale: str, seed: int, data: Path, out: Path) -> Path:
    r"""Write the model of one task, with what it was trained on.

    :raises SystemExit: if its cell was not run.
    """
    record_path = run.path_of(scale, task_name, "deq-id", ex.BEST[task_name], seed)
    record = run.read_record(record_path)
    weights = run.folder_of(record_path) / "model.pt"
    if record is None or not weights.exists():
        sys.exit(f"error: no {record_path} or no {weights}: run that cell first (python examples/paper/run.py).")
    task = ex.make_task(task_name, scale, data)
    model = ex.make_model(task, "deq-id", record["config"], {"unet": run.weights_of(scale, task_name, "unet", data)})
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    settings = record["config"]
    model.solver = Solver("anderson", max_iter=100, tol=settings["forward_tol"])  # who uses it wants to be warned
    model.hook.solver = Solver("gmres", max_iter=settings["max_iter"], tol=settings["backward_tol"])
    about = {key: settings[key] for key in ("task", "loss", "scale", "size", "seed", "epochs")}
    about |= {key: settings[key] for key in ("views", "acceleration") if key in settings}
    path = out / f"{task_name}-ei.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, psnr=record["psnr"]["mean"], psnr_start=record["psnr_start"]["mean"], **about)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put trained models into the package.")
    parser.add_argument("--scale", default="small", help=", ".join(ex.SCALES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=run.ROOT.parent / "shared" / "data", help="folder with the images")
    args = parser.parse_args()
    for name in ex.TASKS:
        print(ship(name, args.scale, args.seed, args.data, MODELS))
