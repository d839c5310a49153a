r"""
Tables of the records, beside the paper's own numbers
=====================================================

.. code-block:: bash

    python examples/paper/tables.py              # Markdown, from the committed records
    python examples/paper/figures.py --help      # the figures

The tables are also those of ``docs/results.md``. A DEQ is shown at a tenth of its test tolerance. Cells without a valid record are
shown as such: *missing*, or *old* where the record is from before fixed points were checked.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import claims
import published
from data import HERE, SCALES, TASKS, TWINS
from losses import LOSSES
from models import METHODS
from provenance import provenance, searches, training_times
from records import (
    Records,
    certificate_cells,
    has,
    is_deq,
    is_fixed_point,
    losses_of,
    mean_and_spread,
    value,
    variants_of,
)
from settings import has_older_settings

NO_FIXED_POINT, OLDER = " **not a fixed point**", " *older settings*"
MARKS = {"outdated": "*old*", "missing": "*missing*", "none": "–"}
EQUIVARIANT = ("ei", "ei-fixed", "ei-turned", "sup")  # trainings of Tables 2 and 3


def cell(records: Records, task: str, method: str, loss: str, what: str = "psnr", digits: int = 2) -> str:
    r"""Mean over seeds with their standard deviation, or the mark of a cell without a valid record."""
    known = records.of(task, method, loss)
    if not known:
        return MARKS[records.state(task, method, loss)]
    doubtful = METHODS[method].is_deq and not all(map(is_fixed_point, known))
    known = [r for r in known if has(r, what)]
    if not known:
        return MARKS["missing"]
    text = mean_and_spread([value(r, what) for r in known], f"{{:.{digits}f}}".format)
    older = any(has_older_settings(r["config"]) for r in known)
    return text + (NO_FIXED_POINT if doubtful else "") + (OLDER if older else "")


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    r"""A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_1(records: Records, task: str, what: str = "psnr", digits: int = 2) -> str:
    r"""PSNR (or SSIM) of the test images for every method and loss of a task, and the paper's."""
    columns = [m for m in METHODS if task in METHODS[m].tasks and METHODS[m].epochs is not None]
    body = []
    for loss in losses_of(task, "deq-id"):
        row = [cell(records, task, m, loss, what, digits) for m in columns]
        body.append([LOSSES[loss].title, *row])
        paper = [published.TABLE_1.get((task, m, loss)) for m in columns]
        if what == "psnr" and any(paper):
            body.append(["*paper*", *("" if p is None else f"*{p:.2f}*" for p in paper)])
    header = ["training", *(METHODS[m].title for m in columns)]
    plug = cell(records, task, "denoiser", "none", what, digits)
    theirs = f" (*paper: {published.TABLE_1[task, 'denoiser', 'none']:.2f}*)" if what == "psnr" else ""
    name = "RED" if task == "ct" else "PnP"
    twins = " Means are over ten images, two of which are one image; claims count it once." if task in TWINS else ""
    return (
        table(header, body)
        + f"\n\n{name} with a DnCNN, not trained for the task: {plug}{theirs}. {_start(records, task, what, digits)}{twins}"
    )


def _start(records: Records, task: str, what: str, digits: int) -> str:
    known = next((r for r in records.all if r["config"]["task"] == task), None)
    if known is None:
        return ""
    name = "Filtered back-projection" if task == "ct" else "Zero-filled image"
    return f"{name}: {known[f'{what}_start']['mean']:.{digits}f}."


def fixed_points(records: Records) -> str:
    r"""The certificate of every DEQ: PSNR from other starts and at a tenth of the tolerance, spectral radius, evaluations."""
    body = []
    for r in filter(is_deq, records.all):
        c, f = r["config"], r["fixed_point"]
        psnr = [f"{f['psnr'][k]['mean']:.2f}" if k in f["psnr"] else "" for k in ("start", "tenth")]
        names = [c["task"].upper(), METHODS[c["method"]].title, LOSSES[c["loss"]].title]
        agree = "yes" if is_fixed_point(r) else "**no**"
        body.append([*names, agree, str(c["seed"]), *psnr, *certificate_cells(f, r["images"])])
    header = ["task", "method", "training", "starts agree", "seed", "PSNR at tolerance", "at a tenth"]
    header += ["largest spread, dB", "largest spectral radius", "evals", "converged", "certified"]
    return table(header, body) if body else "No DEQ has a valid record."


def variants(scale: str) -> str:
    r"""The records of other bounds, numbers of feature maps or epochs, or penalties than the cells', which have folders of their own."""
    body = []
    for variant in variants_of(scale):
        for r in Records(scale, variant).all:
            c, point = r["config"], r.get("fixed_point")
            cells = certificate_cells(point, r["images"]) if point else [""] * 5
            names = [variant, c["task"].upper(), METHODS[c["method"]].title, LOSSES[c["loss"]].title]
            body.append([*names, f"{value(r, 'psnr'):.2f}", *cells])
    header = ["variant", "task", "method", "training", "PSNR", "largest spread, dB", "largest spectral radius"]
    return table([*header, "evals", "converged", "certified"], body) if body else ""


def table_2(records: Records) -> str:
    r"""Equivariance of the pipeline."""
    body = []
    for task in TASKS:
        for method in ("deq-id", "unet"):
            cells = [cell(records, task, method, loss, "pipeline_equivariance") for loss in EQUIVARIANT]
            body.append([task.upper(), METHODS[method].title, *cells, *_italic(published.TABLE_2[task, method])])
    header = ["task", "method", *(LOSSES[loss].title for loss in EQUIVARIANT), "*paper: EI*", "*supervised*"]
    return table(header, body)


