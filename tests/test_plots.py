r"""The plots of the pages Benchmarks and Robustness say what the records say."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import plots


@pytest.fixture
def parts():
    return json.loads((plots.RECORDS / "cost-cpu.json").read_text())["parts"]


@pytest.mark.parametrize("task", plots.NAMES)
@pytest.mark.parametrize("part", ["equal error", "inference"])
def test_error_against_seconds_with_misses_hollow(parts, part, task):
    rows = parts[f"{part}, {task}"]["rows"]
    measure = next(measure for measure in plots.MEASURES if measure in rows[0])
    height = rows[0].get("goal", plots.MEASURES[measure][1])
    rows[1]["exact enough"] = False
    (axis,) = plots.scatter(parts, part, task, "title").axes
    *lines, goal = axis.lines
    assert len(lines) == len(rows) and goal.get_ydata()[0] == height
    for line, row in zip(lines, rows, strict=True):
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (row["seconds"], row[measure])
        assert (line.get_markerfacecolor() == "none") == (not row["exact enough"])
    assert axis.get_xscale() == axis.get_yscale() == "log"
    low, high = axis.get_ylim()
    assert all(low < value < high for value in (height, *(row[measure] for row in rows)))


@pytest.mark.parametrize("task", plots.NAMES)
def test_bars_of_memory(parts, task):
    (axis,) = plots.memory(parts, task).axes
    rows = [row for row in parts["memory"]["rows"] if row["task"] == task]
    assert [bar.get_width() for bar in axis.patches] == [row["MB"] for row in rows]
    assert axis.get_xscale() == "log" and axis.get_xlim()[1] > 1.3 * max(row["MB"] for row in rows)  # room for labels


def test_files_are_the_same_for_the_same_records(tmp_path):
    first = [path.read_bytes() for path in plots.draw(tmp_path / "a")]
    second = [path.read_bytes() for path in plots.draw(tmp_path / "b")]
    assert first == second and max(map(len, first)) < 150_000
