r"""What goes wrong is said, and leaves nothing behind: divergence, bad numbers, lack of memory, kills, broken files.

``DEEPINV_DEQ_FAULTS=full`` makes the long tests long, with 40 kills instead of 3 and a training of 10,000 steps, and writes down what was
tried and survived: ``docs/faults.md`` has it.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import deepinv as dinv
import numpy as np
import pytest
import torch
from deepinv.datasets import TensorDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from deepinv_deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEGrad,
    DEProx,
    DEQReconstructor,
    ModularIDHook,
    Solver,
)
from deepinv_deq.maps import as_map
from deepinv_deq.training import ResumableTrainer, latest_checkpoint
from tests.benchmarks.live_bytes import LiveBytes
from tests.problems import F64, SmallDenoiser, imaging, relative_error

FULL = os.environ.get("DEEPINV_DEQ_FAULTS") == "full"
KILLS, STEPS = (40, 600) if FULL else (3, 60)
EXAMPLES = 300 if FULL else 40
OutOfMemory = torch.cuda.OutOfMemoryError
RECORD = Path(__file__).parent / "benchmarks" / "records" / "faults.json"
TRIED: Counter[str] = Counter()  # counted once nothing was found wrong
DIVERGENCES = "divergences of a solve, a gradient or a loss in the middle of a training"
DAMAGED = "checkpoints cut off, changed, forged or of another kind"
MANY_STEPS = "training steps in resident memory that does not grow"
TINY = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", autouse=True)
def _record(request):
    r"""Writes down what was tried, if all of these tests ran and none failed: a part of them must not replace the record of all."""
    TRIED.clear()
    yield
    config = request.config
    some = config.getoption("keyword") or any("::" in name for name in config.args)
    if FULL and not some and not request.session.testsfailed:
        RECORD.write_text(json.dumps(TRIED, indent=1) + "\n")


# Any problem, any settings -----------------------------------------------------------------------------------------------


def random_map(rng, batch, shape, gain, kind, dtype):
    r"""Samples of their own: affine, saturating, or wild where they are large. ``gain`` above 1 expands."""
    n = max(1, int(np.prod(shape)))
    w = torch.randn(n, n, generator=rng, dtype=F64)
    w = (gain * w / torch.linalg.matrix_norm(w, 2)).to(dtype)
    c = torch.randn(batch, n, generator=rng, dtype=F64).to(dtype)

    def select(rows):
        def f(x):
            z = x.reshape(len(x), n) @ w.T + c[rows]
            z = z if kind == "affine" else z.tanh() if kind == "tanh" else z * z
            return z.reshape(x.shape)

        return f

    return select


def relative_residual(f, x):
    r"""What a tolerance bounds: the step in natural units, relative to the point; 1 at zero."""
    f = as_map(f)
    change = f.step(x)
    change = change if f.natural(x) is None else f.natural(x)(change)
    gap, size = ((t.double().reshape(len(x), -1)).norm(dim=1) for t in (change, x))
    return torch.where(gap == 0, gap, torch.where(size == 0, 1.0, gap / size))


PROBLEMS = {
    "seed": st.integers(0, 10**6),
    "batch": st.integers(1, 4),
    "shape": st.sampled_from([(), (1,), (5,), (2, 3), (1, 4, 4)]),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "gain": st.sampled_from([0.0, 0.5, 0.95, 1.5, 30.0]),
    "kind": st.sampled_from(["affine", "tanh", "square"]),
    "exponent": st.integers(-6, 6),
}
SETTINGS = {
    "method": st.sampled_from(["anderson", "broyden", "fixed_point_iter", "gmres"]),
    "max_iter": st.integers(1, 60),
    "tol": st.sampled_from([1e-8, 1e-5, 1e-2]),
    "history": st.sampled_from([None, 1, 2, 7]),
    "damping": st.sampled_from([0.3, 1.0]),
    "sync_every": st.sampled_from([None, 3]),
}


@TINY
@given(**PROBLEMS, **SETTINGS)
def test_a_solve_is_finite_and_its_statistic_true(seed, batch, shape, dtype, gain, kind, exponent, **options):
    rng = torch.Generator().manual_seed(seed)
    unit = 10.0**exponent
    f = random_map(rng, batch, shape or (1,), gain, kind, dtype)(slice(None))
    g = lambda x: unit * f(x / unit)  # noqa: E731
    x0 = unit * torch.randn(batch, *(shape or (1,)), generator=rng, dtype=F64).to(dtype)
    solver = Solver(**options, on_failure="ignore")
    x, stat = solver(g, x0)
    assert x.shape == x0.shape and x.dtype == dtype and bool(x.isfinite().all())
    assert 1 <= stat.evaluations <= options["max_iter"] + (options["method"] == "gmres")
    measured = relative_residual(g, x)
    floor = 50 * torch.finfo(dtype).eps
    small = (measured <= max(1.01 * options["tol"], floor)) | (relative_gap(g, x, x0) <= floor)
    assert bool(small[stat.converged].all()), (measured, stat.outcome)
    # where it failed it says by how much, and the number is that of the point it returned
    failed = ~stat.converged & stat.residual.isfinite()
    torch.testing.assert_close(stat.residual[failed].double(), measured[failed], rtol=0.01, atol=floor)
    assert bool((stat.residual[failed] > options["tol"]).all())
    TRIED["solves of random maps with random settings"] += 1


def relative_gap(f, x, x0):
    r"""``‖f(x) - x‖ / ‖f(x0)‖``: all that can be asked of a fixed point at zero."""
    gap, size = ((t.double().reshape(len(x), -1)).norm(dim=1) for t in (f(x) - x, f(x0)))
    return torch.where(gap == 0, gap, gap / size)


@TINY
@given(
    **(PROBLEMS | {"dtype": st.just(F64), "batch": st.integers(2, 4), "kind": st.sampled_from(["affine", "tanh"])}),
    **SETTINGS,
)
def test_a_sample_does_not_depend_on_its_batch_mates(seed, batch, shape, dtype, gain, kind, exponent, **options):
    rng = torch.Generator().manual_seed(seed)
    select = random_map(rng, batch, shape or (1,), gain, kind, dtype)
    x0 = torch.randn(batch, *(shape or (1,)), generator=rng, dtype=F64)
    solver = Solver(**options, on_failure="ignore")
    x, stat = solver(select(slice(None)), x0)
    for i in range(batch):
        one, alone = solver(select(slice(i, i + 1)), x0[i : i + 1])
        if not bool(alone.converged) or not bool(
            stat.converged[i]
        ):  # rounding is all that differs, and chaos enlarges it
            assert (
                bool(alone.converged) == bool(stat.converged[i])
                or min(float(alone.residual), float(stat.residual[i])) >= 0.1 * options["tol"]
            )
            continue
        error = (one[0] - x[i]).norm() / one.norm().clamp_min(1e-300)
        slack = 1e-6 if gain < 1 else 1e-3
        assert error <= slack or gain > 1 and kind == "tanh", (error, stat.outcome, alone.outcome)
        assert abs(float(stat["nstep"][i]) - float(alone["nstep"][0])) <= (0 if gain < 1 else 8)
    TRIED["batches whose samples were also solved alone"] += 1


@TINY
@given(
    template=st.sampled_from([DEProx, DEGrad]),
    dtype=st.sampled_from([torch.float32, F64]),
    side=st.sampled_from([4, 6]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-5, 5),
    stepsize=st.sampled_from([0.1, 0.5, 1.0, 5.0]),
    scale=st.sampled_from([0.1, 0.4, 1.5]),
    method=st.sampled_from(["anderson", "broyden", "fixed_point_iter"]),
    tol=st.sampled_from([1e-5, 1e-3]),
)
def test_a_reconstruction_and_its_gradient_are_sound_or_said_not_to_be(
    template, dtype, side, batch, seed, exponent, stepsize, scale, method, tol
):
    _, physics, x, y = imaging(side=side, batch=batch, dtype=dtype, seed=seed)
    y = y * 10.0**exponent
    model = DEQReconstructor(
        template(SmallDenoiser(scale, seed), stepsize=stepsize),
        solver=Solver(method, max_iter=40, tol=tol, on_failure="ignore"),
        hook=ModularIDHook(Solver("gmres", max_iter=40, tol=tol, on_failure="ignore")),
    ).to(dtype)
    x_hat = model(y, physics)
    stat = model.forward_stat
    assert bool(x_hat.isfinite().all())
    measured = relative_residual(model.iteration.bind(y, physics), x_hat.detach())
    assert bool((measured <= max(1.01 * tol, 100 * torch.finfo(dtype).eps))[stat.converged].all()), stat.outcome
    x_hat.square().sum().backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert finite or not bool(model.hook.stat.converged.all())
    if batch > 1 and bool(stat.converged.all()) and scale < 1:  # and the batch has nothing to do with it
        alone = model(y[-1:], physics)
        bound = 1e-4 if dtype == torch.float32 else 1e-9
        assert relative_error(alone, x_hat[-1:]) <= bound and bool(model.forward_stat.converged)
    TRIED["reconstructions with their gradients, with random settings"] += 1


# Numbers that are none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where,value",  # an infinite weight is none of them: tanh makes a finite map of it
    [("weight", torch.nan), *((where, v) for where in ("stepsize", "physics", "init") for v in (torch.nan, torch.inf))],
)
def test_what_is_not_finite_is_said_and_spoils_only_its_sample(where, value):
    model, physics, _, y = imaging(batch=2, tol=1e-8)
    init = None
    good = model(y, physics).detach()
    with torch.no_grad():
        if where == "weight":
            model.iteration.denoiser.conv.weight[0, 0, 1, 1] = value
        elif where == "stepsize":
            model.iteration.stepsize.fill_(value)
        elif where == "physics":
            physics.matrix = physics.matrix.clone()
            physics.matrix[0, 0] = value
        else:
            init = good.clone()
            init[0, 0, 0, 0] = value
    with pytest.warns(ConvergenceWarning, match="NaN or Inf: check weights, input and loss"):
        x_hat = model(y, physics, init=init)
    stat = model.forward_stat
    assert not bool(stat.converged[0]) and bool(stat.residual[0].isinf()) and "of 2 samples" in stat.outcome
    if where == "init":  # the other sample has nothing to do with it
        assert bool(stat.converged[1]) and relative_error(x_hat[1], good[1]) < 1e-6
    if where in ("weight", "stepsize"):
        assert bool(x_hat.isfinite().all())  # the best that was there: the start
        with pytest.warns(ConvergenceWarning):
            x_hat.sum().backward()
        assert not all(bool(p.grad.isfinite().all()) for p in model.parameters())  # no finite gradient out of nothing
    model.solver = Solver("anderson", on_failure="raise")
    with pytest.raises(ConvergenceError, match="NaN or Inf"):
        model(y, physics, init=init)
    TRIED["NaN and Inf in weights, stepsize, physics or start"] += 1


# Divergence in training --------------------------------------------------------------------------------------------------


class Amplify(torch.autograd.Function):
    r"""Identity with a wrong and large derivative, which no few products can invert."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1e3 * g.roll((1, 2), (-1, -2))


