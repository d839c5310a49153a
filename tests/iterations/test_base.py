r"""Templates, binding, and every kind of wrong input a user can hand to them."""

from __future__ import annotations

import weakref

import pytest
import torch
from deepinv.models import DnCNN
from deepinv.physics import MRI, BlurFFT, Inpainting, LinearPhysics, Physics, Tomography
from torch import nn
from torch.nn.utils import parametrizations

from deepinv_deq import (
    ConvergenceWarning,
    DEGrad,
    DEProx,
    DEQReconstructor,
    EquilibriumUNet,
    FixedPointIteration,
    Solver,
)
from deepinv_deq.iterations.circulant import spectrum
from deepinv_deq.physics import SparseLinearPhysics
from tests.problems import F64, TEMPLATES, MatrixPhysics, imaging, relative_error


def test_formulas():
    model, physics, x, y = imaging(DEProx)
    denoiser, eta = model.iteration.denoiser, 0.5
    gradient = physics.A_adjoint(physics.A(x) - y * 2)
    torch.testing.assert_close(model.iteration.bind(y * 2, physics)(x), denoiser(x - eta * gradient))  # eq. 6
    weighted = DEProx(denoiser, stepsize=eta / 4, data_weight=4.0)
    torch.testing.assert_close(weighted.bind(y * 2, physics)(x), denoiser(x - eta * gradient))
    grad = DEGrad(denoiser, stepsize=eta)
    torch.testing.assert_close(grad.bind(y * 2, physics)(x), x - eta * gradient - eta * (x - denoiser(x)))  # eq. 11


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_adjoint_of_y_is_computed_once_per_solve(template):
    model, physics, _, y = imaging(template)
    calls = []
    adjoint = physics.A_adjoint
    physics.A_adjoint = lambda v, **kwargs: (calls.append(v is y or v.shape), adjoint(v, **kwargs))[1]
    f = model.iteration.bind(y, physics)
    x = physics.A_adjoint(y)
    calls.clear()
    for _ in range(3):
        f(x)
    assert len(calls) == 3 and True not in calls  # A^T(Ax) only, one per evaluation


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


# Normalised weights ------------------------------------------------------------------------------------------------


def test_normalised_weights_are_computed_once_per_pass_and_get_their_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    # normalised to 1 as a matrix, a 3x3 convolution has norm up to 3: damp it to a contraction
    damp = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    nn.init.constant_(damp.weight, 0.3)
    denoiser = nn.Sequential(parametrizations.spectral_norm(conv), nn.Tanh(), damp).to(F64)
    _, physics, _, y = imaging()
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.5), solver=Solver("anderson", max_iter=300, tol=1e-12)).to(F64)
    model.hook.solver = Solver("gmres", max_iter=100, tol=1e-12)
    model.train()
    calls = []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    loss = model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()  # two passes: u and v move in between
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 2 and model.forward_stat.converged.all()
    ours = conv.parametrizations.weight.original.grad.clone()

    model.eval()  # no more power iterations: now autograd through the normalisation is a fair reference
    model.zero_grad()
    (model(y, physics).sin().sum() + model(0.5 * y, physics).cos().sum()).backward()
    at_rest = conv.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    f, g = (model.iteration.bind(v, physics) for v in (y, 0.5 * y))
    a, b = physics.A_adjoint(y), physics.A_adjoint(0.5 * y)
    for _ in range(200):
        a, b = f(a), g(b)
    (a.sin().sum() + b.cos().sum()).backward()
    assert relative_error(at_rest, conv.parametrizations.weight.original.grad) <= 1e-8
    assert relative_error(ours, at_rest) < 0.5  # a few power iterations apart: near, though not the same weights


