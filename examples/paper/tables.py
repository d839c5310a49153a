r"""
Tables 1–3 and Figure 1, beside the paper's own numbers
=======================================================

.. code-block:: bash

    python examples/paper/tables.py                                # Markdown, from the committed records
    python examples/paper/tables.py --figure runs/paper/fig1.png   # and the figure, from the models that run.py left
    python examples/paper/tables.py --figure docs/_static/figure1.png --slices   # of images that may be passed on
    python examples/paper/tables.py --curves docs/_static/curves.png             # how PSNR rose in training

The tables are also those of ``docs/results.md``.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import experiments as ex
import run
import torch

from deepinv_deq.datasets import ct_slice, mr_slice

Row = dict[str, Any]
COLUMNS = ("deq-id", "deq-jfb", "unet", "unrolled-1", "unrolled-3", "unrolled-5", "unrolled-7", "denoiser")
TITLES = {
    "deq-id": "DEQ, ID",
    "deq-jfb": "DEQ, JFB",
    "unet": "U-Net",
    **{f"unrolled-{n}": f"unrolled {n}" for n in (1, 3, 5, 7)},
    "denoiser": "PnP / RED",
}
ROWS = {
    "sup": "supervised",
    "ei": "EI",
    "ei-sure": "EI + SURE",
    "ei-fixed": "EI, fixed targets",
    "ei-turned": "EI, turned operator",
    "split": "hidden views",
}
COLOURS = {
    "ei-sure": "k",
    "ei-fixed": "tab:olive",
    "ei-turned": "m",
    "split": "tab:cyan",
}  # of curves; others go by method
ONLY = {"ei-sure": "mri", "ei-turned": "ct", "split": "ct"}  # rows of one task
TASKS = ("mri", "ct")  # as the paper orders them
EQUIVARIANT = ("ei", "ei-fixed", "ei-turned", "sup")  # trainings of Tables 2 and 3
# Table 1 of the paper: test PSNR in dB
PAPER_1 = {
    ("mri", "sup"): (32.61, 32.51, 30.587, 29.16, 29.45, 29.33, 29.57),
    ("mri", "ei"): (31.34, 29.39, 28.02, 27.35, 27.56, 27.12, 27.24),
    ("mri", "none"): (25.07,),
    ("ct", "sup"): (36.77, 32.80, 36.33, 35.14, 34.57, 34.99, 35.80),
    ("ct", "ei"): (35.41, 33.52, 34.03, 31.73, 32.01, 32.34, 34.66),
    ("ct", "none"): (31.90,),
}
PAPER_2 = {  # EI, supervised
    ("mri", "deq-id"): (34.64, 34.66),
    ("mri", "unet"): (28.01, 25.62),
    ("ct", "deq-id"): (47.57, 39.24),
    ("ct", "unet"): (42.55, 36.48),
}
PAPER_3 = {"mri": (39.96, 32.59, 37.50), "ct": (52.44, 46.75, 33.94)}  # EI, supervised, initialisation


class Records:
    r"""The finished cells of a scale."""

    def __init__(self, scale: str, denoiser: str = ""):
        self.scale = scale
        paths = sorted((run.RESULTS / scale / denoiser).glob("*.json"))
        self.all = [record for path in paths if (record := run.read_record(path)) is not None]

    def of(self, task: str, method: str, loss: str) -> list[Row]:
        def matches(record: Row) -> bool:
            c = record["config"]
            return (c["task"], c["method"], c["loss"]) == (task, method, loss)

        return [record for record in self.all if matches(record)]

    def mean(self, task: str, method: str, loss: str, what: str = "psnr") -> float | None:
        r"""Mean over seeds of the mean over test images."""
        values = [_value(record, what) for record in self.of(task, method, loss)]
        return statistics.mean(values) if values else None

    def text(self, task: str, method: str, loss: str, what: str = "psnr", digits: int = 2) -> str:
        r"""Mean over seeds, with their standard deviation if there are several."""
        records = self.of(task, method, loss)
        if not records:
            return "–"
        values = [_value(record, what) for record in records]
        out = f"{statistics.mean(values):.{digits}f}"
        return out + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _value(record: Row, what: str) -> float:
    for key in what.split("/"):
        record = record[key]
    return record["mean"]


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_1(records: Records, what: str = "psnr", digits: int = 2) -> str:
    r"""Test PSNR (or SSIM) of every method, and the paper's."""
    body = []
    for task in TASKS:
        for loss, title in ROWS.items():
            if ONLY.get(loss, task) != task:
                continue
            cells = [records.text(task, m, loss, what, digits) for m in COLUMNS[:-1]]
            cells.append(records.text(task, "denoiser", "none", what, digits))
            body.append([task.upper(), title, *cells])
            paper = PAPER_1.get((task, loss))
            if paper and what == "psnr":
                body.append(["", "*paper*", *(f"*{p:.2f}*" for p in (*paper, *PAPER_1[task, "none"]))])
    return _table(["task", "training", *(TITLES[m] for m in COLUMNS)], body)