class Faulty(SmallDenoiser):
    fault = None

    def forward(self, x):
        out = super().forward(x)
        if self.fault == "expands":
            return 50 * out
        if self.fault == "nan":
            return out * torch.nan
        if self.fault == "nan gradient":
            return out + (0 * x).sqrt()
        if self.fault == "no adjoint":
            return Amplify.apply(out)
        return out


class NaNLoss(dinv.loss.SupLoss):
    bad = False

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (torch.nan if self.bad else 1.0)


class TwoPasses(dinv.loss.Loss):
    r"""Its second pass through the model is always sound."""

    def forward(self, x, x_net, y, physics, model, **_):
        model.iteration.denoiser.fault = None
        return (model(y.flip(0), physics).flip(0) - x).square().mean(dim=(1, 2, 3)) + (x_net - x).square().mean()


BAD_STEP = 3


def faulty_run(folder=None, fault=None, skip=None, epochs=3, losses=None, dtype=F64, **kwargs):
    r"""Two steps per epoch; ``fault`` strikes in the third, ``skip`` leaves it out. Returns trainer and weights per step."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    _, physics, x, y = imaging(batch=4, dtype=dtype)
    loose = {"tol": 1e-6 if dtype == F64 else 1e-2, "on_failure": "ignore"}
    model = DEQReconstructor(
        DEProx(Faulty(), stepsize=0.5),
        solver=Solver("fixed_point_iter", max_iter=40, **loose),
        hook=ModularIDHook(Solver("gmres", max_iter=6, **loose)),
    ).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(x=x, y=y, use_dict_output=True), 2)
    trainer = ResumableTrainer(
        model, physics, optimizer, loader, epochs=epochs, losses=losses or NaNLoss(), metrics=None, device="cpu",
        save_path=folder, verbose=False, **kwargs,
    )  # fmt: skip
    get_samples, step, weights, steps = trainer.get_samples, optimizer.step, [], [0]

    def get(*args):
        weights.append(flat(model))
        steps[0] += 1
        now = steps[0] == BAD_STEP
        model.iteration.denoiser.fault = fault if now else None
        if isinstance(trainer.losses[0], NaNLoss):
            trainer.losses[0].bad = now and fault == "loss"
        return get_samples(*args)

    trainer.get_samples = get
    if skip:
        optimizer.step = lambda *a, **k: None if steps[0] == BAD_STEP else step(*a, **k)
    return trainer, weights


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FAULTS = ["expands", "nan", "nan gradient", "no adjoint", "loss"]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_after_a_divergence_is_skipped_and_training_goes_on(fault, together):
    trainer, weights = faulty_run(fault=fault, on_divergence="skip", optimizer_step_multi_dataset=together)
    cause = {"expands": "forward solve diverged", "nan": "forward solve", "no adjoint": "backward solve diverged"}
    with pytest.warns(ConvergenceWarning, match=cause.get(fault, "the gradient is NaN or Inf|backward solve")):
        trainer.train()
    assert trainer.skipped_steps == 1
    assert torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    moved = [not torch.equal(a, b) for a, b in pairwise([*weights[BAD_STEP:], flat(trainer.model)])]
    assert moved == [True] * 3
    reference, _ = faulty_run(skip=True, optimizer_step_multi_dataset=together)
    reference.train()
    assert torch.equal(flat(trainer.model), flat(reference.model))  # as if the batch had not been there
    TRIED[DIVERGENCES] += 1


def test_without_being_asked_a_trainer_steps_as_deepinvs_does():
    trainer, _ = faulty_run(fault="loss")
    trainer.train()
    assert not flat(trainer.model).isfinite().all() and trainer.skipped_steps == 0


def test_a_divergence_in_the_first_of_two_passes_is_seen():
    trainer, weights = faulty_run(fault="expands", losses=[TwoPasses()], on_divergence="skip")
    with pytest.warns(ConvergenceWarning, match="forward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    trainer, weights = faulty_run(fault="no adjoint", losses=[TwoPasses()], on_divergence="skip")
    model = trainer.model  # this fault is in the backward pass, when the denoiser is sound again: bring it back there
    model.register_forward_hook(lambda m, i, out: keep_fault(m, out) if out.requires_grad else None)
    with pytest.warns(ConvergenceWarning, match="backward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    TRIED[DIVERGENCES] += 2


def keep_fault(model, x_hat):
    denoiser, fault = model.iteration.denoiser, model.iteration.denoiser.fault
    x_hat.register_hook(lambda _: setattr(denoiser, "fault", fault))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_divergence_can_end_the_training_and_a_resumed_run_knows_nothing_of_it(fault, tmp_path, monkeypatch):
    unique_folders(monkeypatch)
    trainer, weights = faulty_run(tmp_path / "a", fault, on_divergence="raise", ckp_interval=1)
    with pytest.raises(ConvergenceError, match="No optimiser step: .*Lower the learning rate"):
        trainer.train()
    assert torch.equal(weights[BAD_STEP - 1], flat(trainer.model)) and len(weights) == BAD_STEP
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    TRIED[DIVERGENCES] += 1


def test_weights_that_are_broken_already_end_the_training():
    trainer, _ = faulty_run(on_divergence="skip")
    with torch.no_grad():
        trainer.model.iteration.denoiser.conv.bias.fill_(torch.nan)
    with pytest.raises(ConvergenceError, match="weights are NaN or Inf already"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:Trainer running with AMP")
@pytest.mark.parametrize("clip", [{}, {"grad_clip": 1.0}])
def test_the_scale_of_half_precision_is_not_touched_by_a_divergence(clip):
    trainer, weights = faulty_run(
        fault="expands", dtype=torch.float32, mixed_precision="fp16", on_divergence="skip", **clip
    )
    with pytest.warns(ConvergenceWarning, match="forward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    assert not torch.equal(weights[BAD_STEP], flat(trainer.model))
    TRIED[DIVERGENCES] += 1


@pytest.mark.filterwarnings("ignore:Trainer running with AMP")
def test_an_overflow_of_the_scaled_loss_is_no_divergence():
    class Large(NaNLoss):
        def forward(self, *args, **kwargs):
            return 1e4 * super().forward(*args, **kwargs)

    trainer, weights = faulty_run(
        losses=[Large()], dtype=torch.float32, mixed_precision="fp16", on_divergence="raise", epochs=10
    )
    trainer.train()  # the scaler lowers its scale until it fits
    assert 1 < trainer.scaler.get_scale() < 2**16 and torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], flat(trainer.model)) and flat(trainer.model).isfinite().all()


def test_bad_settings():
    with pytest.raises(ValueError, match="on_divergence must be one of ignore, skip, raise, got 'stop'"):
        faulty_run(on_divergence="stop")


# Lack of memory ----------------------------------------------------------------------------------------------------------


class Starved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, owner):
        ctx.owner = owner
        owner.count("forward")
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.owner.count("backward")
        return g, None


class Hungry(nn.Module):
    r"""A denoiser with normalised weights that runs out of memory in a given evaluation, forward or backward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
        type(self).seen = {
            "forward": 0,
            "backward": 0,
        }  # of the class: what an evaluation stores on a module stays on a replica
        self.limit = None

    def count(self, which):
        self.seen[which] += 1
        if self.limit == (which, self.seen[which]):
            raise OutOfMemory("simulated")

    def forward(self, x):
        return 0.5 * torch.tanh(self.conv(Starved.apply(x, self)))


