r"""Runs that are killed at random resume bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.common import (
    KILLS,
    TRIED,
)
from tests.faults.runs import unique_folders


def checkpoints(folder):
    return list(Path(folder).rglob("ckp_*.pth.tar"))


def still_runs(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def killed_runs(folder: str, kills: int, seed: int) -> None:
    r"""Train in forked processes that are killed at random times and resumed; print how it went. For a process of its own."""
    from tests.problems import weights
    from tests.training.test_resuming import trainer

    unique_folders()
    torch.set_num_threads(1)
    rng, epochs, done, late, runs = random.Random(seed), 6, 0, 0, 0

    def train(where):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run = trainer(where, epochs, resume=True)
                run.train()
                torch.save((weights(run.model), run.loss_history), f"{where}.final")
                code = 0
            finally:
                os._exit(code)
        return child

    start = time.monotonic()
    assert os.waitpid(train(f"{folder}/whole"), 0)[1] == 0
    duration = time.monotonic() - start
    whole = torch.load(f"{folder}/whole.final", weights_only=True)
    while done < kills or runs == 0:
        where, finished = f"{folder}/{runs}", False
        while not finished:
            child = train(where)
            if done < kills:
                saved = len(checkpoints(where))
                while done % 2 == 0 and len(checkpoints(where)) == saved and still_runs(child):
                    time.sleep(0.005)  # every other kill is some time after a checkpoint, the others are at any time
                time.sleep(rng.uniform(0.0, 0.4) * duration)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            finished = not os.WIFSIGNALED(status)
            assert not finished or status == 0, status
            done += not finished
            late += not finished and len(checkpoints(where)) > 0
        weights_, history = torch.load(f"{where}.final", weights_only=True)
        assert torch.equal(weights_, whole[0]) and history == whole[1], f"run {runs} differs"
        runs += 1
    print(f"kills {done}, after a checkpoint {late}, runs {runs}, all equal")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")
def test_runs_that_are_killed_at_random_resume_bit_exactly(tmp_path):
    code = f"from tests.faults.test_kills import killed_runs; killed_runs({str(tmp_path)!r}, {KILLS}, 0)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    found = re.search(r"kills (\d+), after a checkpoint (\d+), runs \d+, all equal", run.stdout)
    assert found and int(found[1]) == KILLS and int(found[2]) > 0
    TRIED["trainings killed by SIGKILL, resumed bit-exactly"] += KILLS
