r"""
Certify the models that ship
============================

.. code-block:: bash

    python examples/paper/shipped.py                      # all conditions: some 20 minutes of one core
    python examples/paper/shipped.py --only ct-ei/own     # one of them

Loads ``ct-ei``, ``ct-ei-small`` and ``mri-ei`` as a user does, and certifies their reconstructions of test images: under the conditions of their training,
and under others (more pixels, other numbers of views, other accelerations, other anatomy, other scanners, photographs). Each condition is written to
``shipped.json`` at once. ``docs/fill_tables.py`` writes the table.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import DATA, FILES, HERE, make_task, metrics, shipped_slice
from evaluation import certified, plain_certificate, summary
from records import certificate_cells, write

from deepinv_deq import DEQReconstructor
from deepinv_deq.iterations.base import linear_reconstruction

RECORD = HERE / "shipped.json"
PHOTOS = "bsds500_gray_256.npz"
SLICE = "slice"  # an image of another scanner, which another package ships
SCALE_OF = {"ct-ei": "paper", "ct-ei-small": "small", "mri-ei": "paper"}  # of their training
#: What is different from the training, how many of the test images are certified, and how the table calls it.
CONDITIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "ct-ei/own": ({}, 10, "128×128, 50 views, as trained"),
    "ct-ei/views-30": ({"views": 30}, 3, "128×128, 30 views"),
    "ct-ei/views-90": ({"views": 90}, 3, "128×128, 90 views"),
    "ct-ei/64-30": ({"size": 64, "views": 30}, 3, "64×64, 30 views"),
    "ct-ei/hearts": ({"file": FILES["mri"]}, 3, "128×128, 50 views, MR slices of hearts"),
    "ct-ei/photos": ({"file": PHOTOS}, 3, "128×128, 50 views, photographs"),
    "ct-ei/scanner": ({SLICE: True}, 1, "128×128, 50 views, a vertebra from another scanner"),
    "ct-ei-small/own": ({}, 10, "64×64, 30 views, as trained"),
    "mri-ei/own": ({}, 10, "256×256, 8×, as trained"),
    "mri-ei/4x": ({"acceleration": 4}, 5, "256×256, 4×"),
    "mri-ei/96": ({"size": 96}, 5, "96×96, 8×"),
    "mri-ei/chests": ({"file": FILES["ct"]}, 5, "256×256, 8×, CT slices of chests"),
    "mri-ei/scanner": ({SLICE: True}, 1, "256×256, 8×, a head from another scanner"),
    "mri-ei/photos": ({"file": PHOTOS}, 5, "256×256, 8×, photographs"),
}


def measure(condition: str, data: Path) -> dict[str, Any]:
    r"""The certificate of a shipped model under a condition, as plain values.

    :param str condition: a key of :data:`CONDITIONS`.
    :param Path data: folder with the images.
    """
    name = condition.split("/")[0]
    other, count, _ = CONDITIONS[condition]
    task = make_task(name.split("-")[0], SCALE_OF[name], data, other=other)
    if SLICE in other:
        x, y = shipped_slice(task)
        task = replace(task, x=x, y=y, test=slice(0, 1))
    task = replace(task, test=slice(task.test.start, task.test.start + count))
    model = DEQReconstructor.from_pretrained(name).eval()
    psnr, begun = metrics(task)["psnr"], time.time()
    x, y = task.x[task.test], task.y[task.test]
    return {
        "model": name,
        "images": len(x),
        "psnr_start": summary(psnr(linear_reconstruction(y, task.physics), x)),
        **plain_certificate(certified(model, task, psnr)),
        "seconds": round(time.time() - begun),
    }


def render() -> str:
    r"""The table of the page."""
    lines = [
        "| model | images and operator | tolerance | linear | model | largest spread | largest radius | evals | converged | certified |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for condition, (_, _, title) in CONDITIONS.items():
        if condition not in known:
            lines.append(f"| `{condition.split('/')[0]}` | {title} |" + 7 * " |" + " *missing* |")
            continue
        r = known[condition]
        tolerance = f"{r['tol']:.0e}".replace("e-0", "e-") if "tol" in r else "–"
        cells = [
            f"`{r['model']}`",
            title,
            tolerance,
            f"{r['psnr_start']['mean']:.2f}",
            f"{r['psnr']['tenth']['mean']:.2f}",
        ]
        lines.append(f"| {' | '.join([*cells, *certificate_cells(r, r['images'])])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Certify the models that ship.")
    parser.add_argument("--only", nargs="+", default=list(CONDITIONS), help=", ".join(CONDITIONS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images")
    args = parser.parse_args()
    if unknown := set(args.only) - set(CONDITIONS):
        sys.exit(f"error: unknown condition {', '.join(sorted(unknown))}: must be one of {', '.join(CONDITIONS)}.")
    for key in args.only:
        found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        found[key] = measure(key, args.data)
        ordered = {k: found[k] for k in CONDITIONS if k in found}
        write(RECORD, json.dumps(ordered, indent=1) + "\n")
        print(
            f"{key}: {found[key]['psnr']['tenth']['mean']:.2f} dB, spread {max(found[key]['spread_db']['all']):.3f} dB; {found[key]['outcome']}",
            flush=True,
        )
