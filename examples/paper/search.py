r"""
Choose hyperparameters on validation images
===========================================

.. code-block:: bash

    python examples/paper/search.py --task ct --method deq-id --loss ei
    python examples/paper/search.py --all --jobs 2

Trains on the first 80 of the 90 training images and measures PSNR on the other 10; the test images are never seen. From the
defaults, one hyperparameter after another takes the best of a few values (coordinate descent). A value for which a solve of a DEQ
misses its tolerance wins only if solves miss it for every value. Every trial goes to
``examples/paper/search``, what won to ``examples/paper/settings.json``, where ``run.py`` finds it. Of the unrolled networks, that
with 3 layers decides for all. Where trainings differ much by their seed, as those of EI on noisy MRI do, whole ones of several seeds decide:

.. code-block:: bash

    python examples/paper/search.py --task mri --method deq-id --loss ei --share 1 --seeds 2

At another scale, a shorter search begins at the settings that the cell has there already, say those of scale ``small``:

.. code-block:: bash

    python examples/paper/search.py --task ct --method modl --loss sup --scale paper --nearby --share 0.25
"""

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import settings
from commands import arguments, parsed, run_each
from data import HERE
from losses import LOSSES
from models import METHODS
from records import SPREAD_DB, matrix, write
from settings import default_settings, found_settings, settings_of
from training import run_cell

TRIALS = HERE / "search"
REPRESENTATIVE = {"unrolled": "unrolled-3"}  # who is searched for all of a family