def starving(**solver):
    torch.manual_seed(0)
    _, physics, _, y = imaging(batch=2)
    model = DEQReconstructor(
        DEGrad(Hungry(), stepsize=0.5),
        solver=Solver("anderson", tol=1e-4, **solver),
        hook=ModularIDHook(Solver("gmres", tol=1e-4, **solver)),
    ).double()
    return model, physics, y


def one_step(model, physics, y):
    for p in model.parameters():
        p.grad = None
    model(y, physics).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("which,chunk_size", [("forward", None), ("forward", 1), ("backward", 1)])
def test_a_model_that_ran_out_of_memory_works_as_before(which, chunk_size):
    model, physics, y = starving(chunk_size=chunk_size)
    net = model.iteration.denoiser
    expected = one_step(model, physics, y)
    calls, evaluations = net.seen[which], model.forward_stat.evaluations
    assert calls > 6
    for k in (1, 2, calls):
        model, physics, y = starving(chunk_size=chunk_size)  # nothing learned yet about the map
        net = model.iteration.denoiser
        net.limit = (which, k)
        gc.collect()
        with LiveBytes() as memory:
            with pytest.raises(OutOfMemory, match="simulated"):
                one_step(model, physics, y)
            for p in model.parameters():
                p.grad = None
            gc.collect()
        statistics = [s for s in (model.forward_stat, model.hook.stat) if s is not None]
        known = sum(t.nbytes for s in statistics for t in s.values() if torch.is_tensor(t))
        # PyTorch may keep two tensors of the pass that failed until the next one fails; a solve has dozens
        assert memory.now <= known + 2 * 2 * 16 * 8
        assert all("forward" not in m.__dict__ for m in model.modules())
        net.limit = None
        again = one_step(model, physics, y)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        assert model.forward_stat.evaluations == evaluations  # the same chunks: nothing false was learned on the way
        TRIED["passes that ran out of memory"] += 1


