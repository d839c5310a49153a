r"""The README and the pages say what the records say, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