def grid(task: str, method: str, loss: str, s: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    r"""What is tried, around the defaults ``s``: for every learned method the learning rate, a hyperparameter of its own, the weight
    of the second term of the loss, and whether all gradients have the same norm."""
    kind = METHODS[method]
    if kind.epochs is None:
        weights = [1.0, 5.0, 20.0, 50.0, 100.0] if task == "ct" else [0.3, 0.6, 1.0]
        return [("data_weight", weights), ("iterations", [3, 10, 30, 100, 300])]
    steps: list[tuple[str, list[Any]]] = [("lr", [3e-4, 1e-3, 3e-3])]
    if kind.tried is not None:
        name, values = kind.tried
        steps += [(name, [s[name] * v for v in values] if name == "data_weight" else list(values))]
    if LOSSES[loss].weighted:
        steps += [("alpha", [s["alpha"] * factor for factor in LOSSES[loss].weighted])]
    return [*steps, ("grad_clip", [s["grad_clip"], 1e-6])]


def grid_nearby(method: str, loss: str, s: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    r"""What is tried around settings ``s`` of an earlier search: a third and three times the learning rate, half and twice the
    other hyperparameters of :func:`grid`, and gradients of equal norm."""
    own = METHODS[method].tried
    names = [*([own[0]] if own else []), *(["alpha"] if LOSSES[loss].weighted else [])]
    steps = [(name, [s[name] / 2, s[name], 2 * s[name]]) for name in names]
    return [("lr", [s["lr"] / 3, s["lr"], 3 * s["lr"]]), *steps, ("grad_clip", [s["grad_clip"], 1e-6])]


def complete(task: str, method: str, trial: dict[str, Any]) -> dict[str, Any]:
    r"""A stepsize that goes with the data weight of DE-Grad and RED."""
    gradient_steps = task == "ct" and (METHODS[method].is_deq or METHODS[method].epochs is None)
    if gradient_steps and "data_weight" in trial and "stepsize" not in trial:
        return trial | {"stepsize": 1 / (1 + trial["data_weight"])}
    return trial


def worth(trial: dict[str, Any]) -> tuple[bool, float]:
    r"""What a trial is judged by: PSNR, but first of all whether every solve reached a fixed point, and from all starts the same.
    A training that diverged has no PSNR, and is the worst."""
    psnr = trial["psnr"]
    return not trial.get("missed") and trial.get("spread_db", 0.0) <= SPREAD_DB, -math.inf if psnr is None else psnr


def search(
    task: str,
    method: str,
    loss: str,
    scale: str,
    data: Path,
    share: float,
    seeds: int = 1,
    nearby: bool = False,
    device: str = "cpu",
) -> None:
    family = METHODS[method].family
    representative = REPRESENTATIVE.get(family, method)
    path = TRIALS / scale / f"{task}_{family}_{loss}.json"
    trials: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    default = default_settings(task, representative, loss, scale)
    first: dict[str, Any] = {}  # what the trials start from, where it differs from the defaults
    if nearby:
        there = settings_of(task, representative, loss, scale, found_settings())
        first = {k: v for k, v in there.items() if k != "settings_from" and (k not in default or default[k] != v)}
        default |= first
    chosen: dict[str, Any] = {}

    def once(trial: dict[str, Any], seed: int) -> dict[str, Any]:
        # trials of other defaults, say of another penalty, are not comparable
        how = {"trial": trial, "share": share, "seed": seed, "default": json.loads(json.dumps(default))}
        for known in trials:
            if how.items() <= known.items():
                return known
        short = (
            {} if method == "denoiser" else {"epochs": max(1, round(share * trial.get("epochs", default["epochs"])))}
        )
        with tempfile.TemporaryDirectory() as folder:
            record, _ = run_cell(
                task, representative, loss, scale, seed, data=data, override=default | trial | short | {"settings_from": "search"}, defaults=True, validate=True, out=Path(folder),
                progress=False, device=device,
            )  # fmt: skip
        psnr = record["psnr"]["mean"]
        trials.append({**how, "psnr": psnr if math.isfinite(psnr) else None, "seconds": record["seconds"]})
        trials[-1]["device"] = record.get("device")
        if "fixed_point" in record:
            trials[-1]["missed"] = record["images"] - record["fixed_point"]["converged"]
            trials[-1]["spread_db"] = max(record["fixed_point"]["spread_db"]["all"])
        write(path, json.dumps(trials, indent=1) + "\n")
        print(
            f"{task} {representative} {loss} {trial} {seed}: {psnr:.2f} dB, {record['seconds']} s",
            flush=True,
        )
        return trials[-1]

    def score(trial: dict[str, Any]) -> tuple[bool, float]:
        scores = [worth(once(complete(task, method, trial), seed)) for seed in range(seeds)]
        return all(reached for reached, _ in scores), statistics.mean(psnr for _, psnr in scores)

    steps = grid_nearby(method, loss, default) if nearby else grid(task, method, loss, default)
    for name, values in steps:
        present = chosen.get(name, default.get(name))
        scores = {value: score(chosen | ({} if value == default.get(name) else {name: value})) for value in values}
        best = max(scores, key=scores.__getitem__)
        chosen = chosen if best == present else chosen | {name: best}
    chosen = first | complete(task, method, chosen)
    found = found_settings()
    found.setdefault(scale, {}).setdefault(task, {}).setdefault(family, {})[loss] = chosen
    write(settings.SETTINGS, json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{task} {family} {loss}: {chosen}", flush=True)


def main() -> None:
    parser = arguments("Choose hyperparameters on validation images.", "every method and loss without settings")
    parser.add_argument("--share", type=float, default=0.5, help="part of the epochs that a trial takes")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of every trial, whose mean decides")
    parser.add_argument(
        "--nearby", action="store_true", help="try values around the settings that the cell has already"
    )
    args = parsed(parser)
    if not args.all:
        search(
            args.task, args.method, args.loss, args.scale, args.data, args.share, args.seeds, args.nearby, args.device
        )
        return
    known = found_settings().get(args.scale, {})
    cells = dict.fromkeys((t, METHODS[m].family, loss) for t, m, loss, _ in matrix(args.scale))
    missing = [
        ["--task", task, "--method", REPRESENTATIVE.get(method, method), "--loss", loss]
        for task, method, loss in cells
        if loss not in known.get(task, {}).get(method, {})
    ]
    common = ["--share", str(args.share), "--seeds", str(args.seeds), "--device", args.device]
    common += ["--nearby"] * args.nearby
    run_each(__file__, args, missing, common)


if __name__ == "__main__":
    main()
