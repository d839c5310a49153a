r"""Peak memory of an EI step, measured in a separate process for every figure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepinv_deq import EquilibriumUNet
from tests.benchmarks import tasks
from tests.benchmarks.bench import Bench, parameters, say
from tests.benchmarks.live_bytes import LiveBytes
from tests.benchmarks.names import AN_IMAGE_AT_A_TIME, BATCH, OURS, WHOLE_BATCH
from tests.benchmarks.peers import METHODS, Settings, ours
from tests.benchmarks.tasks import ROOT, Task

CHUNKS = {WHOLE_BATCH: 4, AN_IMAGE_AT_A_TIME: 1}


def memory(bench: Bench) -> list[dict[str, Any]]:
    r"""Peak resident memory of two EI steps of batch 4 above what the task itself takes, and peak bytes of the tensors of a third."""
    return _cells(
        bench,
        [
            {"what": "peers", "task": name, "method": method, "iterations": 10, "passes": 2, "steps": 2, "batch": 4}
            for name in BATCH
            for method in (*METHODS, *CHUNKS)
        ],
    )


def memory_growth(bench: Bench) -> list[dict[str, Any]]:
    r"""Peak bytes of tensors in one step of ours, over the number of iterations and of passes.

    Resident memory of one cell differs from run to run by as much as is looked for. Beside it are the bytes of the loss
    alone, which holds some images per pass whatever the model.
    """
    one = {"task": "mri", "method": OURS, "iterations": 10, "passes": 1, "steps": 1, "batch": 2}
    cells = [{**one, "what": "iterations", "iterations": n} for n in (10, 30, 100)]
    cells += [{**one, "what": "iterations", "iterations": 100, "full": True}]
    return _cells(bench, cells + [{**one, "what": "passes", "passes": n} for n in (1, 2, 4)])


def _cells(bench: Bench, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Measure each in a process of its own."""
    rows = []
    for cell in cells:
        command = [sys.executable, "-m", "tests.benchmarks.cost", "--device", bench.device]
        command += [] if bench.data is None else ["--data", str(bench.data)]
        command += ["--memory-cell", json.dumps(cell)]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        say(f"  {rows[-1]}")
    return rows


def memory_cell(bench: Bench, cell: dict[str, Any]) -> dict[str, Any]:
    # untrained, since memory does not depend on the values of weights
    net = EquilibriumUNet({"ct": 1, "mri": 2}[cell["task"]], channels=(32, 64, 128))
    task = tasks.make(cell["task"], data=bench.data, batch=cell["batch"], net=net).to(bench.device)
    settings, size = Settings().exactly(cell["iterations"]), CHUNKS.get(cell["method"])
    model = ours(task, settings, chunk_size=size) if size else METHODS[cell["method"]](task, settings)
    if cell.get("full"):
        model.hook.solver = replace(model.hook.solver, history=cell["iterations"])
    if cell["what"] != "peers":
        return cell | {"MB": _live(task, model, cell["passes"]), "loss MB": _live(task, _adjoint(task), cell["passes"])}
    before = _resident(bench.device, reset=True)
    for _ in range(cell["steps"]):
        for p in parameters(task):
            p.grad = None
        task.loss(model, cell["passes"]).backward()
    resident = (_resident(bench.device) - before) / 1e6
    return cell | {"MB": resident, "tensor MB": _live(task, model, cell["passes"])}


def _live(task: Task, model: Callable[..., Tensor], passes: int) -> float:
    with LiveBytes() as tensors:
        task.loss(model, passes).backward()
    return tensors.peak / 1e6


def _adjoint(task: Task) -> Callable[..., Tensor]:
    r"""A model that keeps next to nothing: what a step takes with it is the loss's own."""
    weight = torch.ones((), device=task.y.device, requires_grad=True)
    return lambda y, physics: weight * physics.A_adjoint(y)


def _resident(device: str, reset: bool = False) -> int:
    r"""Largest memory so far, in bytes; of the process on CPU, of tensors on CUDA. ``reset`` forgets what was before."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
