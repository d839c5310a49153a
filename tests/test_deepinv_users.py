r"""What a user of deepinv needs: lists of measurements, plots, non-linear physics, weights and warnings."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch
from deepinv.models import ArtifactRemoval, UNet
from deepinv.optim import L2, PGD
from deepinv.optim.data_fidelity import AmplitudeLoss
from deepinv.optim.prior import PnP, ZeroPrior
from torch import nn

from deepinv_deq import ConvergenceWarning, DEGrad, DEProx, DEQReconstructor, FromOptim, Solver
from tests.levels import TEMPLATES, LevelOfDeepinv, exact
from tests.problems import F64, SmallDenoiser, imaging, relative_error


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_list_of_measurements_for_a_stacked_physics(template):
    _, first, x, _ = imaging(seed=0)
    _, second, _, _ = imaging(seed=1)
    physics = dinv.physics.stack(first, second)
    y = physics.A(x)
    model = exact(template(SmallDenoiser(), stepsize=0.2))
    expected = model(y, physics)
    for given in ([y[0], y[1]], (y[0], y[1])):
        torch.testing.assert_close(model(given, physics), expected, rtol=0, atol=0)
        certificate = model.eval().certify(list(given), physics, products=2)
        assert relative_error(certificate.x, expected) <= 1e-10
    with pytest.raises(ValueError, match=r"stacked physics has 2 parts, but the measurements are \[Tensor\]"):
        model([y[0]], physics)
    with pytest.raises(TypeError, match="measurements of MatrixPhysics must be a tensor, got a list of 2"):
        model([y[0], y[1]], first)


# -- plots ----------------------------------------------------------------------


def test_plot_parameters(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    pgd = PGD(prior=PnP(LevelOfDeepinv()), data_fidelity=L2(), stepsize=0.5, sigma_denoiser=0.7)
    for iteration in (
        DEProx(SmallDenoiser(), stepsize=0.5, learn_stepsize=True),
        DEGrad(SmallDenoiser(3), stepsize=torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)),
        FromOptim(pgd, trainable=["stepsize"]),
    ):
        model = DEQReconstructor(iteration)
        before = {name: [float(torch.as_tensor(v[0]).detach().mean())] for name, v in model.params_algo.items()}
        assert "stepsize" in before
        dinv.utils.plot_parameters(model, init_params=before, save_dir=tmp_path, show=False)
        assert list(tmp_path.iterdir())


# -- non-linear physics ---------------------------------------------------------


def test_non_linear_physics_is_sent_to_from_optim():
    physics = dinv.physics.RandomPhaseRetrieval(m=40, img_size=(1, 4, 4))
    y = physics(torch.ones(1, 1, 4, 4, dtype=torch.cfloat))
    for template in TEMPLATES:
        with pytest.raises(TypeError, match="needs a linear operator.*RandomPhaseRetrieval is not.*FromOptim"):
            DEQReconstructor(template(nn.Identity()))(y, physics)


def phase_retrieval(batch=2):
    rng = torch.Generator().manual_seed(0)
    physics = dinv.physics.RandomPhaseRetrieval(m=1280, img_size=(1, 8, 8), rng=rng)
    x = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(torch.cfloat)
    return physics, x, physics(x)


def correlation(a, b):
    return float((torch.linalg.vecdot(a.flatten(1), b.flatten(1)).abs() / (norm(a) * norm(b))).min().detach())


def norm(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def test_phase_retrieval_starts_at_the_spectral_estimate():
    physics, x, y = phase_retrieval()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    iteration = FromOptim(PGD(prior=ZeroPrior(), data_fidelity=AmplitudeLoss(), stepsize=0.3))
    model = DEQReconstructor(iteration, solver=Solver("fixed_point_iter", max_iter=400))
    assert torch.equal(torch.random.get_rng_state(), before)
    start = iteration.init(y, physics)
    assert torch.equal(start, iteration.init(y, physics))  # not random
    assert correlation(start, x) > 0.85 > 0.3 > correlation(physics.A_adjoint(y), x)
    assert correlation(model(y, physics), x) > 0.99 and bool(model.forward_stat.converged.all())
    own = FromOptim(PGD(prior=ZeroPrior(), data_fidelity=L2(), stepsize=0.3, custom_init=lambda y, physics: 2 * x))
    assert torch.equal(own.init(y, physics), 2 * x)


class Saturating(dinv.physics.Physics):
    def A(self, x, **kwargs):
        return torch.tanh(x)


def test_physics_without_an_adjoint():
    physics, x = Saturating(), torch.rand(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = physics(x)
    pgd = {"prior": PnP(LevelOfDeepinv()), "data_fidelity": L2(), "stepsize": 0.5, "sigma_denoiser": 0.7}
    with pytest.raises(TypeError, match="Saturating has no adjoint and no A_dagger.*custom_init=.*init="):
        exact(FromOptim(PGD(**pgd)))(y, physics)
    expected = exact(FromOptim(PGD(**pgd, custom_init=lambda y, physics: y)))(y, physics)
    torch.testing.assert_close(exact(FromOptim(PGD(**pgd)))(y, physics, init=y), expected)
    for _ in range(300):
        x = LevelOfDeepinv()(x - 0.5 * (1 - physics.A(x) ** 2) * (physics.A(x) - y), 0.7)
    assert relative_error(expected, x) <= 1e-10


# -- weights --------------------------------------------------------------------


def test_weights_of_deepinvs_trained_models_move_over_in_one_line():
    torch.manual_seed(0)
    trained = ArtifactRemoval(UNet(1, 1, channels_per_scale=(4, 8), batch_norm=False))
    model = DEQReconstructor(DEProx(trained.backbone_net, stepsize=0.5))
    x = torch.rand(1, 1, 8, 8)
    f = model.iteration.bind(x, dinv.physics.Denoising())
    torch.testing.assert_close(f(x), trained.backbone_net(x))
    unfolded = PGD(
        prior=PnP(LevelOfDeepinv()), data_fidelity=L2(), stepsize=0.4, sigma_denoiser=0.7, max_iter=4, unfold=True
    )
    same = DEQReconstructor(FromOptim(unfolded))
    names = {name.rpartition(".")[2] for name, p in same.named_parameters() if p.requires_grad}
    assert "stepsize" in names and "g_param" in names
    assert same.iteration.networks()[0] is unfolded.prior[0].denoiser


# -- warnings -------------------------------------------------------------------


def test_a_missed_tolerance_is_warned_of_again_where_it_is_ten_times_worse():
    solver = Solver("fixed_point_iter", max_iter=3, tol=1e-6)

    def warnings_of(rate):
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, stat = solver(lambda x: rate * x + 1, torch.zeros(1, 1, dtype=F64))
        return len([w for w in caught if issubclass(w.category, ConvergenceWarning)]), float(stat.residual)

    first, residual = warnings_of(0.01)
    again, same = warnings_of(0.01)
    worse, tenfold = warnings_of(0.3)
    third, _ = warnings_of(0.31)
    assert (first, again, worse, third) == (1, 0, 1, 0) and same == residual and tenfold > 10 * residual
