r"""What a user of deepinv sets: noise levels and stepsizes."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.optim import L2, PGD
from deepinv.optim.prior import PnP
from torch import nn

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, FromOptim, Solver
from deepinv_deq.iterations.noise import name_of_sigma
from tests.levels import TEMPLATES, Level, LevelOfDeepinv, exact
from tests.problems import F64, imaging, relative_error


@pytest.mark.parametrize("network", [Level, LevelOfDeepinv])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_noise_level_for_each_sample(template, network):
    _, physics, _, y = imaging(batch=3)
    model = exact(template(network(), stepsize=0.5, sigma=0.7))
    levels = torch.tensor([0.1, 0.7, 3.0], dtype=F64)
    close = 1e-11 if template in (DEProx, DEGrad) else 1e-4  # prox_l2 stops at physics.tol
    together = model(y, physics, sigma=levels)
    for i, level in enumerate(levels.tolist()):
        alone = exact(template(network(), stepsize=0.5, sigma=level))(y[i : i + 1], physics)
        assert relative_error(together[i : i + 1], alone) <= close
    assert relative_error(together[1:2], model(y, physics)[1:2]) <= close  # the level of the iteration is as it was
    assert relative_error(model(y, physics, sigma=3.0)[2:], together[2:]) <= close
    assert relative_error(together[:1], model(y, physics)[:1]) > 1e-2


def test_samples_with_levels_of_their_own_are_solved_apart():
    _, physics, _, y = imaging(batch=3)
    model = exact(DEProx(Level(), stepsize=0.5, sigma=0.7))
    levels = torch.tensor([0.1, 0.7, 3.0], dtype=F64)
    whole = model(y, physics, sigma=levels)
    model.solver = Solver("anderson", max_iter=300, tol=1e-13, chunk_size=1)
    assert relative_error(model(y, physics, sigma=levels), whole) <= 1e-12
    assert model.iteration.bind(y, physics, sigma=levels).select(slice(0, 1)) is not None


def test_the_gradient_with_respect_to_noise_levels():
    _, physics, _, y = imaging(batch=3)
    model = exact(DEProx(Level(), stepsize=0.5, sigma=0.7))
    levels = torch.tensor([0.1, 0.7, 3.0], dtype=F64, requires_grad=True)
    weight = torch.randn(3, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    (ours,) = torch.autograd.grad((weight * model(y, physics, sigma=levels)).sum(), levels)
    step = 1e-6
    for i in range(3):
        shift = step * torch.eye(3, dtype=F64)[i]
        with torch.no_grad():
            up, down = (float((weight * model(y, physics, sigma=levels + s)).sum()) for s in (shift, -shift))
        assert float(ours[i]) == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_noise_levels_of_an_algorithm_of_deepinv():
    _, physics, _, y = imaging(batch=2)
    pgd = PGD(prior=PnP(LevelOfDeepinv()), data_fidelity=L2(), stepsize=0.5, sigma_denoiser=0.7)
    model, levels = exact(FromOptim(pgd)), torch.tensor([0.1, 3.0], dtype=F64)
    expected = exact(DEProx(LevelOfDeepinv(), stepsize=0.5, sigma=1.0))(y, physics, sigma=levels)
    assert relative_error(model(y, physics, sigma=levels), expected) <= 1e-11
    assert relative_error(model(y, physics), expected) > 1e-3


def test_denoisers_without_a_noise_level_do_not_get_one():
    model, physics, _, y = imaging()
    torch.testing.assert_close(model(y, physics, sigma=0.3), model(y, physics), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sigma", "says"),
    [
        (-0.1, "must not be negative"),
        (float("nan"), "must not be negative or NaN"),
        (torch.ones(3), r"sigma has shape \(3,\), and the batch 2 samples"),
        (torch.tensor([0.1, -1.0]), "must not be negative"),
    ],
)
def test_wrong_noise_levels(sigma, says):
    _, physics, _, y = imaging(batch=2)
    with pytest.raises(ValueError, match=says):
        DEQReconstructor(DEProx(Level(), sigma=0.1))(y, physics, sigma=sigma)


def test_noise_levels_by_other_names_and_inside_wrappers():
    assert name_of_sigma(dinv.models.TVDenoiser(), None) == "ths"
    assert name_of_sigma(dinv.models.WaveletDenoiser(non_linearity="soft"), 0.1) == "ths"
    assert name_of_sigma(dinv.models.DnCNN(1, 1, depth=2, nf=4, pretrained=None), None) == "sigma"
    assert name_of_sigma(nn.DataParallel(Level()), 0.1) == "sigma" and name_of_sigma(nn.Identity(), 0.1) == ""
    drunet = dinv.models.DRUNet(1, 1, nc=(4, 4, 4, 4), nb=1, pretrained=None)
    for needs in (drunet, dinv.models.EquivariantDenoiser(drunet), nn.DataParallel(Level()), Level()):
        with pytest.raises(ValueError, match=f"{type(drunet).__name__}|Level needs a noise level: pass sigma="):
            DEProx(needs)
    with pytest.raises(ValueError, match="LevelOfDeepinv needs a noise level: pass sigma_denoiser="):
        FromOptim(PGD(prior=PnP(LevelOfDeepinv()), data_fidelity=L2(), stepsize=0.5))


def test_a_threshold_is_a_noise_level():
    physics, x = dinv.physics.Denoising(), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = dinv.models.WaveletDenoiser(non_linearity="soft")
    f = DEProx(denoiser, stepsize=1.0, sigma=0.3).bind(x, physics)
    torch.testing.assert_close(f(x), denoiser(x, 0.3))
    assert (denoiser(x, 0.3) - denoiser(x)).norm() > 0.1


# -- stepsizes ------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_learned_stepsize_stays_positive(template):
    model, physics, x, y = imaging(template)
    optimizer = torch.optim.SGD([model.iteration.stepsize], lr=1.0)
    raw, seen = model.iteration._parameters["stepsize"], set()
    for k in range(4):  # steps far beyond zero, in both directions
        optimizer.zero_grad()
        loss = (model(y, physics) - x).square().sum()
        loss.backward()
        raw.grad.copy_(raw.detach().sign() * (1.0 + 0.1 * k))
        optimizer.step()
        seen.add(float(raw.detach().sign()))
        assert float(model.iteration.stepsize.detach()) > 0
    assert seen == {-1.0, 1.0}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_stepsize_below_zero_is_that_above(template, tmp_path):
    model, physics, _, y = imaging(template)
    expected = model(y, physics)
    expected.square().sum().backward()
    raw = model.iteration._parameters["stepsize"]
    grads = [p.grad.clone() for p in model.parameters()]
    assert isinstance(model.iteration.stepsize, nn.Parameter) and model.iteration.stepsize is raw
    raw.data.neg_()
    model.zero_grad()
    ours = model(y, physics)
    ours.square().sum().backward()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    for name_and_p, before in zip(model.named_parameters(), grads, strict=True):
        sign = -1 if name_and_p[1] is raw else 1
        torch.testing.assert_close(name_and_p[1].grad, sign * before, rtol=0, atol=0)
    other = imaging(template)[0]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(y, physics), expected, rtol=0, atol=0)
    assert "stepsize" in dict(model.iteration.named_parameters())


def test_a_learned_stepsize_of_an_algorithm_stays_positive():
    _, physics, _, y = imaging()
    pgd = PGD(prior=PnP(LevelOfDeepinv()), data_fidelity=L2(), stepsize=0.5, sigma_denoiser=0.7)
    model = exact(FromOptim(pgd, trainable=["stepsize"]))
    expected = model(y, physics).detach()
    (raw,) = [p for name, p in model.named_parameters() if name.endswith("stepsize")]
    raw.data.neg_()
    torch.testing.assert_close(model(y, physics), expected, rtol=0, atol=0)
    assert float(model.params_algo["stepsize"][0]) > 0


def test_a_model_with_a_stepsize_below_zero_is_saved_as_learned(tmp_path):
    model = DEQReconstructor(DEProx(EquilibriumUNet(1, channels=(4, 8)), stepsize=0.4, learn_stepsize=True))
    model.iteration.stepsize.data.neg_()
    model.save_pretrained(tmp_path / "model.pt")
    loaded = DEQReconstructor.from_pretrained(tmp_path / "model.pt")
    assert float(loaded.iteration.stepsize.detach()) == pytest.approx(0.4)
    assert "stepsize" in dict(loaded.iteration.named_parameters())