def test_lack_of_memory_for_the_measurements_is_not_called_a_misfit():
    model, physics, y = starving()

    def fail(y, **_):
        raise OutOfMemory("simulated")

    physics.A_adjoint = fail
    with pytest.raises(OutOfMemory, match="simulated"):
        model(y, physics)


# Kills -------------------------------------------------------------------------------------------------------------------


def unique_folders(monkeypatch=None):
    r"""deepinv names the folder of a run by the second, and these are started faster."""
    module = importlib.import_module("deepinv.training.trainer")
    stamp = lambda: str(time.time_ns())  # noqa: E731
    monkeypatch.setattr(module, "get_timestamp", stamp) if monkeypatch else setattr(module, "get_timestamp", stamp)


def checkpoints(folder):
    return list(Path(folder).rglob("ckp_*.pth.tar"))


def still_runs(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def killed_runs(folder: str, kills: int, seed: int) -> None:
    r"""Train in forked processes that are killed at random times and resumed; print how it went. For a process of its own."""
    from tests.training.test_resuming import trainer, weights

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
    code = f"from tests.test_faults import killed_runs; killed_runs({str(tmp_path)!r}, {KILLS}, 0)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    found = re.search(r"kills (\d+), after a checkpoint (\d+), runs \d+, all equal", run.stdout)
    assert found and int(found[1]) == KILLS and int(found[2]) > 0
    TRIED["trainings killed by SIGKILL, resumed bit-exactly"] += KILLS


# Broken and forged files -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    unique_folders(monkeypatch)
    trainer, _ = faulty_run(tmp_path / "run", epochs=2)
    trainer.train()
    return Path(latest_checkpoint(tmp_path / "run"))


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fresh(path, **kwargs):
    trainer, _ = faulty_run(ckpt_pretrained=str(path), **kwargs)
    trainer.setup_train()
    return trainer


def test_a_truncated_checkpoint_is_refused(checkpoint):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    for length in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))]:
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no checkpoint that can be trusted: it was cut off or changed"):
            fresh(checkpoint)
        TRIED[DAMAGED] += 1


