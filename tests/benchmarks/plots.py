r"""The plots of ``docs/cost.md`` and ``docs/faults.md``, from the committed records: ``python docs/fill_tables.py`` draws them.

By itself: ``python tests/benchmarks/plots.py FOLDER``.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # when this file runs by itself
from tests.benchmarks.names import NAMES, OURS  # noqa: E402

RECORDS = Path(__file__).parent / "records"
MARKERS = "osD^vPX*dh"
MEASURES = {  # what a part may measure: the label of its axis, and the goal
    "gradient error": ("relative error of the gradient", 1e-2),
    "error": ("relative distance to the fixed point", 1e-3),
    "residual": ("relative residual", 1e-4),
}


def draw(folder: Path) -> list[Path]:
    r"""Write all plots as SVG files, one a task: two fit beside each other on a desktop, and one is legible on a phone."""
    parts = json.loads((RECORDS / "cost-cpu.json").read_text())["parts"]
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"faults": faults(json.loads((RECORDS / "faults.json").read_text()))}
    for task in NAMES:
        figures[f"memory-{task}"] = memory(parts, task)
        figures[f"step-{task}"] = scatter(parts, "equal error", task, "EI step")
        figures[f"inference-{task}"] = scatter(parts, "inference", task, "reconstruction")
    return [save(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def save(figure: Any, path: Path) -> Path:
    r"""An SVG file that is the same for the same records."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    return path


def new(size: tuple[float, float], title: str) -> Any:
    r"""A figure without a window, and its axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    return figure, axis


def plain(axis: Any, which: str, values: list[float]) -> None:
    r"""A logarithmic axis with a few ticks in plain numbers, and with room around the values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = min(values), max(values)
    room = max((high / low) ** 0.12, (6 * low / high) ** 0.5, 1.3)
    getattr(axis, f"set_{which}lim")(low / room, high * room)
    line = getattr(axis, f"{which}axis")
    line.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
    line.set_minor_formatter(NullFormatter())
    line.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:,g}" if 1e-3 <= v < 1e6 else f"{v:.0e}".replace("e-0", "e-"))
    )


def colours(parts: dict[str, Any]) -> dict[str, str]:
    r"""Ours is blue. Every other method has a colour of its own, the same in all plots."""
    shown = [
        rows["rows"] for part, rows in parts.items() if part.split(",")[0] in ("memory", "equal error", "inference")
    ]
    methods = dict.fromkeys(row["method"] for rows in shown for row in rows if "method" in row)
    others = [method for method in methods if not method.startswith(OURS)]
    return {method: f"C{1 + others.index(method)}" if method in others else "C0" for method in methods}


def memory(parts: dict[str, Any], task: str) -> Any:
    r"""Logarithmic bars of peak memory."""
    rows = [row for row in parts["memory"]["rows"] if row["task"] == task]
    rows = [row for row in rows if row.get("what", "peers") == "peers"]
    colour, peaks = colours(parts), [row["MB"] for row in rows]
    figure, axis = new((5.4, 3), f"{NAMES[task]}: peak memory")
    bars = axis.barh([row["method"] for row in rows], peaks, color=[colour[row["method"]] for row in rows])
    axis.bar_label(bars, labels=[f"{peak:,.0f} MB" for peak in peaks], padding=3, fontsize="small")
    plain(axis, "x", [10 ** math.floor(math.log10(min(peaks))), 5 * max(peaks)])
    axis.set(xlabel="MB")
    axis.invert_yaxis()
    return figure


def scatter(parts: dict[str, Any], part: str, task: str, title: str) -> Any:
    r"""Error against seconds. A method that misses the goal at all tolerances is hollow."""
    rows, colour = parts[f"{part}, {task}"]["rows"], colours(parts)
    measure = next(measure for measure in MEASURES if measure in rows[0])
    label, goal = MEASURES[measure]
    goal = rows[0].get("goal", goal)
    figure, axis = new((5.4, 4.2), f"{NAMES[task]}: {title}")
    for k, row in enumerate(rows):
        mark = {"marker": MARKERS[k % len(MARKERS)], "mec": colour[row["method"]], "ms": 9, "mew": 1.8, "ls": ""}
        label_of = row["method"] + ("" if row["exact enough"] else " (missed)")
        face = colour[row["method"]] if row["exact enough"] else "none"
        axis.plot(row["seconds"], row[measure], mfc=face, label=label_of, **mark)
    axis.axhline(goal, color="0.4", ls="--", lw=1, label=f"goal: {goal:g}")
    plain(axis, "x", [row["seconds"] for row in rows])
    plain(axis, "y", [goal, *(row[measure] for row in rows)])
    axis.set(xlabel="seconds", ylabel=label)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def faults(counts: dict[str, int]) -> Any:
    r"""Logarithmic bars of how often every fault was tried."""
    figure, axis = new((5.4, 0.9 + 0.52 * len(counts)), "Number of tests per fault")
    names = [textwrap.fill(name, 34) for name in counts]
    bars = axis.barh(names, list(counts.values()), color="C0")
    axis.bar_label(bars, labels=[f"{count:,}" for count in counts.values()], padding=3, fontsize="small")
    plain(axis, "x", [1, 3 * max(counts.values())])
    axis.set_xlim(left=1)
    axis.set(xlabel="tests (logarithmic scale)")
    axis.tick_params(axis="y", labelsize="small")
    axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
