r"""
The records of finished cells
=============================

One JSON file a cell, in ``results/<scale>/<task>_<method>_<loss>_<seed>.json``. Cells of another pretrained denoiser, of another
number of feature maps, or of another bound of the penalty have a folder of their own.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import CHANNELS, HERE, TASKS
from losses import BEST, LOSSES
from models import METHODS

RESULTS = HERE / "results"
SPREAD_DB = 0.05  # more than this between starts and tolerances, on any image: not a fixed point
FLOOR = 1e-8  # what deepinv's PSNR adds to the mean squared error
Row = dict[str, Any]
Cell = tuple[str, str, str]


def matrix(scale: str) -> list[tuple[str, str, str, int]]:
    r"""All cells of the tables. The order is that in which they matter: first the DEQs with exact gradients, then their rivals,
    then JFB, CT before MRI; further losses and further seeds come last."""
    cells = [
        (task, method, loss, seed)
        for task in TASKS
        for method in METHODS
        for loss in losses_of(task, method)
        for seed in range(METHODS[method].seeds[scale])
    ]
    return sorted(cells, key=_priority)


def losses_of(task: str, method: str) -> tuple[str, ...]:
    r"""The losses that a method is trained with; none if it is not for this task."""
    if task not in METHODS[method].tasks:
        return ()
    if method == "denoiser":
        return ("none",)
    if method == "deq-id":
        return tuple(k for k, v in LOSSES.items() if v.build is not None and task in v.tasks)
    return ("sup", "ei", BEST[task]) if method in ("unet", "modl") else ("sup", "ei")


def _priority(cell: tuple[str, str, str, int]) -> tuple[Any, ...]:
    task, method, loss, seed = cell
    known = {"deq-id": 0, "modl": 1, "lpd": 1, "varnet": 1, "unet": 1, "unrolled-7": 1, "deq-jfb": 2}
    further = method == "deq-id" and loss not in ("sup", "ei", BEST[task])
    return seed, further, TASKS.index(task), known.get(method, 3), list(METHODS).index(method)


def variant_of(
    denoiser: Path | None = None,
    channels: tuple[int, ...] = CHANNELS,
    bound: float | None = None,
    epochs: int | None = None,
) -> str:
    r"""Folder of the cells of another denoiser than the tables' own, of other numbers of feature maps or epochs, or of another bound; else
    empty."""
    parts = ["-".join(map(str, channels))] if tuple(channels) != CHANNELS else []
    parts += [] if bound is None else [f"bound-{bound:g}"]
    parts += [] if epochs is None else [f"epochs-{epochs}"]
    return "_".join(parts + ([denoiser.stem] if denoiser else []))


def path_of(scale: str, task: str, method: str, loss: str, seed: int, variant: str = "") -> Path:
    r"""The file of a record."""
    return RESULTS / scale / variant / f"{task}_{method}_{loss}_{seed}.json"


def variants_of(scale: str) -> list[str]:
    r"""The folders of cells with another denoiser, number of feature maps or epochs, or bound."""
    return sorted(path.name for path in (RESULTS / scale).glob("*") if path.is_dir())


def folder_of(record: Path) -> Path:
    r"""Where a cell leaves its checkpoints and its model, by the path of its record."""
    return Path("runs") / "paper" / record.relative_to(RESULTS).with_suffix("")


def read_record(path: Path) -> Row | None:
    r"""A finished record; ``None`` if there is none, or the file is broken, which prints a message."""
    try:
        record = json.loads(path.read_text())
        record["psnr"]["mean"], record["config"]["method"]
        return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"The record {path} is broken ({type(error).__name__}: {error}): its cell is run again.", file=sys.stderr)
        return None


def write(path: Path, text: str) -> None:
    r"""Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def is_outdated(record: Row) -> bool:
    r"""Whether a DEQ was recorded before its fixed point was checked: the numbers are those of where the solver stopped."""
    return is_deq(record) and "fixed_point" not in record


def is_deq(record: Row) -> bool:
    r"""Whether a record is of a deep equilibrium model."""
    return METHODS[record["config"]["method"]].is_deq


def is_fixed_point(record: Row) -> bool:
    r"""Whether all solves of a DEQ, from other starts and to a tenth of the tolerance, agree in PSNR on every test image."""
    return max(record["fixed_point"]["spread_db"]["all"]) <= SPREAD_DB


