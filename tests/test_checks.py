r"""What a user hands to a model: starting points that fit, and those that do not."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Denoising, LinearPhysics
from torch import nn

from deepinv_deq import DEADMM, DEProx, DEQReconstructor, ModularIDHook
from tests.problems import F64, deq, imaging

GOOD = torch.full((2, 1, 4, 4), 0.3, dtype=F64)


@pytest.mark.parametrize(
    "init, error, message",
    [
        ((GOOD, GOOD), TypeError, r"init must be a tensor of shape \(2, 1, 4, 4\) for DEProx, got a tuple of Tensor, Tensor"),
        (3.0, TypeError, "got float"),
        ({"est": GOOD}, TypeError, "got dict"),
        (lambda y, physics: "image", TypeError, r"init\(y, physics\) must be a tensor .* got str"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"init has shape \(2, 3, 4, 4\), but the iterates of DEProx have shape \(2, 1, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"\(1, 1, 4, 4\)"),
        (torch.zeros(2, 1, 5, 4), ValueError, r"\(2, 1, 5, 4\)"),
        (torch.zeros(2, 16), ValueError, r"\(2, 16\)"),
        (lambda y, physics: torch.zeros(2, 1, 4), ValueError, r"init\(y, physics\) has shape \(2, 1, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.long), ValueError, "init has dtype torch.int64"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.complex64), ValueError, "init has dtype torch.complex64"),
        (torch.zeros(2, 1, 4, 4, device="meta"), ValueError, "init is on meta, but the iterates are on cpu"),
    ],
)  # fmt: skip
def test_init_that_does_not_fit_is_an_error(init, error, message):
    model, physics, _, y = imaging()
    with pytest.raises(error, match=message):
        model(y, physics, init=init)


def test_init_of_another_channel_count_is_seen_where_broadcasting_would_hide_it():
    model = DEQReconstructor(DEProx(nn.Tanh(), stepsize=0.5))
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        model(torch.rand(1, 1, 8, 8), Denoising(), init=torch.zeros(1, 3, 8, 8))


def test_init_of_several_variables():
    y = torch.rand(2, 1, 4, 4, dtype=F64)
    model = deq(DEADMM(nn.Conv2d(1, 1, 1), stepsize=0.5))
    expected = model(y, Denoising())
    for init in ((y, 0 * y), [y, 0 * y], lambda y, physics: (y, 0 * y)):
        torch.testing.assert_close(model(y, Denoising(), init=init), expected)
    with pytest.raises(TypeError, match="init must be a tuple of 2 tensors .* got Tensor"):
        model(y, Denoising(), init=y)
    with pytest.raises(TypeError, match="got a tuple of Tensor$|got a tuple of Tensor\\."):
        model(y, Denoising(), init=(y,))


@pytest.mark.parametrize("init", [GOOD, GOOD.float(), lambda y, physics: GOOD, GOOD.clone().requires_grad_()])
def test_init_that_fits_gives_the_same_fixed_point(init):
    model, physics, _, y = imaging()
    x_hat = model(y, physics, init=init)
    assert x_hat.dtype == F64  # not that of a less precise start
    torch.testing.assert_close(x_hat, model(y, physics))


@pytest.mark.parametrize("init", [GOOD, lambda y, physics: GOOD])
def test_init_of_higher_precision_is_converted(init):
    torch.manual_seed(0)
    model = DEQReconstructor(DEProx(nn.Conv2d(1, 1, 1), stepsize=0.5))
    y = torch.rand(2, 1, 4, 4)
    x_hat = model(y, Denoising(), init=init)
    assert x_hat.dtype == torch.float32
    torch.testing.assert_close(x_hat, model(y, Denoising()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("est", [(GOOD,), [GOOD], (GOOD, 0 * GOOD)])
@pytest.mark.parametrize("called", [False, True])
def test_init_as_deepinvs_optimisers_keep_it(est, called):
    model, physics, _, y = imaging()
    kept = {"est": est, "cost": None}
    x_hat = model(y, physics, init=(lambda y, physics: kept) if called else kept)
    assert torch.equal(x_hat, model(y, physics, init=GOOD))


def test_init_of_an_optimiser_with_several_variables():
    y = torch.rand(2, 1, 4, 4, dtype=F64)
    model = deq(DEADMM(nn.Conv2d(1, 1, 1), stepsize=0.5))
    assert torch.equal(model(y, Denoising(), init={"est": [y, 0 * y]}), model(y, Denoising(), init=(y, 0 * y)))
    with pytest.raises(TypeError, match="init must be a tuple of 2 tensors .* got a tuple of Tensor"):
        model(y, Denoising(), init={"est": (y,)})


def test_init_is_not_written_to():
    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(0.5)

    init = torch.ones(1, 1, 4, 4)
    model = DEQReconstructor(DEProx(nn.Sequential(Writes()), stepsize=1.0))
    model(torch.rand(1, 1, 4, 4), Denoising(), init=init)
    assert torch.equal(init, torch.ones(1, 1, 4, 4))


def test_init_is_all_there_is_where_an_iteration_has_none():
    class Startless(DEProx):
        def init(self, y, physics):
            raise NotImplementedError("give init=")

    model, physics, _, y = imaging(Startless)
    torch.testing.assert_close(model(y, physics, init=GOOD), imaging()[0](y, physics))
    with pytest.raises(TypeError, match="init must be a tensor"):
        model(y, physics, init="zeros")
    with pytest.raises(NotImplementedError, match="give init="):
        model(y, physics)


def test_starting_points_leave_nothing_on_the_physics():
    class Caches(Denoising):
        def A_adjoint(self, y, **kwargs):
            self.last = y
            return super().A_adjoint(y, **kwargs)

    physics, y = Caches(), torch.rand(1, 1, 4, 4, dtype=F64)
    before = dict(physics.__dict__)
    model = imaging()[0]
    model(y, physics)
    model(y, physics, init=torch.zeros_like(y))
    model.certify(y, physics)
    assert physics.__dict__ == before


@pytest.mark.parametrize("of_instance", [False, True])
def test_init_can_be_overridden(of_instance):
    # evaluations act on replicas, so an error shows the call, and not a list that only the replica would fill
    def init(y, physics):
        raise RuntimeError(f"the start of {type(physics).__name__}")

    class Own(DEProx):
        def init(self, y, physics):
            return init(y, physics)

    model, _, _, _ = imaging(DEProx if of_instance else Own)
    if of_instance:
        model.iteration.init = init
    with pytest.raises(RuntimeError, match="the start of Denoising"):
        model(torch.rand(1, 1, 4, 4, dtype=F64), Denoising())


WRONG = {
    "a tensor": (lambda y: {"constants": y}, "constants.*must return a tuple of tensors, got Tensor"),
    "a number": (
        lambda y: {"constants": (y, 2.0)},
        r"constants.*must return a tuple of tensors, got \['Tensor', 'float'\]",
    ),
    "nothing": (lambda y: {"constants": None}, "constants.*must return a tuple of tensors, got NoneType"),
    "no image": (lambda y: {"forward": None}, "must return a state, a tensor or a tuple of tensors, got NoneType"),
    "complex": (lambda y: {"forward": y + 0j}, "must return real numbers for real ones"),
    "no start": (lambda y: {"init": None}, "init.*must return a tensor or a tuple of tensors, got NoneType"),
    "no tensors": (lambda y: {"init": (y, 1.0)}, "init.*must return a tensor or a tuple of tensors, got Tensor, float"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_an_iteration_returns_by_mistake_is_named(what):
    y = torch.rand(2, 1, 4, 4, dtype=F64)
    returned, message = WRONG[what]
    ((method, value),) = returned(y).items()
    own = type("Own", (DEProx,), {method: lambda self, *_: value})
    with pytest.raises((TypeError, ValueError), match=message):
        imaging(own)[0](y, Denoising())


def test_ground_truths_solvers_and_measurements_that_cannot_be_right():
    model, physics, x, y = imaging(DEProx)
    with pytest.raises(ValueError, match="x_gt must have the shape of the reconstruction"):
        model.certify(y, physics, x_gt=x[:1])
    with pytest.raises(TypeError, match="solver must be a Solver, got 'gmres'"):
        ModularIDHook("gmres")
    with pytest.raises(ValueError, match="need a batch dimension"):
        model(y.sum(), physics)


def test_a_state_may_have_another_batch_than_the_measurements():
    class Twice(LinearPhysics):
        def A(self, x, **_):
            return torch.cat([0.5 * x, 0.4 * x])

        def A_adjoint(self, y, **_):
            first, second = y.chunk(2)
            return 0.5 * first + 0.4 * second

    x = torch.rand(2, 1, 4, 4, dtype=F64)
    model = deq(DEProx(nn.Identity(), stepsize=0.5)).to(F64)
    model.iteration.denoiser = nn.Hardtanh(-0.1, 0.1)
    x_hat = model(Twice().A(x), Twice())
    assert x_hat.shape == x.shape and bool(model.forward_stat.converged.all())
