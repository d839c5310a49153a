r"""What the tests of faults share: how long they are, and what they count.

``DEEPINV_DEQ_FAULTS=full`` makes the long tests long, with 40 kills instead of 3 and a training of 10,000 steps, and writes the counts to
a record, which ``docs/faults.md`` shows.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings

FULL = os.environ.get("DEEPINV_DEQ_FAULTS") == "full"
KILLS, STEPS = (40, 600) if FULL else (3, 60)
EXAMPLES = 300 if FULL else 40
OutOfMemory = torch.cuda.OutOfMemoryError
RECORD = Path(__file__).parents[1] / "benchmarks" / "records" / "faults.json"
TRIED: Counter[str] = Counter()  # counted once nothing was found wrong
DIVERGENCES = "divergences of a solve, a gradient or a loss in the middle of a training"
DAMAGED = "checkpoints cut off, changed, forged or of another kind"
SOLVES, SECONDS = (5000, 300) if FULL else (200, 2)
SCALES = "solves at scales up to 1e±30 (float16: 1e±3), in six data types, compared with exact answers"
BITS = "single bits of files that were flipped, each detected or harmless"
FULL_DISKS = "trainings on a full disk, resumed bit-exactly"
THREADS = "reconstructions with gradients by 8 threads at once, within 5 minutes"
HOSTILE = "hostile files: forged entries, other formats, cut off, changed, views of 4 TiB"
MANY_STEPS = "training steps in resident memory that does not grow"
TINY = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