def table_3(records: Records) -> str:
    r"""Equivariance of (F − I) / stepsize, and how much that operator is, at true images."""
    body = []
    for task in TASKS:
        for what, name in (("iteration_equivariance", "equivariance"), ("iteration_fidelity", "size")):
            cells = [cell(records, task, "deq-id", loss, what) for loss in EQUIVARIANT]
            cells.append(cell(records, task, "deq-id", "ei", f"untrained/{what}"))
            body.append([task.upper(), name, *cells])
        ei, supervised, initial = _italic(published.TABLE_3[task])
        body.append([task.upper(), "*paper: equivariance*", ei, *[""] * (len(EQUIVARIANT) - 2), supervised, initial])
    return table(["task", "", *(LOSSES[loss].title for loss in EQUIVARIANT), "initialisation"], body)


def _italic(numbers: Iterable[float]) -> list[str]:
    return [f"*{n:.2f}*" for n in numbers]


def objectives(records: Records) -> str:
    r"""The equivariance term of EI on the test images, next to the PSNR."""
    body = []
    for task in TASKS:
        for loss in losses_of(task, "deq-id"):
            known = [r for r in records.of(task, "deq-id", loss) if "ei_loss" in r]
            term = (
                f"{sum(r['ei_loss'] for r in known) / len(known):.2e}"
                if known
                else MARKS[records.state(task, "deq-id", loss)]
            )
            body.append([task.upper(), LOSSES[loss].title, term, cell(records, task, "deq-id", loss)])
    return table(["task", "training of DEQ, ID", "equivariance term on the test images", "PSNR in dB"], body)


def bounds() -> str:
    r"""PSNR at the fixed point against the bound of the penalty, on validation images."""
    body = []
    known = [json.loads(path.read_text()) for path in (HERE / "bound").glob("*.json")]
    for r in sorted(known, key=lambda r: (r["task"], r["bound"], r["saturation"] or 0.0, r["steps"], r["seed"])):
        psnr = [f"{r['psnr'][k]:.2f}" if k in r["psnr"] else "" for k in ("start", "tenth", "zeros", "truth")]
        body.append(
            [
                r["task"].upper(),
                f"{r['bound']:g}",
                f"{r['saturation'] or 'none'}",
                str(r["steps"]),
                *psnr,
                f"{r['spread_db']:.3f}",
            ]
            + [f"{r['spectral_radius']:.3f}", f"{r['evaluations']:.0f}"]
        )
    header = ["task", "bound", "saturation", "steps", "PSNR at tolerance", "at a tenth", "from zeros", "from the truth"]
    return table([*header, "largest spread, dB", "largest spectral radius", "evaluations"], body) if body else ""


def summary() -> str:
    r"""Table 1 for the README: trainings of DEQs on record, and the best rival."""
    body = []
    for scale in reversed(SCALES):
        records = Records(scale)
        for task in TASKS:
            for loss in losses_of(task, "deq-id"):
                if not any(records.of(task, method, loss) for method in ("deq-id", "deq-jfb")):
                    continue
                rivals = records.rivals(task, loss, learned=True)
                count = f"best of {len(rivals)}" if len(rivals) > 1 else "the only one on record"
                rival = (
                    f"{records.mean(task, rivals[0], loss):.2f} ({METHODS[rivals[0]].title}, {count})"
                    if rivals
                    else "–"
                )
                deqs = (cell(records, task, m, loss) for m in ("deq-id", "deq-jfb"))
                body.append([scale, task.upper(), LOSSES[loss].title, *deqs, rival])
    return table(["PSNR in dB, scale", "task", "training", "DEQ, ID", "DEQ, JFB", "rival"], body)


def findings() -> str:
    r"""Five sentences of the largest scale that has DEQs."""
    known = [records for scale in reversed(SCALES) if any(map(is_deq, (records := Records(scale)).all))]
    return f"Scale *{known[0].scale}*:\n\n{claims.findings(known[0])}" if known else "No DEQ has a valid record."


def dropdown(title: str, *parts: str) -> str:
    r"""A part of the page that opens on a click."""
    return "\n\n".join([f"````{{dropdown}} {title}", *filter(None, parts), "````"])


def render() -> str:
    r"""All tables of all scales."""
    blocks = []
    for scale in reversed(SCALES):
        records = Records(scale)
        if not records.all and not records.outdated:
            blocks.append(f"Nothing was run at scale *{scale}*.")
            continue
        blocks += [f"## Scale {scale}", provenance(records)]
        header = ["claim", "cells", "measured", "*paper, dB*", "borrowed settings", ""]
        rows, missing = claims.rows(records)
        blocks.append(dropdown("All claims", table(header, rows), missing))
        for task in TASKS:
            blocks.append(dropdown(f"Table 1, {task.upper()}: PSNR of the test images in dB", table_1(records, task)))
            blocks.append(dropdown(f"SSIM, {task.upper()}", table_1(records, task, "ssim", 3)))
        blocks.append(dropdown("Fixed points of the DEQs", fixed_points(records)))
        if other := variants(scale):
            blocks.append(dropdown("Other bounds, penalties and numbers of feature maps", other))
        blocks.append(dropdown("Table 2: equivariance of the pipeline in dB", table_2(records)))
        blocks.append(dropdown("Table 3: equivariance of the learned operator in dB", table_3(records)))
        blocks.append(dropdown("What EI minimises, and the PSNR", objectives(records)))
        blocks.append(dropdown("Training time in units of the DEQ's", table(*training_times(records))))
        blocks.append(dropdown("Trials of the searches", table(*searches(scale))))
        blocks += (
            [dropdown("PSNR against the bound of the penalty, on validation images", bounds())]
            if scale == "small" and bounds()
            else []
        )
    return "\n\n".join(blocks)


if __name__ == "__main__":
    print(render())
