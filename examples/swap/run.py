r"""
Train the pipelines, and write the record
=========================================

``python examples/swap/run.py`` trains all of them, or those whose function is named. It takes a few minutes on one core.
``python docs/fill_tables.py`` then fills the page "Swap it in".
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from pipelines import PIPELINES
from training import measure

RECORD = Path(__file__).parent / "record.json"
STEPS = 48


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore", message=".*(meshgrid|non_blocking|Mask generator|progress bar).*")
    for title, function in PIPELINES.items():
        if names and function.__name__ not in names:
            continue
        row = {"pipeline": title} | measure(function, STEPS)
        print(row, flush=True)
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        known[function.__name__] = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        ordered = {f.__name__: known[f.__name__] for f in PIPELINES.values() if f.__name__ in known}
        RECORD.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
