r"""The plots of ``docs/cost.md`` and ``docs/faults.md``, from the committed records: ``python docs/fill_tables.py`` draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
TASKS = {"ct": "CT 128×128", "mri": "MRI 256×256"}
OURS = "deepinv-deq"
MARKERS = "osD^vPX*dh"


def draw(folder: Path) -> list[Path]:
    r"""Write all plots as SVG files."""
    parts = json.loads((RECORDS / "cost-cpu.json").read_text())["parts"]
    figures = {
        "cost_memory": memory(parts),
        "cost_step": scatter(parts, "equal error", "gradient error", "relative error of the gradient", 1e-2),
        "cost_inference": scatter(parts, "inference", "residual", "relative residual", 1e-4),
        "faults": faults(json.loads((RECORDS / "faults.json").read_text())),
    }
    return [save(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def save(figure: Any, path: Path) -> Path:
    r"""An SVG file that is the same for the same records."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    return path


def new(rows: int, columns: int, size: tuple[float, float]) -> Any:
    r"""A figure without a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def colours(methods: list[str]) -> dict[str, str]:
    r"""Ours is blue. Every other method has a colour of its own."""
    others = [method for method in methods if not method.startswith(OURS)]
    return {method: f"C{1 + others.index(method)}" if method in others else "C0" for method in methods}


def memory(parts: dict[str, Any]) -> Any:
    r"""Logarithmic bars of peak memory."""
    rows = [row for row in parts["memory"]["rows"] if row.get("what", "peers") == "peers"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colour = colours(methods)
    figure, axes = new(1, 2, (10, 3.2))
    for axis, (task, title) in zip(axes[0], TASKS.items(), strict=True):
        known = [row for row in rows if row["task"] == task]
        names = [row["method"] for row in known]
        bars = axis.barh(names, [row["MB"] for row in known], color=[colour[name] for name in names])
        axis.bar_label(bars, labels=[f"{row['MB']:.0f} MB" for row in known], padding=3, fontsize="small")
        axis.set(title=title, xscale="log", xlabel="peak memory of an EI step (MB)")
        axis.set_xlim(right=4 * max(row["MB"] for row in known))
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    axes[0, 1].set_yticklabels([])
    return figure


def scatter(parts: dict[str, Any], part: str, measure: str, label: str, goal: float) -> Any:
    r"""Error against seconds. A method that misses the goal at all tolerances is hollow."""
    rows = {task: parts[f"{part}, {task}"]["rows"] for task in TASKS if f"{part}, {task}" in parts}
    methods = list(dict.fromkeys(row["method"] for known in rows.values() for row in known))
    colour = colours(methods)
    figure, axes = new(1, 2, (10, 4))
    for axis, (task, title) in zip(axes[0], TASKS.items(), strict=True):
        for row in rows.get(task, []):
            method = row["method"]
            face = colour[method] if row["exact enough"] else "none"
            marker = MARKERS[methods.index(method) % len(MARKERS)]
            axis.plot(row["seconds"], row[measure], marker, mec=colour[method], mfc=face, ms=9, mew=1.8)
        axis.axhline(goal, color="0.5", ls="--", lw=1)
        axis.set(title=title, xscale="log", yscale="log", xlabel="seconds", ylabel=label)
        axis.grid(alpha=0.3)
    handles = []
    for k, method in enumerate(methods):
        handles += axes[0, 0].plot([], [], MARKERS[k % len(MARKERS)], color=colour[method], label=method)
    handles += axes[0, 0].plot([], [], "o", mfc="none", mec="0.3", label="hollow: goal missed")
    handles += axes[0, 0].plot([], [], "--", color="0.5", label=f"goal: {goal:g}")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def faults(counts: dict[str, int]) -> Any:
    r"""Logarithmic bars of how often every fault was tried."""
    figure, axes = new(1, 1, (9, 0.5 + 0.36 * len(counts)))
    axis = axes[0, 0]
    bars = axis.barh(list(counts), list(counts.values()), color="C0")
    axis.bar_label(bars, labels=[f"{count:,}" for count in counts.values()], padding=3, fontsize="small")
    axis.set(xscale="log", xlabel="times tried")
    axis.set_xlim(left=1, right=4 * max(counts.values()))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    return figure