def test_the_cache_of_weights_leaves_no_trace():
    from torch.nn.utils import parametrize

    conv = parametrizations.weight_norm(nn.Conv2d(1, 1, 3, padding=1))
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    x = torch.rand(1, 1, 4, 4)
    f = DEProx(conv).bind(physics.A(x), physics)
    before = f(x)
    with parametrize.cached():  # a user's own cache survives ours
        inner = conv.weight
        f(x)
        assert conv.weight is inner
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(f(x), before)  # bound before the change
    assert not torch.allclose(DEProx(conv).bind(physics.A(x), physics)(x), before)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_bad_construction():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        DEProx(torch.tanh)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="stepsize must be positive"):
            DEGrad(nn.Identity(), stepsize=bad)
        with pytest.raises(ValueError, match="data_weight must be positive"):
            DEGrad(nn.Identity(), data_weight=bad)
    with pytest.raises(NotImplementedError, match="must implement forward"):
        FixedPointIteration(nn.Identity())(torch.zeros(1), None)


def test_a_physics_without_adjoint():
    with pytest.raises(TypeError, match="which Physics is not. Use a deepinv.physics.LinearPhysics"):
        DEProx(nn.Identity()).bind(torch.zeros(1, 1, 4, 4), Physics(A=torch.sin))


@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 9), (1,)])
def test_measurements_of_a_wrong_shape(shape):
    model, physics, _, _ = imaging()
    with pytest.raises(ValueError, match="do not fit MatrixPhysics"):
        model(torch.zeros(shape, dtype=F64), physics)


def test_measurements_that_would_broadcast():
    physics = LinearPhysics(A=lambda x, **_: x[..., :1, :], A_adjoint=lambda y, **_: y.expand(-1, -1, 4, -1))
    with pytest.raises(ValueError, match=r"to measurements of shape \(1, 1, 1, 4\)"):
        DEProx(nn.Identity()).bind(torch.zeros(1, 1, 4, 4), physics)


def test_tomography_with_other_angles():
    physics = Tomography(angles=8, img_width=16, normalize=True)
    other = Tomography(angles=9, img_width=16, normalize=True)
    with pytest.raises(ValueError, match="angles"):
        DEGrad(nn.Identity()).bind(other.A(torch.zeros(1, 1, 16, 16)), physics)


@pytest.mark.parametrize("template,remedy", [(DEProx, "use stepsize=0.25"), (DEGrad, "use stepsize=0.2")])
def test_a_stepsize_that_diverges_is_explained(template, remedy):
    physics = MatrixPhysics(2 * torch.eye(16), 4)  # squared norm 4
    model = DEQReconstructor(template(nn.Identity(), stepsize=1.0), solver=Solver("fixed_point_iter", max_iter=30))
    with pytest.warns(ConvergenceWarning, match=f"diverges for this operator, whose squared norm is 4 .*{remedy}"):
        model(torch.rand(2, 16), physics)


def test_the_diagnosis_leaves_the_random_generators_alone_and_never_crashes():
    physics = MatrixPhysics(2 * torch.eye(16), 4)
    model = DEQReconstructor(DEProx(nn.Identity()), solver=Solver("fixed_point_iter", max_iter=3))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.warns(ConvergenceWarning, match="diverges"):
        model(torch.ones(2, 16), physics)
    assert torch.rand(1) == expected
    mask = (torch.rand(3, 2, 8, 8) > 0.5).float()  # one mask per sample, as deepinv's generators make them
    mri = MRI(mask=mask, img_size=(2, 8, 8))
    model = DEQReconstructor(DEProx(nn.Identity(), stepsize=3.0), solver=Solver("fixed_point_iter", max_iter=3))
    with pytest.warns(ConvergenceWarning, match="use stepsize=1"):
        model(mri.A(torch.rand(3, 2, 8, 8)), mri, init=torch.ones(3, 2, 8, 8))


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


def test_a_failure_that_is_not_the_stepsizes_is_not_blamed_on_it():
    model, physics, _, y = imaging()
    model.solver = Solver("anderson", max_iter=2, tol=1e-12)
    with pytest.warns(ConvergenceWarning) as caught:
        model(y, physics)
    assert "stepsize" not in str(caught[0].message)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(1), nn.Dropout(0.5)])
