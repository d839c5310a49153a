r"""Templates: their formulas, stepsizes, noise levels and binding."""

from __future__ import annotations

import weakref

import pytest
import torch
from deepinv.models import DnCNN
from deepinv.physics import Denoising, Inpainting, Tomography
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor
from tests.problems import F64, TEMPLATES, imaging


def test_formulas():
    model, physics, x, y = imaging(DEProx)
    denoiser, eta = model.iteration.denoiser, 0.5
    gradient = physics.A_adjoint(physics.A(x) - y * 2)
    torch.testing.assert_close(model.iteration.bind(y * 2, physics)(x), denoiser(x - eta * gradient))  # eq. 6
    weighted = DEProx(denoiser, stepsize=eta / 4, data_weight=4.0)
    torch.testing.assert_close(weighted.bind(y * 2, physics)(x), denoiser(x - eta * gradient))
    grad = DEGrad(denoiser, stepsize=eta)
    torch.testing.assert_close(grad.bind(y * 2, physics)(x), x - eta * gradient - eta * (x - denoiser(x)))  # eq. 11


CALLS = []  # a global name: what a function holds itself is private to each replica


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_adjoint_of_y_is_computed_once_per_solve(template):
    model, physics, _, y = imaging(template)
    adjoint = physics.A_adjoint
    physics.A_adjoint = lambda v, **kwargs: (CALLS.append(torch.equal(v, y)), adjoint(v, **kwargs))[1]
    f = model.iteration.bind(y, physics)
    x = physics.A_adjoint(y)
    CALLS.clear()
    for _ in range(3):
        f(x)
    assert CALLS == [False] * 3  # A^T(Ax) only, one per evaluation


def test_init_is_fbp_or_adjoint():
    physics = Tomography(angles=8, img_width=16, normalize=True)
    x = torch.rand(1, 1, 16, 16)
    iteration = DEGrad(nn.Identity())
    torch.testing.assert_close(iteration.init(physics.A(x), physics), physics.fbp(physics.A(x)))
    _, matrix_physics, _, y = imaging()
    torch.testing.assert_close(iteration.init(y, matrix_physics), matrix_physics.A_adjoint(y))
    assert not iteration.init(y.requires_grad_(), matrix_physics).requires_grad


def test_stepsize_is_saved_and_optionally_trained():
    fixed, learned = DEProx(nn.Identity(), stepsize=0.3), DEProx(nn.Identity(), stepsize=0.3, learn_stepsize=True)
    assert not list(fixed.parameters()) and [name for name, _ in learned.named_parameters()] == ["stepsize"]
    other = DEProx(nn.Identity(), stepsize=0.9)
    other.load_state_dict(fixed.state_dict())
    assert float(other.stepsize) == pytest.approx(0.3)


def test_sigma_is_handed_to_denoisers_that_want_it():
    class Wants(nn.Module):
        def forward(self, x, sigma):
            return x * sigma

    x, physics = torch.ones(1, 1, 4, 4), Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    y = physics.A(x)
    torch.testing.assert_close(DEProx(Wants(), sigma=0.25).bind(y, physics)(x), 0.25 * x)
    torch.testing.assert_close(DEProx(nn.Identity(), sigma=0.25).bind(y, physics)(x), x)
    with pytest.raises(ValueError, match="pass sigma="):
        DEProx(Wants())
    trained = DEProx(Wants(), sigma=nn.Parameter(torch.tensor(0.25)))
    assert "sigma" in dict(trained.named_parameters())
    model = DEQReconstructor(trained)
    model(y, physics).sum().backward()
    assert trained.sigma.grad.abs() > 0
    assert DEProx(DnCNN(1, 1, depth=2, nf=4, pretrained=None), sigma=0.1).bind(y, physics)(x).shape == x.shape


def test_a_stepsize_for_each_channel():
    physics, x = Inpainting((3, 4, 4), mask=torch.ones(3, 4, 4)), torch.rand(2, 3, 4, 4)
    eta = torch.tensor([0.1, 0.5, 0.9]).reshape(3, 1, 1)
    y = physics.A(x.flip(0))
    for template in (DEProx, DEGrad):
        f = template(nn.Tanh(), stepsize=eta, learn_stepsize=True).bind(y, physics)
        for c in range(3):
            one = template(nn.Tanh(), stepsize=float(eta[c])).bind(y, physics)
            torch.testing.assert_close(f(x)[:, c], one(x)[:, c])
    for template in (DEHQS, DEADMM):
        with pytest.raises(ValueError, match=r"needs one stepsize for all channels, got shape \(3, 1, 1\)"):
            template(nn.Tanh(), stepsize=eta)
    for shape in [(3,), (2, 1, 1, 1), (3, 4, 4)]:
        with pytest.raises(ValueError, match="must be one number, or one per channel"):
            DEProx(nn.Tanh(), stepsize=torch.ones(shape))
    with pytest.raises(ValueError, match="stepsize must be positive"):
        DEProx(nn.Tanh(), stepsize=eta - 0.2)


