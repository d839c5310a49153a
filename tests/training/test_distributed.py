r"""Two processes on this machine: gradients are those of one, nobody waits for ever, deepinv's distributed parts fit in."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepinv_deq import DEGrad, DEProx
from tests.problems import imaging, relative_error
from tests.training.processes import DEADLINE, PARALLEL, gradient, process, reconstruct, stacked, tiles

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


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