def baselines(records: Records) -> str:
    body = []
    for task in TASKS:
        start = next((r for r in records.all if r["config"]["task"] == task), None)
        if start:
            name = "zero-filled" if task == "mri" else "filtered back-projection"
            untrained = records.of(task, "deq-id", "ei")
            before = f"{untrained[0]['untrained']['psnr']['mean']:.2f} dB" if untrained else "–"
            psnr, ssim = start["psnr_start"]["mean"], start["ssim_start"]["mean"]
            body.append([task.upper(), name, f"{psnr:.2f} dB", f"{ssim:.3f}", before])
    return _table(["task", "linear reconstruction", "PSNR", "SSIM", "DEQ before training"], body)


def table_2(records: Records) -> str:
    r"""Equivariance of the pipeline."""
    body = []
    for task in TASKS:
        for method in ("deq-id", "unet"):
            cells = [records.text(task, method, loss, "pipeline_equivariance") for loss in EQUIVARIANT]
            body.append([task.upper(), TITLES[method], *cells, *(f"*{p:.2f}*" for p in PAPER_2[task, method])])
    header = ["task", "method", *(ROWS[loss] for loss in EQUIVARIANT), "*paper: EI*", "*supervised*"]
    return _table(header, body)


def table_3(records: Records) -> str:
    r"""Equivariance of the learned operator."""
    body = []
    for task in TASKS:
        cells = [records.text(task, "deq-id", loss, "iteration_equivariance") for loss in EQUIVARIANT]
        cells.append(records.text(task, "deq-id", "ei", "untrained/iteration_equivariance"))
        body.append([task.upper(), *cells, *(f"*{p:.2f}*" for p in PAPER_3[task])])
    header = ["task", *(ROWS[loss] for loss in EQUIVARIANT), "initialisation"]
    header += ["*paper: EI*", "*supervised*", "*initialisation*"]
    return _table(header, body)


def operators(scale: str) -> str:
    r"""Equivariance of F at true images beside how much it changes them, with every denoiser that cells were run with."""
    body = []
    folders = sorted(path.name for path in (run.RESULTS / scale).glob("*/"))
    for denoiser in ("", *folders):
        records = Records(scale, denoiser)
        for task in TASKS:
            for loss in ("", *ROWS):
                known = [r for r in records.of(task, "deq-id", loss or "sup") if "iteration_fidelity" in r]
                known = [r if loss else r["untrained"] for r in known]
                if known:
                    values = [
                        statistics.mean(_value(r, f"iteration_{what}") for r in known)
                        for what in ("equivariance", "fidelity")
                    ]
                    row = [task.upper(), denoiser or "of the tables", ROWS.get(loss, "none")]
                    body.append([*row, *(f"{v:.2f}" for v in values), f"{values[0] - values[1]:+.2f}"])
    header = ["task", "denoiser", "training of DEQ, ID", "TF(x) against F(Tx), dB", "F(x) against x, dB", "difference"]
    return _table(header, body) if body else ""


