r"""README, CONTRIBUTING and pages: tables from the records, code that runs, headings that are our messages, short sentences."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch

import deepinv_deq

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_records():
    check = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "fill_tables.py"), "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert check.returncode == 0, check.stderr


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:deepinv_deq|examples|docs|tests)/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    assert len(re.findall(r"^<!-- (?:demo|test) command -->$", text, flags=re.M)) == 2


def test_the_ten_lines_run(capsys):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- ten lines -->\n```python\n(.*?)```", text, flags=re.S)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        names: dict[str, object] = {}
        exec(code, names)
    finally:
        torch.set_rng_state(state)
    assert bool(names["model"].forward_stat.converged.all()) and bool(names["model"].hook.stat.converged.all())
    assert "of 1 samples reached the relative residual" in capsys.readouterr().out


def test_the_code_of_contributing_runs():
    from deepinv_deq.solvers import METHODS

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    names: dict[str, object] = {}
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        for code in blocks:
            exec(code, names)
    finally:
        torch.set_rng_state(state)
        METHODS.pop("aitken", None)
    assert len(blocks) == 2 and bool(names["stat"].converged.all()) and names["model"].forward_stat is not None


def test_headings_of_troubleshooting_are_texts_of_our_messages():
    sources = "\n".join(path.read_text() for path in (ROOT / "deepinv_deq").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?r?"', "", sources)  # strings that are written on several lines
    page = (ROOT / "docs" / "guide" / "troubleshooting.rst").read_text()
    headings = re.findall(r'^"(.*)"\n\^+$', page, flags=re.M)
    assert len(headings) >= 15
    assert not [text for text in headings if text not in joined]


def test_sentences_are_short():
    prose = runpy.run_path(str(ROOT / "docs" / "prose.py"))
    beyond = []
    for path in prose["pages"]():
        lengths = [len(prose["words"](sentence)) for sentence in prose["sentences"](prose["text_of"](path))]
        if lengths and (sum(lengths) > prose["MEAN"] * len(lengths) or max(lengths) > prose["LONGEST"]):
            beyond.append(str(path))
    assert not beyond


def test_sentences_are_counted():
    prose = runpy.run_path(str(ROOT / "docs" / "prose.py"))
    text = "Title\n=====\n\nOne two three. Four five six seven.\n\n- a :class:`~x.Y` here\n\n.. code-block:: python\n\n   not prose at all\n"
    assert [len(prose["words"](s)) for s in prose["sentences"](text)] == [3, 4, 3]
    assert prose["heading"](text) == "Title"


def test_version_and_address_have_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert '\nversion = "' not in project and 'attr = "deepinv_deq.__version__"' in project
    assert f"version: {deepinv_deq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    (address,) = re.findall(r'^Repository = "(.*)"$', project, flags=re.M)
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.rst"),
        *(ROOT / ".github").rglob("*.yml"),
    ]:
        assert address not in path.read_text(), path


def test_the_line_that_the_site_highlights_is_the_swapped_one():
    options = (ROOT / "docs" / "index.rst").read_text()
    start, end, number = (
        re.search(rf":{option}: (.*)", options)[1] for option in ("start-at", "end-before", "emphasize-lines")
    )
    readme = (ROOT / "README.md").read_text()
    lines = readme[readme.index(start) :].split(end)[0].splitlines()
    assert lines[int(number) - 1].endswith("# the swapped line")