def test_layers_that_make_the_fixed_point_ill_defined_warn_once(layer):
    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 4, 4))
    y = physics.A(torch.rand(2, 1, 4, 4))
    iteration = DEProx(nn.Sequential(layer, nn.Tanh()))
    with pytest.warns(UserWarning, match="training mode"):
        iteration.bind(y, physics)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iteration.bind(y, physics)
        DEProx(nn.Sequential(layer, nn.Tanh())).eval().bind(y, physics)
        DEProx(EquilibriumUNet(channels=(2, 4))).bind(y, physics)


def test_binding_does_not_change_modules():
    model, physics, _, y = imaging()
    before = {k: v.clone() for k, v in [*model.state_dict().items(), *physics.state_dict().items()]}
    f = model.iteration.bind(y.requires_grad_(), physics)
    f.rebind([torch.zeros_like(t) for t in f.inputs])(torch.zeros(2, 1, 4, 4, dtype=F64))
    after = {**model.state_dict(), **physics.state_dict()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


# Restricted to samples ---------------------------------------------------------------------------------------------


def per_sample_physics():
    r"""Four samples, each with a mask of its own, of images of as many pixels across as there are samples."""
    mask = (torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4).to(F64)
    return Inpainting((1, 4, 4), mask=mask)


def angles_as_many_as_samples():
    physics = Tomography(torch.arange(4) * 45.0, 4, circle=False, normalize=False, adjoint_via_backprop=True)
    return SparseLinearPhysics.from_physics(physics, (1, 4, 4)).to(F64)


class NamedAngles(MatrixPhysics):
    r"""Keeps a tensor as long as the batch that is none of its samples'."""

    def __init__(self):
        super().__init__(torch.eye(16, dtype=F64), 4)
        self.register_buffer("weights", torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=F64))

    def A(self, x, **_):
        return super().A(x) * self.weights.sum()

    def A_adjoint(self, y, **_):
        return super().A_adjoint(y) * self.weights.sum()


@pytest.mark.parametrize("make", [per_sample_physics, angles_as_many_as_samples, NamedAngles])
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])])
def test_a_part_of_the_batch_is_evaluated_by_itself(make, rows):
    physics, template = make(), imaging(DEGrad)[0].iteration
    x = torch.rand(4, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    f = template.bind(physics.A(x), physics)
    assert f.separable(x)
    part = f.select(rows)
    torch.testing.assert_close(part(x[rows]), f(x)[rows])
    torch.testing.assert_close(part.select(slice(1, 2))(x[rows][1:]), f(x)[rows][1:])
    leaves = [t.detach().clone().requires_grad_() for t in part.inputs]
    torch.testing.assert_close(part.rebind(leaves)(x[rows]), f(x)[rows])


def test_whether_a_map_can_be_restricted_is_measured_once():
    model, physics, x, _ = imaging(batch=4)
    calls = []
    model.iteration.denoiser.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    for _ in range(3):  # other measurements of the same make
        x = x.flip(0)
        assert model.iteration.bind(physics.A(x), physics).separable(x)
    assert calls == [4, 1]
    assert model.iteration.bind(physics.A(x[:3]), physics).separable(x[:3]) and calls[2:] == [3, 1]


def test_a_map_that_couples_its_samples_is_not_restricted():
    _, physics, x, y = imaging(batch=4)
    coupled = nn.BatchNorm2d(1).to(F64)
    with pytest.warns(UserWarning, match="couples the samples"):
        f = DEProx(coupled).bind(y, physics)
    assert not f.separable(x)
    model = DEQReconstructor(DEProx(coupled.eval()), solver=Solver(chunk_size=1, max_iter=3, on_failure="ignore"))
    assert model.iteration.bind(y, physics).separable(x)  # in evaluation mode, it does not


def test_nothing_is_concluded_from_a_map_that_is_nan():
    model, physics, x, y = imaging(batch=4)
    bias = model.iteration.denoiser.conv.bias
    before = bias.detach().clone()
    torch.nn.init.constant_(bias, torch.nan)
    assert not model.iteration.bind(y, physics).separable(x)
    with torch.no_grad():
        bias.copy_(before)
    assert model.iteration.bind(y, physics).separable(x)


# Preconditioning ---------------------------------------------------------------------------------------------------


def blur(side=16):
    kernel = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]], dtype=F64)[None, None] / 6
    return BlurFFT((1, side, side), filter=kernel.float()).to(F64)


