r"""
What the command lines share
============================
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from data import DATA, SCALES, TASKS
from losses import LOSSES
from models import METHODS
from settings import check, check_name


def arguments(description: str, whole: str) -> argparse.ArgumentParser:
    r"""What every command takes that is about one cell, or about all (``whole``) of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--loss", help=", ".join(LOSSES))
    parser.add_argument("--scale", default="small", help=", ".join(SCALES))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--all", action="store_true", help=whole)
    parser.add_argument(
        "--jobs", type=int, default=1, help="with --all: how many at a time, one thread each if several"
    )
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    r"""The arguments, with the names checked; without ``--all`` they must say which cell."""
    args = parser.parse_args()
    if args.all:
        check_name("scale", args.scale, SCALES)
        return args
    missing = [f"--{name}" for name in ("task", "method", "loss") if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing (or give --all)")
    check(args.task, args.method, args.loss, args.scale)
    return args


def run_each(script: str, args: argparse.Namespace, cells: list[list[str]], common: list[str]) -> None:
    r"""Run a script for many cells, each in a process of its own; exits, with an error if one of them failed.

    :param list cells: arguments that tell the cells apart.
    :param list common: further arguments of all.
    """
    threads = {"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {}

    def one(cell: list[str]) -> bool:
        command = [sys.executable, script, *cell, "--scale", args.scale, "--data", str(args.data), *common]
        failed = subprocess.run(command, env=os.environ | threads).returncode != 0
        print(f"{' '.join(cell)}: {'failed' if failed else 'done'}", flush=True)
        return failed

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = sum(pool.map(one, cells))
    sys.exit(f"{failed} of {len(cells)} failed; the same command tries them again." if failed else 0)