@pytest.mark.parametrize("template", [DEProx, DEGrad])
def test_a_stepsize_for_each_channel_of_a_volume(template):
    x, eta = torch.rand(1, 2, 2, 4, 4), torch.tensor([0.5, 0.1])
    for shape in [(2, 1, 1), (1, 2, 1, 1)]:  # which would be one for each slice
        f = template(nn.Tanh(), stepsize=eta.reshape(shape)).bind(x, Denoising())
        for use in (f, f.step, f.contractive_part, DEQReconstructor(template(nn.Tanh(), stepsize=eta.reshape(shape)))):
            with pytest.raises(ValueError, match=r"not one number per channel .* with shape \(1, 2, 1, 1, 1\)"):
                use(x, Denoising()) if isinstance(use, nn.Module) else use(x)
    f = template(nn.Tanh(), stepsize=eta.reshape(1, 2, 1, 1, 1)).bind(x.flip(0), Denoising())
    for c in range(2):
        one = template(nn.Tanh(), stepsize=float(eta[c])).bind(x.flip(0), Denoising())
        torch.testing.assert_close(f(x)[:, c], one(x)[:, c])
    with pytest.raises(ValueError, match=r"per channel of a state of shape \(1, 3, 4, 4\)"):
        template(nn.Tanh(), stepsize=eta.reshape(2, 1, 1)).bind(x := torch.rand(1, 3, 4, 4), Denoising())(x)


def test_a_stepsize_of_integers_can_be_learned():
    iteration = DEProx(nn.Identity(), stepsize=torch.tensor(1), learn_stepsize=True)
    assert iteration.stepsize.requires_grad and iteration.stepsize == 1.0


def test_a_stepsize_that_became_zero_is_an_error():
    iteration = DEProx(nn.Identity(), stepsize=0.3, learn_stepsize=True)
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    iteration.stepsize.data.fill_(-0.1)  # the sign of the trained number means nothing
    assert float(iteration.stepsize.detach()) == pytest.approx(0.1)
    iteration.bind(torch.ones(1, 1, 4, 4), physics)
    iteration.stepsize = nn.Parameter(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"stepsize has become 0.0: it must not be zero.*smaller learning rate"):
        iteration.bind(torch.ones(1, 1, 4, 4), physics)
    iteration.load_state_dict(DEProx(nn.Identity(), stepsize=0.2).state_dict())
    assert float(iteration.stepsize.detach()) == pytest.approx(0.2)
    iteration.bind(torch.ones(1, 1, 4, 4), physics)


def test_denoising_with_a_stepsize_of_one_is_one_pass_of_the_denoiser():
    physics, y = Denoising(), torch.rand(1, 1, 4, 4)
    model = DEQReconstructor(DEProx(nn.Tanh(), stepsize=1.0))
    torch.testing.assert_close(model(y, physics), torch.tanh(y))
    assert model.forward_stat.evaluations <= 2 and "plain network" in DEProx.__doc__


def test_templates_may_precompute_what_they_like():
    class Late(DEProx):
        def constants(self, y, physics):
            return (y,)

        def forward(self, x, physics, y):
            return super().forward(x, physics, physics.A_adjoint(y))

    model, physics, x, y = imaging()
    late = Late(model.iteration.denoiser, stepsize=0.5).double()
    torch.testing.assert_close(late.bind(y, physics)(x), model.iteration.bind(y, physics)(x))


def test_sigma_by_name_and_as_a_buffer():
    class Masked(nn.Module):
        def forward(self, x, mask=None, sigma=None):
            assert mask is None
            return x * sigma

    x, physics = torch.ones(1, 1, 4, 4), Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    iteration = DEProx(Masked(), sigma=torch.tensor(0.5)).double()
    assert iteration.sigma.dtype == F64 and "sigma" in iteration.state_dict()
    torch.testing.assert_close(iteration.bind(x, physics)(x), 0.5 * x, check_dtype=False)


def test_binding_does_not_change_modules():
    model, physics, _, y = imaging()
    before = {k: v.clone() for k, v in [*model.state_dict().items(), *physics.state_dict().items()]}
    f = model.iteration.bind(y.requires_grad_(), physics)
    f.rebind([torch.zeros_like(t) for t in f.inputs])(torch.zeros(2, 1, 4, 4, dtype=F64))
    after = {**model.state_dict(), **physics.state_dict()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_bound_map_does_not_keep_the_measurements_alive():
    model, physics, _, y = imaging()
    f = model.iteration.bind(y, physics)
    assert f.diagnose() == ""
    gone = weakref.ref(y)
    del y
    assert gone() is None and f.diagnose() == ""


class Damped(DEProx):
    def step(self, x, physics, *constants):
        return 0.5 * super().step(x, physics, *constants)


class DampedGrad(DEGrad):
    def step(self, x, physics, *constants):
        return 0.5 * super().step(x, physics, *constants)


class Shifted(Damped):
    def forward(self, x, physics, *constants):
        return 0.9 * super().forward(x, physics, *constants) + 0.1


class Twice(Shifted):
    def step(self, x, physics, *constants):
        return 2 * super().step(x, physics, *constants)


class Mixin:
    def step(self, x, physics, *constants):
        return 0.5 * super().step(x, physics, *constants)


class Mixed(Mixin, DEProx):
    pass


@pytest.mark.parametrize(
    "template,of",
    [
        (Damped, lambda x, f: x + 0.5 * (f(x) - x)),
        (DampedGrad, lambda x, f: x + 0.5 * (f(x) - x)),
        (Mixed, lambda x, f: x + 0.5 * (f(x) - x)),
        (Shifted, lambda x, f: 0.9 * (x + 0.5 * (f(x) - x)) + 0.1),
        (Twice, lambda x, f: x + 2 * (0.9 * (x + 0.5 * (f(x) - x)) + 0.1 - x)),
    ],
)
def test_forward_and_step_may_be_overridden_one_at_a_time(template, of):
    model, physics, x, y = imaging(DEGrad if template is DampedGrad else DEProx)
    plain = model.iteration.bind(y, physics)
    f = template(model.iteration.denoiser, stepsize=0.5).double().bind(y, physics)
    torch.testing.assert_close(f(x), of(x, plain))
    torch.testing.assert_close(f.step(x), of(x, plain) - x)
    assert f.has_own_step == (template is not Shifted)
