r"""The adjoint solve: chunks, preconditioner, honest reports (contracts 5 and 7)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from deepinv.physics import Blur, BlurFFT, Denoising, Downsampling, Inpainting, MultiCoilMRI
from torch import nn

from deepinv_deq import (
    DEADMM,
    DEHQS,
    ConvergenceError,
    ConvergenceWarning,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    ModularIDHook,
    Solver,
)
from tests.implicit.common import ei_loss, gradients
from tests.observe import observe
from tests.problems import (
    F64,
    TEMPLATES,
    SmallDenoiser,
    affine,
    dense_gradient,
    imaging,
    relative_error,
    rng,
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_chunks_do_not_change_the_gradient_and_evaluate_every_sample_once(template, mode):
    results, taped = {}, {}
    for size in (1, 2, 5):
        model, physics, _, y = imaging(template, batch=5, mode=mode)
        model.solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=size)
        model.hook.solver = Solver("gmres", max_iter=200, tol=1e-13, chunk_size=size)
        taped[size] = []

        def count(out, sizes=taped[size]):
            sizes += [len(out)] if out.requires_grad else []

        observe(model.iteration.denoiser, count)
        results[size] = gradients(ei_loss(model, y.requires_grad_(), physics), model, [y])
        assert mode == "jfb" or len(model.hook.stat["nstep"]) == 5
    for size in (1, 2):
        assert relative_error(results[size], results[5]) <= 1e-10
        assert max(taped[size]) == size and sum(taped[size]) == 2 * 5  # two passes
    assert taped[5] == [5, 5]


def test_chunks_build_one_graph_at_a_time():
    model, physics, _, y = imaging(batch=4)
    model.hook.solver = Solver("gmres", tol=1e-6, chunk_size=1)
    alive, most = [], []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.requires_grad:
                most.append(sum(r() is not None for r in alive))
                ctx.token = x.new_zeros(1)
                alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    observe(model.iteration.denoiser, Probe.apply)
    gc.disable()
    try:
        ei_loss(model, y, physics).backward()
    finally:
        gc.enable()
    assert len(most) == 8 and max(most) == 0  # whenever a graph is begun, none is left of those before


@pytest.mark.parametrize(("side", "graphs"), [(128, [1, 1, 1, 1]), (90, [3, 1]), (8, [4])])
def test_graphs_are_by_default_of_half_as_many_samples_as_a_solve(side, graphs):
    y, taped = torch.rand(4, 1, side, side, generator=rng()), []
    model = DEQReconstructor(DEProx(SmallDenoiser(), stepsize=0.7), solver=Solver(tol=1e-2), hook=ModularIDHook())
    observe(model.iteration.denoiser, lambda x: taped.append(len(x)) if x.requires_grad else None)
    model(y, Denoising()).sum().backward()
    assert taped == graphs


@pytest.mark.parametrize("template", TEMPLATES)
def test_physics_of_every_sample_get_their_gradient_in_chunks(template):
    gradients_ = {}
    for size in (1, 4):
        model, _, x, _ = imaging(template, batch=4)
        mask = torch.rand(4, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        physics = Inpainting((1, 4, 4), mask=mask.detach())
        physics.mask = mask
        model.solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=size)
        model.hook.solver = Solver("gmres", max_iter=200, tol=1e-13, chunk_size=size)
        gradients_[size] = torch.autograd.grad(model(x, physics).sin().sum(), mask)
    assert relative_error(gradients_[1], gradients_[4]) <= 1e-10


@pytest.mark.parametrize("method", ["gmres", "anderson", "broyden"])
def test_preconditioning_changes_the_cost_and_not_the_gradient(method):
    kernel = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]])[None, None] / 6
    physics = BlurFFT((1, 16, 16), filter=kernel).to(F64)
    y = physics.A(torch.rand(2, 1, 16, 16, dtype=F64, generator=torch.Generator().manual_seed(0)))
    results, cost = {}, {}
    for precondition in (True, False):
        model = DEQReconstructor(DEGrad(SmallDenoiser(), stepsize=0.1, data_weight=9.0)).to(F64)
        model.solver = Solver("anderson", max_iter=500, tol=1e-12, precondition=precondition)
        model.hook.solver = Solver(method, max_iter=500, tol=1e-12, precondition=precondition)
        x_hat = model(y.requires_grad_(), physics)
        results[precondition] = gradients(x_hat.sin().sum(), model, [y])
        cost[precondition] = model.forward_stat.evaluations, model.hook.stat.evaluations
    assert relative_error(results[True], results[False]) <= 1e-9
    assert cost[True][0] < cost[False][0] / 2 and cost[True][1] < cost[False][1] / 2


def test_tolerance_missed_warns_once_and_can_raise():
    f, x_star, w = affine()
    c = x_star - x_star @ w.T
    w.requires_grad_()
    f = lambda x: x @ w.T + c  # noqa: E731
    hook = ModularIDHook(Solver("gmres", max_iter=3, tol=1e-8))
    with pytest.warns(ConvergenceWarning, match="0 of 3 samples reached"):
        hook(f, x_star).sum().backward()
    hook(f, x_star).sum().backward()  # the same cause is not repeated: pytest.ini makes the warning an error
    assert not hook.stat.converged.any() and hook.stat.evaluations == 3
    with pytest.raises(ConvergenceError, match="relative residual"):
        ModularIDHook(Solver("gmres", max_iter=3, on_failure="raise"))(f, x_star).sum().backward()


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_tolerance_bounds_the_error_of_the_gradient_for_small_steps_too(tol):
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    w = q @ torch.diag(1 - torch.logspace(-2, 0, 40, dtype=F64)) @ q.T
    x_star, eta = torch.ones(2, 40, dtype=F64), 1e-3
    c = x_star - x_star @ w.T
    w.requires_grad_()
    slow = lambda x: x + eta * (x @ w.T + c - x)  # noqa: E731
    exact = dense_gradient(slow, x_star, torch.ones_like(x_star), [w])
    hook = ModularIDHook(Solver("gmres", max_iter=300, tol=tol))
    found = torch.autograd.grad(hook(slow, x_star).sum(), w)
    assert hook.stat.converged.all() and hook.stat.residual.max() <= tol
    assert relative_error(found, exact) <= 100 * tol  # the condition number of I - w


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_remainder_is_measured_in_parts_of_the_cotangent(size):
    f, x_star, w = affine(batch=2)
    w.requires_grad_()
    hook = ModularIDHook(Solver("gmres", max_iter=6, tol=1e-12, on_failure="ignore"))
    x_hat = hook(f, x_star)
    g = size * torch.ones_like(x_star)
    torch.autograd.grad(x_hat, w, g)
    assert hook.stat.remainder.shape == (2,)
    assert bool((hook.stat.remainder < 0.5).all()) and bool((hook.stat.remainder > (0 if size else -1)).all())
    residual = hook.stat["abs_lowest"] / size if size else torch.zeros(2, dtype=F64)
    torch.testing.assert_close(hook.stat.remainder, residual / 40**0.5, rtol=1e-6, atol=0)


def test_map_that_couples_the_batch_is_found_out():
    mix = torch.full((3, 3), 0.3, dtype=F64, requires_grad=True)
    c = torch.randn(3, 4, dtype=F64)
    f = lambda x: mix @ torch.tanh(x) + c  # noqa: E731
    x_star, _ = Solver("anderson", batched=False, tol=1e-13, max_iter=200)(f, torch.zeros_like(c))
    with pytest.warns(ConvergenceWarning, match="batched=False"):
        ModularIDHook(Solver("gmres", max_iter=30, tol=1e-10))(f, x_star).sin().sum().backward()
    x_hat = ModularIDHook(Solver("gmres", max_iter=60, tol=1e-13, batched=False))(f, x_star)
    exact = dense_gradient(f, x_star, torch.cos(x_star), [mix])
    assert relative_error(torch.autograd.grad(x_hat.sin().sum(), mix), exact) <= 1e-8


HIDDEN = torch.tensor(0.5, dtype=F64, requires_grad=True)


def test_hidden_trainable_tensor_is_an_error_not_a_lost_gradient():
    class Global(nn.Module):
        def forward(self, x):
            return x * HIDDEN

    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(nn.Sequential(SmallDenoiser().to(F64), Global()), stepsize=0.5))
    with pytest.raises(RuntimeError, match="gradient would be lost"):
        model(y, physics).sum().backward()


def untrained(template, physics, channels, dtype):
    r"""An adjoint solve of a network that starts as the identity, so that nothing contracts where the physics is blind."""
    torch.manual_seed(0)
    network = EquilibriumUNet(channels, channels=(4, 8), contraction=1.0)
    hook = ModularIDHook(Solver("gmres", max_iter=50, tol=1e-3, on_failure="ignore"))
    model = DEQReconstructor(template(network, stepsize=0.5), solver=Solver(on_failure="ignore"), hook=hook).to(dtype)
    x, physics = torch.rand(2, channels, 8, 8, dtype=dtype), physics.to(dtype)
    (model(physics.A(x), physics) - x).square().mean().backward()
    sizes = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    return hook.stat, max(sizes, default=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("template", [DEGrad, DEProx, DEHQS, DEADMM])
@pytest.mark.parametrize("problem", ["super-resolution", "multi-coil MRI", "blur"])
def test_an_adjoint_that_is_singular_is_not_blamed_on_the_precision(problem, template, dtype):
    bell = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / 2)
    physics, channels = {
        "super-resolution": (lambda: Downsampling(img_size=(1, 8, 8), factor=2, filter="gaussian"), 1),
        "multi-coil MRI": (
            lambda: MultiCoilMRI(
                mask=(torch.arange(8) % 3 != 0).float().expand(1, 2, 8, 8),
                coil_maps=torch.full((1, 2, 8, 8), 0.5**0.5, dtype=torch.complex64),
                img_size=(2, 8, 8),
            ),
            2,
        ),
        "blur": (lambda: Blur(filter=(bell[:, None] * bell)[None, None] / bell.sum() ** 2, padding="reflect"), 1),
    }[problem]
    stat, size = untrained(template, physics(), channels, dtype)
    assert stat["singular"].all() and not stat["at_floor"].any() and stat.cause() == "singular"
    assert "is singular or nearly so in 2 of 2" in stat.outcome and "cannot reach" not in stat.outcome
    assert "ContractionLoss" in stat.outcome and "contraction below 1" in stat.outcome and size <= 1e4