def objectives(records: Records) -> str:
    r"""What the equivariance term of EI says of the trained models, beside what is true."""
    body = []
    for task in TASKS:
        for loss in ROWS:
            known = [r for r in records.of(task, "deq-id", loss) if "ei_loss" in r]
            if known:
                term = statistics.mean(r["ei_loss"] for r in known)
                psnr = statistics.mean(_value(r, "psnr") for r in known)
                body.append([task.upper(), ROWS[loss], f"{term:.2e}", f"{psnr:.2f}"])
    return _table(["task", "training of DEQ, ID", "equivariance term on the test images", "PSNR in dB"], body)


def adjoints(scale: str) -> str:
    r"""What short trainings come to, on validation images, by the tolerance of the adjoint equation."""
    path = ex.HERE / "search" / scale / "adjoint.json"
    trials = json.loads(path.read_text()) if path.exists() else []
    body = [
        [
            t["task"].upper(),
            ROWS[t["loss"]],
            *(f"{t['trial'][k]:g}" for k in ("epochs", "lr", "backward_tol")),
            f"{t['psnr']:.2f}",
        ]
        for t in trials
    ]
    header = ["task", "training of DEQ, ID", "epochs", "learning rate", "tolerance of the adjoint", "PSNR in dB"]
    return _table(header, body) if body else ""


def claims(records: Records) -> str:
    r"""What the paper claims, and whether it holds here."""
    body: list[list[str]] = []

    def add(claim: str, values: dict[str, float | None], holds: Any, complete: bool = True) -> None:
        known = {k: v for k, v in values.items() if v is not None}
        if known:
            verdict = "holds" if all(holds(v) for v in known.values()) else "**does not hold everywhere**"
            missing = "" if complete and len(known) == len(values) else " (incomplete)"
            body.append([claim, ", ".join(f"{k} {v:+.2f} dB" for k, v in known.items()), verdict + missing])

    def gap(a: tuple[str, str, str], b: tuple[str, str, str], what: str = "psnr") -> float | None:
        first, second = records.mean(*a, what), records.mean(*b, what)
        return None if first is None or second is None else first - second

    cells = [(task, loss) for task in TASKS for loss in ("sup", "ei")]
    label = {(t, s): f"{t.upper()} {ROWS[s]}" for t, s in cells}
    against_jfb = {label[t, s]: gap((t, "deq-id", s), (t, "deq-jfb", s)) for t, s in cells}
    add("ID − JFB > 0", against_jfb, lambda v: v > 0)
    margins: dict[str, float | None] = {}
    complete = True
    for t, s in cells:
        rivals = [gap((t, "deq-id", s), (t, m, s)) for m in COLUMNS[2:-1]]
        rivals.append(gap((t, "deq-id", s), (t, "denoiser", "none")))
        known = [r for r in rivals if r is not None]
        complete &= len(known) == len(rivals)
        margins[label[t, s]] = min(known) if known else None
    add("DEQ − best of U-Net, unrolled, PnP/RED > 0", margins, lambda v: v > 0, complete)
    supervised = {t.upper(): gap((t, "deq-id", "sup"), (t, "deq-id", "ei")) for t in TASKS}
    add("supervised − EI ≤ 1.3", supervised, lambda v: v <= 1.3)
    blind = {t: [loss for loss in ROWS if loss != "sup" and records.of(t, "deq-id", loss)] for t in TASKS}
    best = {t: max(blind[t], key=lambda loss: records.mean(t, "deq-id", loss) or 0.0) for t in TASKS if blind[t]}
    closest = {f"{t.upper()} ({ROWS[best[t]]})": gap((t, "deq-id", "sup"), (t, "deq-id", best[t])) for t in best}
    add("supervised − best training without ground truth ≤ 1.3", closest, lambda v: v <= 1.3)
    add("supervised − best training without ground truth ≤ 0.5", closest, lambda v: v <= 0.5)
    better = {t.upper(): gap((t, "deq-id", "ei-fixed"), (t, "deq-id", "ei")) for t in TASKS}
    add("EI with fixed targets − EI > 0", better, lambda v: v > 0)
    turned = {"CT": gap(("ct", "deq-id", "ei-turned"), ("ct", "deq-id", "ei-fixed"))}
    add("EI with a turned operator − EI with fixed targets > 0", turned, lambda v: v > 0)
    hidden = {"CT": gap(("ct", "deq-id", "split"), ("ct", "deq-id", "ei"))}
    add("hidden views − EI > 0", hidden, lambda v: v > 0)
    sure = {"MRI": gap(("mri", "deq-id", "ei-sure"), ("mri", "deq-id", "ei"))}
    add("EI + SURE − EI > 0", sure, lambda v: v > 0)
    for what, number in (("pipeline_equivariance", "2"), ("iteration_equivariance", "3")):
        values = {t.upper(): gap((t, "deq-id", "ei"), (t, "deq-id", "sup"), what) for t in TASKS}
        add(f"Table {number}: EI − supervised > 0", values, lambda v: v > 0)
    return _table(["claim", "measured", ""], body)