def test_the_spectrum_of_a_filter_is_exact():
    physics, x = blur(), torch.rand(3, 1, 16, 16, dtype=F64)
    model = spectrum(physics, x)
    again = torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)) * model, s=x.shape[2:], dim=(2, 3))
    torch.testing.assert_close(again, physics.A_adjoint_A(x), atol=1e-6, rtol=1e-5)


def test_the_preconditioner_inverts_a_linear_iteration():
    physics, x = blur(), torch.rand(3, 1, 16, 16, dtype=F64)

    class Nothing(nn.Module):
        def forward(self, x):
            return 0 * x

    template = DEGrad(Nothing(), stepsize=0.1, data_weight=5.0).to(F64)
    f = template.bind(physics.A(x), physics)
    inverse = f.preconditioner(x)
    z = torch.zeros_like(x)
    torch.testing.assert_close(inverse(x - (f(x) - f(z))), x, atol=1e-5, rtol=1e-5)
    for precondition, most in ((True, 4), (False, 50)):
        _, stat = Solver("anderson", tol=1e-6, precondition=precondition)(f, z)
        assert stat.converged.all() and stat.evaluations <= most
    assert stat.evaluations > 10


def test_physics_that_are_no_filters_get_no_preconditioner():
    x = torch.rand(2, 1, 16, 16)
    inpainting = Inpainting((1, 16, 16), mask=(torch.rand(1, 16, 16) > 0.5).float())
    assert spectrum(inpainting, x) is None
    assert DEGrad(nn.Identity()).bind(inpainting.A(x), inpainting).preconditioner(x) is None
    assert imaging(DEProx)[0].iteration.preconditioner(x, inpainting) is None
    assert spectrum(inpainting, x.cfloat()) is None


def test_the_spectrum_is_kept_until_the_physics_changes_and_is_each_samples_own():
    physics = MRI(mask=torch.ones(1, 1, 8, 8), img_size=(2, 8, 8))
    x, calls = torch.rand(2, 2, 8, 8), []
    adjoint = physics.A_adjoint_A
    physics.A_adjoint_A = lambda x: calls.append(len(x)) or adjoint(x)
    state = torch.get_rng_state()
    first = spectrum(physics, x)
    assert spectrum(physics, x + 1) is first and set(calls) == {1}
    assert torch.equal(torch.get_rng_state(), state)
    mask = torch.ones(2, 1, 8, 8)
    mask[1, ..., ::2] = 0
    count = len(calls)
    physics.update(mask=mask)
    both = spectrum(physics, x)
    assert len(calls) == 2 * count and both.shape[0] == 2
    torch.testing.assert_close(both[:1], first)
    physics.update(mask=mask[1:])
    torch.testing.assert_close(spectrum(physics, x), both[1:])


def test_a_sample_without_a_filter_does_not_cost_the_others_theirs():
    mask = torch.ones(2, 1, 16, 16)
    mask[1] = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    physics, x = Inpainting((1, 16, 16), mask=mask), torch.rand(2, 1, 16, 16)
    eigenvalues = spectrum(physics, x)
    torch.testing.assert_close(eigenvalues[0], torch.ones_like(eigenvalues[0]))
    assert eigenvalues[1].isnan().all()
    inverse = DEGrad(nn.Identity(), stepsize=0.25).preconditioner(x, physics)
    torch.testing.assert_close(inverse(x), x * torch.tensor([2.0, 1.0]).reshape(2, 1, 1, 1))


def test_a_bound_map_does_not_keep_the_measurements_alive():
    model, physics, _, y = imaging()
    f = model.iteration.bind(y, physics)
    assert f.diagnose() == ""
    gone = weakref.ref(y)
    del y
    assert gone() is None and f.diagnose() == ""
