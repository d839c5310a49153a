r"""The command line of the paper's experiments, run inside of a test."""

from __future__ import annotations

import sys

import run


def command(monkeypatch, lab, *args):
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--data", str(lab), "--device", "cpu", "--no-progress", "--defaults", *map(str, args)]
    )
    run.main()


def cell(task="ct", method="unet", loss="sup", *more):
    return ["--task", task, "--method", method, "--loss", loss, *more]
