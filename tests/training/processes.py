r"""What each of two processes computes for the tests of distributed training."""

from __future__ import annotations

import os
import traceback
import warnings
from datetime import timedelta

import deepinv as dinv
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, FixedPointResidual, ModularIDHook, Solver
from deepinv_deq.training.step_guard import StepGuard
from tests.problems import F64, SmallDenoiser, imaging

DEADLINE = 240  # seconds, for what takes a few: a deadlock must fail the test, not stop the machine
PARALLEL = [(DEProx, "sup"), (DEProx, "ei"), (DEGrad, "ei")]


# What the two processes do ----------------------------------------------------------------------------------------------


def losses(which, model, y, x, physics):
    x_hat = model(y, physics)
    if which == "sup":
        return (x_hat - x).square().mean()
    turned = torch.rot90(x_hat, 1, (-2, -1))  # eq. 9: a second pass through the model, before any backward one
    return (x_hat - x).square().mean() + (model(physics.A(turned), physics) - turned).square().mean()


def gradient(model, which, y, x, physics):
    model.zero_grad()
    losses(which, model, y, x, physics).backward()
    return [p.grad.clone() for p in model.parameters()]


def data_parallel(rank, template, which):
    model, physics, x, y = imaging(template, batch=4)
    rows = slice(2 * rank, 2 * rank + 2)
    return gradient(DistributedDataParallel(model), which, y[rows], x[rows], physics)


def unequal_solves(rank):
    model, physics, x, y = imaging(batch=2)
    if rank == 0:  # starts at its fixed point, and stops at once
        start = model(y, physics).detach()
    parallel = DistributedDataParallel(model)
    x_hat = parallel(y, physics, init=start) if rank == 0 else parallel(y, physics)
    evaluations = model.forward_stat.evaluations
    (0.0 * x_hat if rank == 0 else x_hat).square().sum().backward()  # nothing to solve for rank 0: a zero cotangent
    residual = FixedPointResidual()(x_hat, x, model=parallel)
    return evaluations, model.hook.stat.evaluations, [p.grad for p in model.parameters()], residual


def stacked():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(3):
        mask = (torch.rand(1, 8, 8, generator=generator) > 0.4).double()
        parts.append(dinv.physics.Inpainting((1, 8, 8), mask=mask))
    return dinv.physics.StackedLinearPhysics(parts), torch.rand(2, 1, 8, 8, generator=generator, dtype=F64)


def reconstruct(template, physics, x, denoiser=None):
    model = DEQReconstructor(
        template(denoiser or SmallDenoiser(), stepsize=0.3),
        solver=Solver("anderson", max_iter=300, tol=1e-12),
        hook=ModularIDHook(Solver("gmres", max_iter=200, tol=1e-12)),
    ).double()
    x_hat = model(physics.A(x), physics)
    (x_hat - x).square().mean().backward()
    return x_hat.detach(), [p.grad for p in model.parameters()]


def distributed_physics(rank, template):
    from deepinv.distributed import DistributedContext, distribute

    physics, x = stacked()
    with DistributedContext(cleanup=False, device_mode="cpu") as context:
        return reconstruct(template, distribute(physics, context, dtype=F64), x)


def tiles(context):
    from deepinv.distributed import distribute

    return distribute(SmallDenoiser().double(), context, type_object="denoiser", patch_size=4, overlap=2, dtype=F64)


def distributed_denoiser(rank):
    from deepinv.distributed import DistributedContext

    from deepinv_deq.distributed import SynchronisedDenoiser

    physics, x = stacked()
    with DistributedContext(cleanup=False, device_mode="cpu") as context:
        return reconstruct(DEProx, physics, x, SynchronisedDenoiser(tiles(context)))


def unwrapped_denoiser(rank):
    from deepinv.distributed import DistributedContext

    physics, x = stacked()
    with DistributedContext(cleanup=False, device_mode="cpu") as context:
        model = DEQReconstructor(DEProx(tiles(context), stepsize=0.3)).double()
        with torch.no_grad():
            x_hat = model(physics.A(x), physics)
        try:
            model(physics.A(x), physics)
        except TypeError as error:
            return x_hat, [str(error)]
    return x_hat, []


def one_diverges(rank):
    model, physics, _, y = imaging(batch=2)
    model.solver = Solver("fixed_point_iter", max_iter=8, tol=1e-8, on_failure="ignore")
    model.hook.solver = Solver("gmres", tol=1e-6, on_failure="ignore")
    if rank == 1:
        physics.matrix, model.solver = 10 * physics.matrix, Solver("fixed_point_iter", max_iter=1, on_failure="ignore")
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(parallel, 0.5, False, device="cpu", enabled=False)
    found = []
    for init in (None, torch.zeros(2, 1, 4, 4, dtype=F64)):
        before = [p.detach().clone() for p in model.parameters()]
        with guard.watching():
            parallel(y, physics, init=init).square().sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guard.step(optimizer)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        found.append((moved, guard.skipped, [str(w.message) for w in caught]))
        if rank == 1:
            physics.matrix, model.solver = physics.matrix / 10, Solver("anderson", tol=1e-6)
    return found


CHECKS = {
    **{f"data {t.__name__} {which}": (data_parallel, t, which) for t, which in PARALLEL},
    "unequal": (unequal_solves,),
    "one diverges": (one_diverges,),
    "unwrapped": (unwrapped_denoiser,),
    **{f"physics {t.__name__}": (distributed_physics, t) for t in (DEProx, DEGrad)},
    "denoiser": (distributed_denoiser,),
}


def process(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name, (check, *arguments) in CHECKS.items():
        try:
            results[name] = check(rank, *arguments)
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
