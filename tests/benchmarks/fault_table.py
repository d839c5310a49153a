r"""The table of ``docs/faults.md``: what the tests of faults tried, all of it survived.

``DEEPINV_DEQ_FAULTS=full python -m pytest tests/faults`` writes the record.
"""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent / "records" / "faults.json"


def render() -> str:
    r"""Markdown table of the record."""
    lines = ["| tried | times |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {count:,} |" for name, count in json.loads(RECORD.read_text()).items()])
