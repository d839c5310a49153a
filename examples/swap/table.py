r"""
The table of the page "Swap it in"
==================================
"""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent / "record.json"


def render() -> str:
    r"""Markdown table of the record."""
    lines = [
        "| pipeline | lines changed | steps | linear | untrained | trained | deepinv's model |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(RECORD.read_text()).values():
        best = max(row["trained"], row["deepinv"])
        ours, theirs = (f"**{v:.1f}**" if v == best else f"{v:.1f}" for v in (row["trained"], row["deepinv"]))
        lines.append(
            f"| {row['pipeline']} | {row['lines']} | {row['steps']} | {row['linear']:.1f} | {row['untrained']:.1f} | {ours} | {theirs} |"
        )
    return "\n".join(lines)