def provenance(records: Records) -> str:
    r"""What was run where."""
    devices = sorted({r["device"] for r in records.all})
    versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records.all})
    seconds = [r["seconds"] for r in records.all]
    dates = sorted({r["date"] for r in records.all})
    return (
        f"{len(records.all)} of {len(run.matrix(records.scale))} cells, scale *{records.scale}*, on {'; '.join(devices)}; "
        f"{'; '.join(versions)}; {dates[0]} to {dates[-1]}; {max(seconds):.0f} s for the longest cell, "
        f"{sum(seconds) / 3600:.1f} hours in all."
    )


def summary(scale: str = "small") -> str:
    r"""Table 1 in short, for the README: DEQs with ID, against the best of the methods that are none."""
    records, body = Records(scale), []
    for task in TASKS:
        for loss in (loss for loss in ROWS if ONLY.get(loss, task) == task):
            rivals = [(records.mean(task, m, loss) or 0.0, m) for m in COLUMNS[2:-1] if records.of(task, m, loss)]
            value, best = max(rivals, default=(0.0, ""))
            rival = f"{value:.2f} ({TITLES[best]})" if best else "–"
            body.append([task.upper(), ROWS[loss], *(records.text(task, m, loss) for m in COLUMNS[:2]), rival])
    return _table(["PSNR in dB", "training", "DEQ, ID", "DEQ, JFB", "best U-Net or unrolled"], body)


def render() -> str:
    r"""All tables of all scales that have records."""
    blocks = []
    for scale in ex.SCALES:
        records = Records(scale)
        if not records.all:
            blocks.append(f"Nothing was run at scale *{scale}*.")
            continue
        blocks += [f"## Scale {scale}", provenance(records)]
        blocks += ["### Table 1: PSNR of the test images in dB", table_1(records)]
        blocks += ["SSIM of the same:", table_1(records, "ssim", 3), "Where the methods start:", baselines(records)]
        blocks += ["### Table 2: equivariance of the pipeline in dB", table_2(records)]
        blocks += ["### Table 3: equivariance of the operator F in dB", table_3(records)]
        if moved := operators(scale):
            blocks += ["### The operator F at true images: whether it is equivariant because it does nothing", moved]
        blocks += ["### Claims of the paper", claims(records)]
        blocks += ["### What EI minimises, and what it is for", objectives(records)]
        if adjoint := adjoints(scale):
            blocks += ["### How exactly the adjoint equation is solved, on validation images", adjoint]
    return "\n\n".join(blocks)


def _subplots(rows: int, columns: int, *, figsize: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=figsize, layout="constrained")


def _save(plot: Any, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=dpi)
    print(f"{path}", file=sys.stderr)