def certificate_cells(point: Row, images: int) -> list[str]:
    r"""A certificate in cells of a table: largest spread in dB, largest spectral radius, mean number of evaluations, and how many
    images converged and are certified."""
    largest = [f"{max(point[name]['all']):.3f}" for name in ("spread_db", "spectral_radius")]
    counts = [f"{point[name]} of {images}" for name in ("converged", "certified")]
    return [*largest, f"{statistics.mean(point['evaluations']):.0f}", *counts]


class Records:
    r"""The finished cells of a scale; outdated records of DEQs are kept apart."""

    def __init__(self, scale: str, variant: str = ""):
        self.scale, self.variant = scale, variant
        paths = sorted((RESULTS / scale / variant).glob("*.json"))
        known = [record for path in paths if (record := read_record(path)) is not None]
        known = [r for r in known if r["config"]["method"] in METHODS and not r.get("validation")]
        self.all = [record for record in known if not is_outdated(record)]
        self.outdated = [record for record in known if is_outdated(record)]

    def of(self, task: str, method: str, loss: str) -> list[Row]:
        r"""Records of all seeds."""
        return [r for r in self.all if _cell(r) == (task, method, loss)]

    def state(self, task: str, method: str, loss: str) -> str:
        r"""``"done"``, ``"outdated"``, ``"missing"``, or ``"none"`` for a cell that is not of the tables."""
        if self.of(task, method, loss):
            return "done"
        if any(_cell(r) == (task, method, loss) for r in self.outdated):
            return "outdated"
        return "missing" if loss in losses_of(task, method) else "none"

    def mean(self, task: str, method: str, loss: str, what: str = "psnr") -> float | None:
        r"""Mean over seeds of the mean over test images."""
        known = [value(record, what) for record in self.of(task, method, loss) if has(record, what)]
        return statistics.mean(known) if known else None

    def images(self, task: str, method: str, loss: str, what: str = "psnr") -> list[list[float]]:
        r"""Values of every test image, one list for each seed."""
        return [values(record, what) for record in self.of(task, method, loss) if has(record, what)]

    def rivals(self, task: str, loss: str, *, learned: bool = False) -> list[str]:
        r"""The methods with records that are no DEQs, the best first; ``learned`` leaves out those that are not trained for the task."""
        others = [m for m in METHODS if not METHODS[m].is_deq and not (learned and METHODS[m].epochs is None)]
        known = {m: self.mean(task, m, "none" if METHODS[m].epochs is None else loss) for m in others}
        return sorted((m for m, v in known.items() if v is not None), key=lambda m: -(known[m] or 0.0))


def _cell(record: Row) -> Cell:
    c = record["config"]
    return c["task"], c["method"], c["loss"]


def values(record: Row, what: str) -> list[float]:
    r"""A measure of every test image. Measures of equivariance are read without the floor that deepinv's PSNR has, and those of F
    divided by the stepsize, as measures of ``(F - I) / stepsize``: the rotation and the identity commute."""
    entry: Any = record
    *path, name = what.split("/")
    for key in path:
        entry = entry[key]
    out, exact = list(entry[name]["all"]), entry.get("exact_equivariance", False)
    if name.startswith(("pipeline_", "iteration_")):
        out = out if exact else [unsaturated(db) for db in out]
    if name.startswith("iteration_"):
        out = [db + 20 * math.log10(record["config"]["stepsize"]) for db in out]
    return out


def has(record: Row, what: str) -> bool:
    r"""Whether a record holds a measure."""
    entry: Any = record
    for key in what.split("/"):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return bool(entry)


def value(record: Row, what: str) -> float:
    r"""Mean of :func:`values`."""
    return statistics.mean(values(record, what))


def unsaturated(db: float) -> float:
    r"""The PSNR that deepinv would have given had it not added :data:`FLOOR` to the mean squared error of images up to 1."""
    return -10 * math.log10(max(10 ** (-db / 10) - FLOOR, 1e-14))


def mean_and_spread(numbers: list[float], form: Callable[[float], str]) -> str:
    r"""Mean over seeds, with their standard deviation if there are several."""
    out = form(statistics.mean(numbers))
    return out + (f" ± {form(statistics.stdev(numbers))}" if len(numbers) > 1 else "")
