r"""deepinv's algorithms as templates: fixed points are theirs, gradients those of an unrolled solve."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch

from deepinv_deq import DEADMM, DEHQS, FromOptim
from tests.problems import F64, SmallDenoiser, assert_unrolled_gives_the_same, deq


class Denoiser(torch.nn.Module):
    r"""Takes the noise level that deepinv hands to every denoiser."""

    def __init__(self):
        super().__init__()
        self.net = SmallDenoiser().to(F64)

    def forward(self, x, sigma=None, **kwargs):
        return self.net(x)


class Positive(Denoiser):
    r"""Stays where likelihoods of counts are defined."""

    def forward(self, x, sigma=None, **kwargs):
        return 0.5 + 0.2 * torch.tanh(super().forward(x))


def algorithm(name, **settings):
    kind = dinv.optim.RED if name == "GD" else dinv.optim.PnP
    settings = {
        "stepsize": 0.5,
        "lambda_reg": 0.8,
        "data_fidelity": dinv.optim.L2(),
        "prior": kind(Denoiser()),
    } | settings
    if name == "PDCP":
        settings["stepsize_dual"] = 0.5
    return getattr(dinv.optim, name)(**settings)


@pytest.fixture
def inpainting():
    torch.manual_seed(0)
    physics = dinv.physics.Inpainting((1, 6, 6), mask=(torch.rand(1, 6, 6) > 0.4).to(F64))
    return physics, physics(torch.rand(2, 1, 6, 6, dtype=F64))


@pytest.mark.parametrize("name", ["PGD", "HQS", "ADMM", "DRS", "GD", "PDCP"])
def test_algorithms_of_deepinv(inpainting, name):
    physics, y = inpainting
    assert_unrolled_gives_the_same(deq(FromOptim(algorithm(name), trainable=("stepsize",))), physics, y)


@pytest.mark.parametrize("name", ["PGD", "HQS", "ADMM", "DRS", "GD"])
def test_the_fixed_point_is_the_algorithms(inpainting, name):
    physics, y = inpainting
    theirs = algorithm(name, max_iter=500)
    assert torch.allclose(deq(FromOptim(theirs))(y, physics), theirs(y, physics), atol=1e-8)


@pytest.mark.parametrize("template", [DEHQS, DEADMM])
def test_splitting_templates(inpainting, template):
    physics, y = inpainting
    assert_unrolled_gives_the_same(deq(template(SmallDenoiser(), stepsize=0.7, learn_stepsize=True)), physics, y)


def test_templates_are_deepinvs_algorithms(inpainting):
    physics, y = inpainting
    for name, template in (("HQS", DEHQS), ("ADMM", DEADMM)):
        theirs = deq(FromOptim(algorithm(name, stepsize=0.7)))
        ours = deq(template(theirs.iteration.denoiser.denoiser, stepsize=0.7, sigma=0.0))
        assert torch.allclose(ours(y, physics), theirs(y, physics), atol=1e-9)


@pytest.mark.parametrize(
    "fidelity", [dinv.optim.data_fidelity.PoissonLikelihood(), dinv.optim.data_fidelity.LogPoissonLikelihood()]
)
def test_other_data_fidelities(fidelity):
    physics = dinv.physics.Inpainting((1, 6, 6), mask=torch.ones(1, 6, 6, dtype=F64))
    y = 0.5 + torch.rand(2, 1, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    prior = dinv.optim.PnP(Positive())
    pgd = algorithm("PGD", data_fidelity=fidelity, prior=prior, stepsize=0.05, custom_init=lambda y, physics: (y,))
    assert_unrolled_gives_the_same(deq(FromOptim(pgd)), physics, y)


def test_physics_that_is_not_linear():
    class Saturating(dinv.physics.Physics):
        def A(self, x, **kwargs):
            return torch.tanh(x)

    y = torch.tanh(torch.rand(2, 1, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0)))
    pgd = algorithm("PGD", custom_init=lambda y, physics: (y,))
    assert_unrolled_gives_the_same(deq(FromOptim(pgd)), Saturating(), y)


@pytest.mark.parametrize(
    "iteration", [lambda: FromOptim(algorithm("PGD")), lambda: DEHQS(SmallDenoiser(), stepsize=0.5)]
)
def test_stacked_measurements(inpainting, iteration):
    physics, _ = inpainting
    other = dinv.physics.Inpainting((1, 6, 6), mask=1 - physics.mask[0])
    stacked = dinv.physics.StackedLinearPhysics([physics, other], tol=1e-13, max_iter=200)
    y = stacked(torch.rand(2, 1, 6, 6, dtype=F64))
    assert_unrolled_gives_the_same(deq(iteration()), stacked, y, steps=200)


def test_only_scalar_parameters_that_are_named_are_trained(inpainting):
    template = FromOptim(algorithm("PGD"), trainable=("stepsize", "lambda"))
    assert sum(p.requires_grad and p.ndim == 0 for p in template.parameters()) == 2
    unfolded = algorithm("PGD", unfold=True, trainable_params=["stepsize"])
    assert sum(p.requires_grad and p.ndim == 0 for p in FromOptim(unfolded).parameters()) == 1


def test_the_users_algorithm_stays_as_it_was(inpainting):
    physics, y = inpainting
    theirs = algorithm("PGD", prior=dinv.optim.L1Prior(), max_iter=3)
    before = theirs(y, physics)
    model = deq(FromOptim(theirs, trainable=("stepsize",)))
    torch.nn.init.zeros_(next(p for p in model.parameters() if p.ndim == 0))
    assert theirs.fixed_point.iterator.has_cost and torch.equal(theirs(y, physics), before)


def test_copies_are_independent(inpainting):
    physics, y = inpainting
    model = deq(FromOptim(algorithm("ADMM")))
    twin = copy.deepcopy(model)
    before = twin(y, physics)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1)
    assert torch.equal(twin(y, physics), before)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(y, physics), before)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: algorithm("FISTA"), "momentum that depends on the iteration: use PGD"),
        (lambda: algorithm("PGD", stepsize=[0.5] * 9, max_iter=9), "stepsize given as lists"),
        (lambda: algorithm("PGD", prior=[dinv.optim.PnP(Denoiser()) for _ in range(9)], max_iter=9), "several priors"),
        (lambda: algorithm("PGD", prior=dinv.optim.TVPrior(), backtracking=True), "backtracking"),
        (lambda: dinv.optim.MLEM(max_iter=3), "a loop of its own"),
    ],
)
def test_what_has_no_fixed_point_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        FromOptim(make())


class Momentum(dinv.optim.FISTA):
    r"""A subclass is judged as its class is."""


def test_a_subclass_of_an_algorithm_without_a_fixed_point_is_refused():
    momentum = Momentum(prior=dinv.optim.PnP(Denoiser()), data_fidelity=dinv.optim.L2(), stepsize=0.5)
    with pytest.raises(ValueError, match="Momentum does not repeat .*momentum that depends on the iteration"):
        FromOptim(momentum)


def test_a_subclass_of_gradient_descent(inpainting):
    class Descent(dinv.optim.GD):
        pass

    physics, y = inpainting
    settings = {
        "prior": dinv.optim.RED(Denoiser()),
        "data_fidelity": dinv.optim.L2(),
        "stepsize": 0.5,
        "lambda_reg": 0.8,
    }
    assert_unrolled_gives_the_same(deq(FromOptim(Descent(**settings))), physics, y)


class Level(torch.nn.Module):
    def forward(self, x, sigma=None, **kwargs):
        return 0.5 * torch.tanh(sigma * x)


@pytest.mark.parametrize("name", ["sigma_denoiser", "g_param", "lambda_reg", "lambda"])
def test_parameters_by_both_of_their_names(inpainting, name):
    physics, y = inpainting
    prior = dinv.optim.RED(Level())
    optim = dinv.optim.GD(prior=prior, data_fidelity=dinv.optim.L2(), stepsize=0.4, sigma_denoiser=0.7, lambda_reg=0.8)
    model = deq(FromOptim(optim, trainable=[name]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 1 and float(trained[0].detach()) == pytest.approx(0.7 if "l" not in name[:1] else 0.8)
    assert_unrolled_gives_the_same(model, physics, y)


def test_import_paths_of_0_1():
    from deepinv_deq.from_optim import FromOptim as old
    from deepinv_deq.iterations import DEADMM, DEHQS, DEGrad, DEProx, FixedPointIteration  # noqa: F401

    assert old is FromOptim


def test_other_mistakes():
    with pytest.raises(TypeError, match="must be an algorithm of deepinv.optim, such as PGD, got Denoiser"):
        FromOptim(Denoiser())
    with pytest.raises(ValueError, match=r"needs one stepsize for all pixels, got shape \(2, 1, 1\)"):
        FromOptim(algorithm("PGD", stepsize=torch.ones(1, 2, 1, 1)))
    with pytest.raises(ValueError, match="No scalar parameter step: PGD has .*stepsize"):
        FromOptim(algorithm("PGD"), trainable=("step",))


def test_a_learned_stepsize_of_zero_is_refused(inpainting):
    iteration = FromOptim(algorithm("PGD"), trainable=("stepsize",))
    with torch.no_grad():
        iteration._tensors["stepsize"].zero_()
    with pytest.raises(ValueError, match="stepsize has become 0.0: it must not be zero"):
        iteration.bind(inpainting[1], inpainting[0])


@pytest.mark.parametrize(
    "name,safe", [("GD", 1 / 100.8), ("PGD", 1 / 100), ("HQS", None), ("ADMM", None), ("other", None)]
)
def test_a_stepsize_that_diverges_is_named(inpainting, name, safe):
    physics, y = inpainting
    fidelity = dinv.optim.L1() if name == "other" else dinv.optim.L2(sigma=0.1)
    trained = FromOptim(algorithm("PGD" if name == "other" else name, data_fidelity=fidelity), trainable=("stepsize",))
    with torch.no_grad():
        trained._tensors["stepsize"].fill_(3.0)
    said = trained.bind(y, physics).diagnose()
    assert said == "" if safe is None else f"The stepsize 3 diverges" in said and f"use stepsize={safe:.2g}." in said
    for kind in (DEHQS, DEADMM):  # proximal maps expand at no stepsize
        assert kind(Denoiser(), stepsize=10.0).bind(y, physics).diagnose() == ""
