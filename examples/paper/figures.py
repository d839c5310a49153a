r"""
Figures of the records
======================

.. code-block:: bash

    python examples/paper/figures.py --plots docs/_static/small     # all plots of the records, for one scale

The plots show the records there are.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import published
from data import HERE, TASKS
from losses import BEST, LOSSES
from models import METHODS
from paired import difference, independent
from records import Records, losses_of, value

BLIND = [loss for loss, kind in LOSSES.items() if kind.build is not None and loss != "sup"]
COLOURS = {loss: f"C{i}" for i, loss in enumerate(("sup", *BLIND))}
STYLES = dict(
    zip(
        BLIND,
        ("--", "-", ":", "-.", (0, (5, 1)), (0, (4, 1, 1, 1, 1, 1)), (0, (3, 1, 1, 1)), (0, (8, 3))),
        strict=False,
    )
)
MARKERS = dict(zip(METHODS, "osD^v<>PX*d", strict=False))


def subplots(rows: int, columns: int, *, figsize: tuple[float, float], **options: Any) -> Any:
    r"""A figure that makes room for its titles and legends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False, **options)


def save(plot: Any, path: Path, dpi: int = 80) -> Path:
    r"""Write the file, and say so."""
    import matplotlib.pyplot as plt
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    for axis in plot.axes:
        if not axis.has_data() and not axis.texts:
            axis.text(0.5, 0.5, "no record yet", transform=axis.transAxes, ha="center", va="center", color="0.5")
            axis.set(xticks=[], yticks=[])
    plot.savefig(path, dpi=dpi)
    plt.close(plot)
    with Image.open(path) as image:
        fewer = image.convert("RGB").quantize(256)  # colours: a third of the size
    fewer.save(path, optimize=True)
    print(f"{path}", file=sys.stderr)
    return path


def measured(records: Records) -> list[str]:
    r"""The tasks that have records; all tasks if none has."""
    return [task for task in TASKS if any(r["config"]["task"] == task for r in records.all)] or list(TASKS)


def dots(path: Path, scale: str) -> Path:
    r"""PSNR of every method, supervised and by EI: ours filled, with the standard error over test images; the paper's hollow."""
    records = Records(scale)
    tasks = measured(records)
    plot, axes = subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.6))
    for axis, task in zip(axes[0], tasks, strict=True):
        methods = [m for m in METHODS if task in METHODS[m].tasks]
        for shift, loss in ((0.15, "sup"), (-0.15, "ei"), (0.0, BEST[task])):
            for row, method in enumerate(methods):
                key = "none" if METHODS[method].epochs is None else loss
                if key == "none" and loss != "sup":
                    continue
                color, height = ("0.4" if key == "none" else COLOURS[loss]), -row + (0.0 if key == "none" else shift)
                if (found := level(records, task, method, key)) is not None:
                    axis.errorbar(found[0], height, xerr=found[1], fmt="o", color=color, capsize=2)
                if (theirs := published.TABLE_1.get((task, method, key))) is not None:
                    axis.plot(theirs, height, "o", mfc="none", mec=color)
        for loss in ("sup", "ei", BEST[task]):
            axis.plot([], [], "o", color=COLOURS[loss], label=LOSSES[loss].title)
        axis.plot([], [], "o", mfc="none", mec="0.4", label="the paper's (other images and sizes)")
        axis.set_yticks([-row for row in range(len(methods))], [METHODS[m].title for m in methods])
        axis.set(title=f"{task.upper()}, scale {scale}", xlabel="PSNR of the test images (dB)")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return save(plot, path)


def level(records: Records, task: str, method: str, loss: str) -> tuple[float, float] | None:
    r"""Mean PSNR of a cell, and its standard error over test images."""
    seeds = [independent(task, seed) for seed in records.images(task, method, loss)]
    if not seeds:
        return None
    images = [statistics.mean(image) for image in zip(*seeds, strict=True)]
    error = statistics.stdev(images) / len(images) ** 0.5 if len(images) > 1 else 0.0
    return statistics.mean(images), error


def gaps(path: Path, scale: str) -> Path:
    r"""By how much every training without ground truth is behind the supervised one: paired differences, two standard errors."""
    records = Records(scale)
    tasks = measured(records)
    plot, axes = subplots(1, len(tasks), figsize=(6 * len(tasks), 3.8))
    for axis, task in zip(axes[0], tasks, strict=True):
        losses = [loss for loss in losses_of(task, "deq-id") if loss != "sup"]
        for row, loss in enumerate(losses):
            found = difference(records, (task, "deq-id", loss), (task, "deq-id", "sup"))
            if found is None:
                axis.text(0.02, -row, "no record", transform=axis.get_yaxis_transform(), va="center", color="0.5")
            else:
                axis.errorbar(found.mean, -row, xerr=2 * found.error, fmt="o", color=COLOURS[loss], capsize=3)
        axis.axvline(0, color="0.6", lw=1)
        axis.set_yticks([-row for row in range(len(losses))], [LOSSES[loss].title for loss in losses])
        axis.set(title=f"{task.upper()}, DEQ with ID", xlabel="PSNR − supervised (dB), ± 2 standard errors")
        axis.set_ylim(-len(losses) + 0.5, 0.5)
        axis.grid(axis="x", alpha=0.3)
    return save(plot, path)