def figure(path: Path, scale: str, data: Path, slices: bool = False) -> None:
    r"""Fig. 1: reconstructions of DEQ and U-Net, supervised and not, of the first test image of each task.

    :param bool slices: take slices that other packages ship, and none of the data, which must not be passed on.
    """
    plot, axes = _subplots(2, 7, figsize=(14, 4.4))
    for line, name in zip(axes, ("ct", "mri"), strict=True):
        task = ex.make_task(name, scale, data)
        x, y = task.x[task.test][:1], task.y[task.test][:1]
        if slices:
            x = _shipped_slice(name, x)
            y = task.physics(x)
        images = {"ground truth": x, "FBP / zero-filled": ex.start(y, task.physics)}
        columns = {
            "DEQ, Sup.": ("deq-id", "sup"),
            "DEQ, EI": ("deq-id", "ei"),
            "DEQ, EI improved": ("deq-id", ex.BEST[name]),
            "U-Net, Sup.": ("unet", "sup"),
            "U-Net, EI": ("unet", "ei"),
        }
        for title, (method, loss) in columns.items():
            s = ex.settings_of(name, method, loss, scale, run.found_settings())
            model = ex.make_model(task, method, s, {"unet": run.weights_of(scale, name, "unet", data)})
            weights = run.folder_of(run.path_of(scale, name, method, loss, 0)) / "model.pt"
            if not weights.exists():
                sys.exit(f"error: no model {weights}: run that cell first (python examples/paper/run.py, --force).")
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            with torch.no_grad():
                images[title] = model.eval()(y, task.physics)
        psnr = ex.metrics(task)["psnr"]
        for axis, (title, image) in zip(line, images.items(), strict=True):
            shown = image[0].norm(dim=0) if image.shape[1] == 2 else image[0, 0]
            axis.imshow(shown.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set(title=title if name == "ct" else "", xticks=[], yticks=[])
            if title != "ground truth":
                axis.text(
                    0.97, 0.03, f"{psnr(image, x).item():.1f} dB", color="yellow", ha="right", transform=axis.transAxes
                )
    _save(plot, path, dpi=150)


def curves(path: Path, scale: str) -> None:
    r"""PSNR of the test images over training, from the records: whether a result is one of trainings that had ended."""
    records = Records(scale)
    plot, axes = _subplots(2, 2, figsize=(14, 8))
    for line, task in zip(axes, TASKS, strict=True):
        for axis, supervised in zip(line, (True, False), strict=True):
            for method in COLUMNS[:-1]:
                for loss in (loss for loss in ROWS if (loss == "sup") == supervised):
                    known = [r["curve"]["psnr"]["PSNR"] for r in records.of(task, method, loss)]
                    title = TITLES[method] if loss in ("sup", "ei") else f"{TITLES[method]}, {ROWS[loss]}"
                    for k, course in enumerate(known):
                        epochs = [(i + 1) / len(course) for i in range(len(course))]
                        style = "-" if method.startswith("deq") else "--"
                        color = f"C{COLUMNS.index(method)}" if loss in ("sup", "ei") else COLOURS[loss]
                        axis.plot(epochs, course, style, color=color, label=title if k == 0 else None)
            axis.set(title=f"{task.upper()}, {'supervised' if supervised else 'without ground truth'}")
            axis.set(xlabel="part of the training", ylabel="PSNR of the test images (dB)")
            if axis.lines:
                axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _save(plot, path, dpi=100)


def _shipped_slice(task: str, like: torch.Tensor) -> torch.Tensor:
    r"""An image that comes with pydicom or Matplotlib, of the size of the task's own."""
    size = like.shape[-1]
    if task == "ct":
        return ct_slice(size)
    magnitude = torch.nn.functional.interpolate(mr_slice(), size=(size, size), mode="area")
    return torch.cat([magnitude, torch.zeros_like(magnitude)], dim=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tables 1-3 and Figure 1 of the paper, from the records.")
    parser.add_argument(
        "--figure", type=Path, help="file for Figure 1; needs the images and the trained models in runs/"
    )
    parser.add_argument("--curves", type=Path, help="file for the PSNR of all cells over their training")
    parser.add_argument("--slices", action="store_true", help="of slices that pydicom and Matplotlib ship")
    parser.add_argument("--scale", default="small", help="of the figure")
    parser.add_argument("--data", type=Path, default=run.ROOT.parent / "shared" / "data", help="folder with the images")
    args = parser.parse_args()
    print(render())
    if args.figure:
        figure(args.figure, args.scale, args.data, args.slices)
    if args.curves:
        curves(args.curves, args.scale)