def test_a_changed_byte_is_noticed(checkpoint):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    content = torch.load(checkpoint, weights_only=True)
    with zipfile.ZipFile(checkpoint) as archive:
        records = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size >= 8]
    name = len(records[0].filename)
    inside = [i.header_offset + 30 + name + 64 + i.file_size // 2 for i in records if i.file_size > 1000]
    refused = 0
    for position in inside + [rng.randrange(len(whole)) for _ in range(40)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        checkpoint.write_bytes(changed)
        try:
            fresh(checkpoint)
        except ValueError as error:
            assert "can be trusted" in str(error)
            refused += 1
        else:  # a byte that means nothing, such as the date of a record
            assert same(torch.load(checkpoint, weights_only=True), content)
            assert position not in inside
        TRIED[DAMAGED] += 1
    assert refused > 20


class Forged:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(checkpoint, tmp_path, legacy):
    content = torch.load(checkpoint, weights_only=True)
    trace = tmp_path / "trace"
    content["config"] = Forged(f"touch {trace}")
    torch.save(content, checkpoint, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="more in it than tensors and plain values"):
        fresh(checkpoint)
    with pytest.warns(UserWarning, match="Passing over the broken checkpoint"):
        assert latest_checkpoint(tmp_path / "run") != str(checkpoint)
    buffer = io.BytesIO()
    pickle.dump(Forged(f"touch {trace}"), buffer)
    checkpoint.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="can be trusted"):
        fresh(checkpoint)
    assert not trace.exists()
    TRIED[DAMAGED] += 2


def test_other_files_are_no_checkpoints(checkpoint, tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "dict.pt")
    for name in ("list.pt", "dict.pt"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of a Trainer: it has no state_dict"):
            fresh(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fresh(tmp_path / "nowhere.pt")
    content = torch.load(checkpoint, weights_only=True)
    del content["rng"]  # as deepinv's own Trainer writes it
    torch.save(content, checkpoint)
    assert fresh(checkpoint).epoch_start == 2
    trainer, _ = faulty_run(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="was not saved by a ResumableTrainer.*ckpt_pretrained"):
        trainer.train()


# Memory over many steps --------------------------------------------------------------------------------------------------


def training_steps(steps):
    r"""Steps of equivariant imaging with a physics of its own for each: what is remembered of one must not pile up."""
    torch.manual_seed(0)
    model = DEQReconstructor(
        DEProx(SmallDenoiser(), stepsize=0.5),
        solver=Solver("anderson", max_iter=20, tol=1e-2),
        hook=ModularIDHook(Solver("gmres", max_iter=20, tol=1e-2)),
        warm_starts=4,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.rand(8, 1, 4, 4)
    for step in range(steps):
        physics = dinv.physics.Inpainting((1, 4, 4), mask=(torch.rand(1, 4, 4) > 0.2).float())
        x = images[step % 8 : step % 8 + 1]
        x_hat = model(physics.A(x), physics)
        turned = torch.rot90(x_hat, 1, (-2, -1))
        loss = (x_hat - x).square().mean() + (model(physics.A(turned), physics) - turned).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del physics, x, x_hat, turned, loss
        yield step + 1


def test_memory_does_not_grow_over_many_steps():
    settle, held, objects = min(STEPS // 2, 200), [], []
    with LiveBytes() as memory:
        for done in training_steps(STEPS):
            if done in (settle, STEPS):
                gc.collect()
                held.append(memory.now)
                objects.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert held[1] <= held[0] + 1024, held  # warm starts and caches are full since long
    assert objects[1] <= objects[0] + 8, objects


def resident_bytes_over(steps):
    r"""Print the resident bytes after a tenth of the steps and after all. For a process of its own."""
    torch.set_num_threads(1)
    for done in training_steps(steps):
        if done in (steps // 10, steps):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(done, pages * os.sysconf("SC_PAGE_SIZE"), flush=True)


@pytest.mark.skipif(not FULL, reason="ten thousand steps take minutes: DEEPINV_DEQ_FAULTS=full")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, where Linux says what is resident")
def test_resident_memory_does_not_grow_over_ten_thousand_steps():
    # what no tensor and no object shows: a kilobyte lost per step is nine megabytes
    code = "from tests.test_faults import resident_bytes_over; resident_bytes_over(10_000)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (_, early), (steps, late) = (map(int, line.split()) for line in run.stdout.splitlines())
    assert late - early < 2**20, (early, late)
    TRIED[MANY_STEPS] += steps
