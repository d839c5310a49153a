r"""What a DEQ costs, next to its peers, with the error of the gradient beside every time.

.. code-block:: bash

    python -m tests.benchmarks.cost --data ../shared/data      # all of it, about three hours of one core
    python -m tests.benchmarks.cost --only sparse counts       # parts of it; the record keeps the others
    python docs/fill_tables.py                                 # the tables of docs/cost.md from the record

Prints what it measures and writes ``tests/benchmarks/records/cost-<device>.json``. Times are medians over rounds in which all
methods take turns. Every memory figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepinv as dinv
import torch

from tests.benchmarks.accelerator import accelerator, operations, tf32
from tests.benchmarks.bench import ROUNDS, Bench, say
from tests.benchmarks.error import equal_error, equal_iterations, inference
from tests.benchmarks.memory import memory, memory_cell, memory_growth
from tests.benchmarks.names import BATCH, measured
from tests.benchmarks.optimum import counts, other_solvers, over_the_limit
from tests.benchmarks.options import learned_start, options, warm_starts
from tests.benchmarks.penalty import penalty
from tests.benchmarks.threads import threads
from tests.benchmarks.times import data_parallel, overhead, scaling, sparse

RECORDS = Path(__file__).parent / "records"
PARTS: dict[str, Callable[[Bench], Any]] = {
    "sparse": sparse,
    "counts": counts,
    "memory": memory,
    "growth of memory": memory_growth,
    **{f"equal error, {n}": lambda bench, n=n: equal_error(bench, n) for n in BATCH},
    **{f"equal iterations, {n}": lambda bench, n=n: equal_iterations(bench, n) for n in BATCH},
    **{f"inference, {n}": lambda bench, n=n: inference(bench, n) for n in BATCH},
    **{f"over the limit, {n}": lambda bench, n=n: over_the_limit(bench, n) for n in BATCH},
    **{f"other solvers, {n}": lambda bench, n=n: other_solvers(bench, n) for n in BATCH},
    "overhead": overhead,
    "penalty": penalty,
    "scaling": scaling,
    "threads": threads,
    "data parallel": data_parallel,
    "learned start": learned_start,
    **{f"options, {n}": lambda bench, n=n: options(bench, n) for n in BATCH},
    "warm starts": warm_starts,
    "accelerator": accelerator,
    "operations": operations,
}


def machine(device: str) -> dict[str, Any]:
    r"""Where the record was made."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    versions = {
        "torch": torch.__version__,
        "deepinv": dinv.__version__,
        "torchdeq": importlib.metadata.version("torchdeq"),
    }
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": name, "threads": torch.get_num_threads(), "gpu": gpu, "versions": versions}


def main() -> None:
    r"""Measure, print, record."""
    parser = argparse.ArgumentParser(description="Cost of a DEQ step, next to its peers.")
    parser.add_argument("--data", type=Path, help="folder with the real images; default: phantoms")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", help=f"parts to measure, of: {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of which medians are taken")
    parser.add_argument(
        "--as-on-cpu",
        action="store_true",
        help="peers at the tolerances of the record of the CPU, which saves their search",
    )
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads((RECORDS / "cost-cpu.json").read_text())["parts"] if args.as_on_cpu else {}
    bench = Bench(args.data, args.device, args.rounds, known)
    if args.memory_cell:
        print(json.dumps(memory_cell(bench, json.loads(args.memory_cell))))
        return
    chosen = [p for o in args.only or [""] for p in PARTS if p.startswith(o)]
    for name in args.only or []:
        if not any(p.startswith(name) for p in PARTS):
            sys.exit(f"error: no part {name!r}: must be one of {', '.join(PARTS)}.")
    path = RECORDS / f"cost-{args.device}.json"
    for part in chosen:
        say(f"{part} ...")
        start = time.time()
        with tf32(False):  # fixed points of all methods are to 1e-3 and less of those in float64
            rows = PARTS[part](bench)
        record = json.loads(path.read_text()) if path.exists() else {"parts": {}}
        entry = {"rows": rows, "minutes": (time.time() - start) / 60, "date": time.strftime("%Y-%m-%d")}
        entry |= measured(part)
        entry |= {"data": args.data is not None, "load": os.getloadavg()[0], "machine": machine(args.device)}
        record["parts"][part] = entry
        RECORDS.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)


if __name__ == "__main__":
    main()
