r"""
The sparse-view CT runs of the README
=====================================

Trains the demo with exact implicit differentiation and with Jacobian-free backpropagation, with three seeds each, and
keeps the record of every run. A run that is on record is not repeated, an interrupted one is resumed.

.. code-block:: bash

    python examples/ct/records.py --data ../shared/data/ct100_128.npz      # some hours on one core, or
    python examples/ct/records.py --render                                 # the table from the records alone
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RECORDS = HERE / "records"
SETTINGS = {"size": 64, "views": 50, "epochs": 8, "batch-size": 4, "alpha": 100.0, "device": "cpu"}


def train(data: str, backward: str, seed: int) -> None:
    """Run one cell, on one thread, unless it is on record."""
    name = f"{backward}-{seed}"
    if (RECORDS / f"{name}.json").exists():
        return
    out = Path("runs") / "ct_records" / name
    settings = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(HERE / "demo_sparse_view_ct.py"), "--data", data, "--backward", backward]
    command += ["--seed", str(seed), "--out", str(out), "--resume", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    subprocess.run(command, check=True, env=environment)
    record = json.loads((out / "record.json").read_text()) | {"data": Path(data).name, "out": None}
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def row(seed: object, steps: object, psnr: list[float]) -> str:
    """One line of the table, from the PSNR of FBP, untrained DEQ, JFB and ID."""
    return f"| {seed} | {steps} | {' | '.join(f'{p:.2f} dB' for p in psnr)} | {psnr[3] - psnr[2]:+.2f} dB |"


def render() -> str:
    """Markdown table of the records."""
    rows = ["| seed | steps | FBP | DEQ, untrained | DEQ, JFB | DEQ, ID | ID − JFB |", "|---|---|---|---|---|---|---|"]
    cells = []
    for path in sorted(RECORDS.glob("implicit-*.json")):
        exact, jfb = (json.loads(p.read_text()) for p in (path, path.with_name(path.name.replace("implicit", "jfb"))))
        values = [exact["psnr_fbp"], exact["psnr_untrained"], jfb["psnr_deq"], exact["psnr_deq"]]
        cells.append([statistics.mean(v) for v in values])
        rows.append(row(exact["seed"], exact["steps"], cells[-1]))
    rows.append(row("mean", "", [statistics.mean(column) for column in zip(*cells, strict=True)]))
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="CT images, for missing records")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--render", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.render:
        if args.data is None:
            parser.error("--data is needed to train; use --render to print the table")
        cells = [(args.data, backward, seed) for seed in range(args.seeds) for backward in ("implicit", "jfb")]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda cell: train(*cell), cells))
    print(render())
