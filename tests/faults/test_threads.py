r"""Eight threads that share a model, for minutes: every reconstruction and gradient is that of one thread alone."""

from __future__ import annotations

import threading
import time

import torch

from tests.faults.common import SECONDS, THREADS, TRIED
from tests.problems import imaging


def test_eight_threads_share_a_model():
    model, first, x, _ = imaging(batch=2, tol=1e-10)
    parameters = list(model.parameters())
    weight = torch.randn(2, 1, 4, 4, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    physics = [first, *(imaging(seed=seed)[1] for seed in range(1, 8))]
    tasks = [(p, p.A((k + 1) * x)) for k, p in enumerate(physics)]

    def solve(task):
        operator, y = tasks[task]
        y = y.clone().requires_grad_()
        x_hat = model(y, operator)
        return x_hat.detach(), *torch.autograd.grad((weight * x_hat).sum(), [y, *parameters])

    alone = [solve(task) for task in range(len(tasks))]
    wrong, done, end = [], [0] * 8, time.monotonic() + SECONDS

    def work(thread):
        rng = torch.Generator().manual_seed(thread)
        try:
            while time.monotonic() < end and not wrong:
                task = int(torch.randint(len(tasks), (), generator=rng))
                if not all(torch.equal(a, b) for a, b in zip(solve(task), alone[task], strict=True)):
                    wrong.append((thread, task, done[thread]))
                done[thread] += 1
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and min(done) > 0
    TRIED[THREADS] += sum(done)
