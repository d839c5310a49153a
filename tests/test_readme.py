r"""The README and the pages say what the records say, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

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
