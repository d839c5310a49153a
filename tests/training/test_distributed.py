r"""Two processes on this machine: gradients are those of one, nobody waits for ever, deepinv's distributed parts fit in."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import deepinv as dinv
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, FixedPointResidual, ModularIDHook, Solver
from deepinv_deq.training.step_guard import StepGuard
from tests.problems import F64, SmallDenoiser, imaging, relative_error

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepinv_deq"])  # imported once for both
    processes = [context.Process(target=process, args=(rank, str(folder)), daemon=True) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(DEADLINE)
        p.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def of(results, name):
    found = [r.get(name, "was never reached: the processes wait for each other") for r in results]
    for answer in found:
        assert not isinstance(answer, str), answer
    return found


# What they found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template,which", PARALLEL)
def test_data_parallel_gradients_are_those_of_the_joint_batch(results, template, which):
    model, physics, x, y = imaging(template, batch=4)
    exact = gradient(model, which, y, x, physics)
    for ours in of(results, f"data {template.__name__} {which}"):
        assert relative_error(ours, exact) <= 1e-8


def test_processes_whose_solves_stop_at_different_iterations(results):
    (early, *_), (late, *_) = of(results, "unequal")
    assert early == 1 and late > 20
    model, physics, x, y = imaging(batch=2)
    model(y, physics).square().sum().backward()
    exact = [p.grad / 2 for p in model.parameters()]  # the other half of the average is zero
    for _, products, ours, residual in of(results, "unequal"):
        assert relative_error(ours, exact) <= 1e-8 and residual.shape == (2,) and residual.max() <= 1e-12
    assert of(results, "unequal")[0][1] == 0 and of(results, "unequal")[1][1] > 5


def test_no_process_steps_where_one_diverged(results):
    for rank, rounds in enumerate(of(results, "one diverges")):
        (moved, skipped, messages), second = rounds
        assert not moved and skipped == 1
        expected = "the forward solve diverged" if rank == 1 else "another process met a divergence"
        assert len(messages) == 1 and expected in messages[0]
        assert second == (True, 1, [])  # and then training goes on


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_deepinvs_distributed_physics(results, template):
    x_hat, exact = reconstruct(template, *stacked())
    for ours, grads in of(results, f"physics {template.__name__}"):
        assert relative_error(ours, x_hat) <= 1e-9
        assert relative_error(grads, exact) <= 1e-8


def test_deepinvs_distributed_denoiser(results):
    from deepinv.distributed import DistributedContext

    with DistributedContext() as context:  # the same tiles, all in this process
        x_hat, exact = reconstruct(DEProx, *stacked(), tiles(context))
    for ours, grads in of(results, "denoiser"):
        assert relative_error(ours, x_hat) <= 1e-9
        assert relative_error(grads, exact) <= 1e-8
    for ours, errors in of(
        results, "unwrapped"
    ):  # it reconstructs, and does not train on parts of gradients in silence
        assert relative_error(ours, x_hat) <= 1e-2
        assert len(errors) == 1 and "SynchronisedDenoiser" in errors[0]


# The example ------------------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[2] / "examples" / "advanced" / "ddp_train.py"


def launch(*arguments, processes=None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, "-W", "ignore", *torchrun, str(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_checkpoint_of_two_processes_resumes_in_one(tmp_path):
    tiny = ["--size", 8, "--images", 4, "--batch-size", 4, "--out", tmp_path]
    first = launch(*tiny, "--epochs", 1, processes=2)
    assert re.fullmatch(r"epoch 1: loss \S+, residual \S+\n", first)  # from one of the two
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["world"] == 2 and saved["epoch"] == 0 and not any(k.startswith("module.") for k in saved["model"])
    second = launch(*tiny, "--epochs", 2, "--resume")
    assert "resumed after epoch 1 of a run with 2 process(es)" in second and "epoch 2: loss" in second
    resumed = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert resumed["world"] == 1 and resumed["epoch"] == 1 and not list(tmp_path.glob("*.part"))
    steps = {int(state["step"]) for state in resumed["optimizer"]["state"].values()}
    assert steps == {2}  # the optimiser's memory came along
    assert any(not torch.equal(saved["model"][k], v) for k, v in resumed["model"].items())
