r"""
Figure 1 of the paper
=====================

.. code-block:: bash

    python examples/paper/figure_1.py runs/paper/figure1.png                         # of the first test image of each task
    python examples/paper/figure_1.py docs/_static/figure1.png --slices --scale paper \
        --columns deq-id/sup deq-id/best unet/sup modl/sup                           # of an image that may be passed on

Needs the trained models that ``run.py`` left in ``runs/``. DEQs are solved to the tolerance of tests.
"""

import argparse
import sys
from pathlib import Path

import torch
from data import DATA, SCALES, TASKS, make_task, metrics, shipped_slice
from evaluation import for_tests
from figures import save, subplots
from losses import BEST, LOSSES
from models import METHODS, make_model
from records import folder_of, path_of, read_record
from settings import check_name
from weights import weights_of

from deepinv_deq.iterations.base import linear_reconstruction

COLUMNS = ("deq-id/sup", "deq-id/ei", "deq-id/best", "unet/sup", "unet/ei")  # "best" of those without ground truth


def figure_1(
    path: Path,
    scale: str,
    data: Path,
    *,
    slices: bool = False,
    tasks: tuple[str, ...] = TASKS,
    columns: tuple[str, ...] = COLUMNS,
) -> Path:
    r"""Fig. 1: reconstructions of DEQ and U-Net, supervised and not, of the first test image of each task.

    :param bool slices: take slices that other packages ship, and none of the data, which must not be passed on.
    :param tuple tasks: one row each.
    :param tuple columns: method and loss of each column; the loss ``"best"`` is the best without ground truth.
    """
    plot, axes = subplots(len(tasks), 2 + len(columns), figsize=(2 * (2 + len(columns)), 2.6 * len(tasks)))
    for line, name in zip(axes, tasks, strict=True):
        task = make_task(name, scale, data)
        x, y = task.x[task.test][:1], task.y[task.test][:1]
        if slices:
            x, y = shipped_slice(task)
        images = {"ground truth": x, "FBP" if name == "ct" else "zero-filled": linear_reconstruction(y, task.physics)}
        for column in columns:
            method, loss = column.split("/")
            loss = BEST[name] if loss == "best" else loss
            record_path = path_of(scale, name, method, loss, 0)
            record, weights = read_record(record_path), folder_of(record_path) / "model.pt"
            if record is None or not weights.exists():
                sys.exit(f"error: no model {weights}: run that cell first (python examples/paper/run.py, --force).")
            model = make_model(task, method, record["config"], weights_of(name, "unet", data))
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            model = for_tests(model, record["config"]) if METHODS[method].is_deq else model.eval()
            with torch.no_grad():
                images[f"{METHODS[method].title},\n{LOSSES[loss].title}"] = model(y, task.physics)
        psnr = metrics(task)["psnr"]
        for axis, (title, image) in zip(line, images.items(), strict=True):
            magnitude = image[0].norm(dim=0) if image.shape[1] == 2 else image[0, 0]
            axis.imshow(magnitude.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize="medium")
            if title != "ground truth":
                text = f"{psnr(image, x).item():.1f} dB"
                axis.text(0.97, 0.03, text, color="yellow", ha="right", transform=axis.transAxes)
    return save(plot, path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Figure 1 of the paper.")
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--slices", action="store_true", help="of slices that pydicom and Matplotlib ship")
    parser.add_argument("--scale", default="small", help=", ".join(SCALES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument(
        "--columns", nargs="+", default=list(COLUMNS), help="method/loss of each column, such as modl/sup"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images")
    args = parser.parse_args()
    check_name("scale", args.scale, SCALES)
    for name in args.tasks:
        check_name("task", name, TASKS)
    for column in args.columns:
        method, _, loss = column.partition("/")
        check_name("method", method, METHODS)
        check_name("loss", loss, ("best", *LOSSES))
    figure_1(args.path, args.scale, args.data, slices=args.slices, tasks=tuple(args.tasks), columns=tuple(args.columns))