def times(path: Path, scale: str) -> Path:
    r"""PSNR of every cell against how long it trained."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullFormatter

    records = Records(scale)
    tasks = measured(records)
    plot, axes = subplots(1, len(tasks), figsize=(6.5 * len(tasks), 4.6))
    for axis, task in zip(axes[0], tasks, strict=True):
        known = [r for r in records.all if r["config"]["task"] == task and r["steps"]]
        for r in known:
            method, loss = r["config"]["method"], r["config"]["loss"]
            inside = "none" if _on_gpu(r) else COLOURS[loss]
            axis.plot(r["seconds"] / 60, value(r, "psnr"), MARKERS[method], color=COLOURS[loss], markerfacecolor=inside)
        for method in dict.fromkeys(r["config"]["method"] for r in known):
            axis.plot([], [], MARKERS[method], color="0.4", label=METHODS[method].title)
        handles = axis.get_legend_handles_labels()[0]
        losses = dict.fromkeys(r["config"]["loss"] for r in known)
        handles += [Patch(color=COLOURS[loss], label=LOSSES[loss].title) for loss in losses]
        if any(_on_gpu(r) for r in known):
            handles += [Line2D([], [], marker="o", ls="", color="0.4", markerfacecolor="none", label="on a shared GPU")]
        axis.set(title=f"{task.upper()}, scale {scale}", xlabel="training time (minutes)", ylabel="PSNR (dB)")
        if known:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return save(plot, path)


def _on_gpu(record: dict[str, Any]) -> bool:
    return "thread" not in record["device"]  # CPUs are named with their number of threads


def _kind(trial: dict[str, Any]) -> str:
    r"""Which trainings of different bounds form one curve."""
    return f"{trial['steps']} steps" + (
        f", saturation {trial['saturation']:g}" if trial["saturation"] else ", no saturation"
    )


def bound_curve(path: Path, scale: str) -> Path:
    r"""PSNR at the fixed point, and evaluations, against the bound of the penalty."""
    known = [json.loads(p.read_text()) for p in sorted((HERE / "bound").glob(f"*_{scale}_*.json"))]
    tasks = [task for task in TASKS if any(r["task"] == task for r in known)] or list(TASKS)
    plot, axes = subplots(3, len(tasks), figsize=(1 + 5 * len(tasks), 8), sharex=True)
    for column, task in zip(axes.T, tasks, strict=True):
        for kind in sorted({_kind(r) for r in known if r["task"] == task}):
            points = sorted((r for r in known if (r["task"], _kind(r)) == (task, kind)), key=lambda r: r["bound"])
            x = [r["bound"] for r in points]
            column[0].plot(x, [r["psnr"].get("tenth", float("nan")) for r in points], "o-", label=kind)
            column[1].plot(x, [r["spread_db"] for r in points], "o-", label=kind)
            column[2].plot(x, [r["evaluations"] for r in points], "o-", label=kind)
        column[0].set(title=task.upper(), ylabel="PSNR, validation (dB)")
        column[1].set(ylabel="largest spread (dB)")
        column[2].set(xlabel="bound of the penalty", ylabel="evaluations")
        if column[0].lines:
            column[0].legend(fontsize="small", loc="lower right")
    return save(plot, path)


def curves(path: Path, scale: str) -> Path:
    r"""PSNR of the test images over training, mean of the seeds: whether a result is one of trainings that had ended."""
    records = Records(scale)
    tasks = measured(records)
    plot, axes = subplots(len(tasks), 2, figsize=(14, 4 * len(tasks)))
    for line, task in zip(axes, tasks, strict=True):
        for axis, supervised in zip(line, (True, False), strict=True):
            for method in METHODS:
                for loss in (
                    loss for loss in losses_of(task, method) if loss != "none" and (loss == "sup") == supervised
                ):
                    known = [r["curve"]["psnr"]["PSNR"] for r in records.of(task, method, loss)]
                    if not known:
                        continue
                    course = [statistics.mean(seeds) for seeds in zip(*known, strict=True)]
                    share = [(i + 1) / len(course) for i in range(len(course))]
                    label = f"{METHODS[method].title}, {LOSSES[loss].title}"
                    color = f"C{list(METHODS).index(method) % 10}"
                    axis.plot(share, course, ls=STYLES.get(loss, "-"), color=color, label=label)
            axis.set(title=f"{task.upper()}, {'supervised' if supervised else 'without ground truth'}")
            axis.set(xlabel="part of the training", ylabel="PSNR of the test images (dB)")
            if axis.lines:
                axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return save(plot, path)


def plots(folder: Path, scale: str) -> list[Path]:
    r"""All plots of the records of a scale."""
    drawn = [draw(folder / f"{draw.__name__}.png", scale) for draw in (dots, gaps, times, curves)]
    bounds = any((HERE / "bound").glob(f"*_{scale}_*.json"))
    return [*drawn, *([bound_curve(folder / "bound.png", scale)] if bounds else [])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Figures of the records.")
    parser.add_argument("--plots", type=Path, required=True, help="folder for the plots")
    parser.add_argument("--scale", default="small")
    args = parser.parse_args()
    plots(args.plots, args.scale)
