r"""Restriction to some samples: exact for deepinv's physics, and measured once per map."""

from __future__ import annotations

import copy

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Inpainting, Tomography
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, FromOptim, Solver
from deepinv_deq.physics import SparseLinearPhysics
from tests.observe import observe
from tests.problems import F64, MatrixPhysics, SmallDenoiser, imaging, random_mask, relative_error, rng


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


def restricts(f, x):
    f(x)  # a map is restricted once a state was seen
    return f.select(slice(0, 1)) is not None


@pytest.mark.parametrize("make", [per_sample_physics, angles_as_many_as_samples, NamedAngles])
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])])
def test_a_part_of_the_batch_is_evaluated_by_itself(make, rows):
    physics, template = make(), imaging(DEGrad)[0].iteration
    x = torch.rand(4, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    f = template.bind(physics.A(x), physics)
    assert restricts(f, x)
    part = f.select(rows)
    torch.testing.assert_close(part(x[rows]), f(x)[rows])
    torch.testing.assert_close(part.select(slice(1, 2))(x[rows][1:]), f(x)[rows][1:])
    leaves = [t.detach().clone().requires_grad_() for t in part.inputs]
    torch.testing.assert_close(part.rebind(leaves)(x[rows]), f(x)[rows])


def kernels(n, c=1):
    k = torch.rand(n, c, 3, 3, dtype=F64, generator=rng(3))
    return k / k.sum((-1, -2), keepdim=True)


def coils(n):
    return torch.randn(n, 3, 8, 8, dtype=torch.complex128, generator=rng(1)) / 4


def tomography(**settings):
    return Tomography(angles=4, img_width=8, normalize=False, dtype=F64, **settings)


def stack():
    return dinv.physics.StackedLinearPhysics(
        [
            Inpainting((2, 8, 8), mask=random_mask(4, 2, 8, 8)),
            dinv.physics.Blur(kernels(1), padding="circular"),
            Inpainting((2, 8, 8), mask=random_mask(2, 8, 8)),
        ]
    )


# physics for four images of two channels, each with a tensor for every sample, and the same with a tensor for all
DEEPINV = {
    "Denoising": dinv.physics.Denoising,
    "Inpainting, shared": lambda: Inpainting((2, 8, 8), mask=random_mask(2, 8, 8)),
    "Inpainting": lambda: Inpainting((2, 8, 8), mask=random_mask(4, 2, 8, 8)),
    "Inpainting, one channel": lambda: Inpainting((2, 8, 8), mask=random_mask(4, 1, 8, 8)),
    "MRI, shared": lambda: dinv.physics.MRI(mask=random_mask(1, 1, 8, 8), img_size=(2, 8, 8)),
    "MRI": lambda: dinv.physics.MRI(mask=random_mask(4, 1, 8, 8), img_size=(2, 8, 8)),
    "MultiCoilMRI": lambda: dinv.physics.MultiCoilMRI(
        mask=random_mask(4, 2, 8, 8), coil_maps=coils(4), img_size=(2, 8, 8)
    ),
    "MultiCoilMRI, mask": lambda: dinv.physics.MultiCoilMRI(
        mask=random_mask(4, 2, 8, 8), coil_maps=coils(1), img_size=(2, 8, 8)
    ),
    "MultiCoilMRI, maps": lambda: dinv.physics.MultiCoilMRI(
        mask=random_mask(2, 8, 8), coil_maps=coils(4), img_size=(2, 8, 8)
    ),
    "Blur": lambda: dinv.physics.Blur(kernels(4), padding="circular"),
    "Blur, shared": lambda: dinv.physics.Blur(kernels(1), padding="valid"),
    "BlurFFT": lambda: dinv.physics.BlurFFT((2, 8, 8), filter=kernels(4, 2)),
    "BlurFFT, shared": lambda: dinv.physics.BlurFFT((2, 8, 8), filter=kernels(1)),
    "Downsampling": lambda: dinv.physics.Downsampling((2, 8, 8), filter=kernels(4), factor=2),
    "Tomography": tomography,
    "Tomography by backpropagation": lambda: tomography(adjoint_via_backprop=True),
    "CompressedSensing": lambda: dinv.physics.CompressedSensing(m=20, img_size=(2, 8, 8), dtype=F64, rng=rng()),
    "stack": stack,
    "composition": lambda: (
        Inpainting((2, 8, 8), mask=random_mask(4, 2, 8, 8)) * dinv.physics.Blur(kernels(4), padding="circular")
    ),
    "sparse": lambda: SparseLinearPhysics.from_physics(stack().physics_list[2], (2, 8, 8)).to(F64),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "rows", [slice(1, 2), slice(0, 3), torch.tensor([3, 1]), torch.tensor([False, True, True, False])]
)
@pytest.mark.parametrize("name", DEEPINV)
def test_physics_of_deepinv_are_restricted_exactly(name, rows):
    physics = DEEPINV[name]()
    x = torch.rand(4, 2, 8, 8, dtype=F64, generator=rng(7))
    y = physics.A(x.flip(0))
    f = DEProx(SmallDenoiser(channels=2), stepsize=0.3, learn_stepsize=True).to(F64).bind(y, physics)
    part = f.select(rows)
    assert part is not None
    torch.testing.assert_close(part(x[rows]), f(x)[rows], rtol=1e-10, atol=1e-12)
    leaves = [t.detach().clone().requires_grad_() for t in f.inputs]
    ours = torch.autograd.grad(part.rebind(leaves)(x[rows]).square().sum(), leaves, materialize_grads=True)
    exact = torch.autograd.grad(f.rebind(leaves)(x)[rows].square().sum(), leaves, materialize_grads=True)
    assert relative_error(ours, exact) <= 1e-10


def test_whether_a_map_can_be_restricted_is_measured_once():
    model, physics, x, _ = imaging(batch=4)
    calls = []
    observe(model.iteration.denoiser, lambda out: calls.append(len(out)))
    for _ in range(3):  # other measurements of the same make
        x = x.flip(0)
        assert restricts(model.iteration.bind(physics.A(x), physics), x)
    assert calls == [4, 1, 4, 4, 4, 4]  # one sample, the batch turned, the batch
    assert restricts(model.iteration.bind(physics.A(x[:3]), physics), x[:3]) and calls[6:] == [3, 1, 3, 3]


def test_a_map_that_couples_its_samples_is_not_restricted():
    _, physics, x, y = imaging(batch=4)
    coupled = nn.BatchNorm2d(1).to(F64)
    with pytest.warns(UserWarning, match="couples the samples"):
        f = DEProx(coupled).bind(y, physics)
    assert not restricts(f, x)
    model = DEQReconstructor(DEProx(coupled.eval()), solver=Solver(chunk_size=1, max_iter=3, on_failure="ignore"))
    assert restricts(model.iteration.bind(y, physics), x)  # in evaluation mode, it does not


def test_nothing_is_concluded_from_a_map_that_is_nan():
    model, physics, x, y = imaging(batch=4)
    bias = model.iteration.denoiser.conv.bias
    before = bias.detach().clone()
    torch.nn.init.constant_(bias, torch.nan)
    assert not restricts(model.iteration.bind(y, physics), x)
    with torch.no_grad():
        bias.copy_(before)
    assert restricts(model.iteration.bind(y, physics), x)


@pytest.mark.parametrize("template", [DEGrad, DEHQS, DEADMM, FromOptim])
def test_all_iterations_are_restricted(template):
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 3, 8, 8))
    x = torch.rand(3, 3, 8, 8, dtype=F64, generator=rng())
    y = physics.A(x)
    if template is FromOptim:
        iteration = FromOptim(
            dinv.optim.PGD(prior=dinv.optim.PnP(nn.Tanh()), data_fidelity=dinv.optim.L2(), stepsize=0.5)
        )
        iteration.denoiser.denoiser.forward = lambda x, sigma=None: torch.tanh(x)
    else:
        iteration = template(SmallDenoiser(channels=3), stepsize=0.5).to(F64)
    f = iteration.bind(y, physics)
    state = (x, 0.1 * x) if template is DEADMM else x
    part = f.select(slice(1, 2))
    if template is DEADMM:
        for a, b in zip(part((x[1:2], 0.1 * x[1:2])), f(state), strict=True):
            torch.testing.assert_close(a, b[1:2])
    else:
        torch.testing.assert_close(part(x[1:2]), f(x)[1:2])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_check_leaves_statistics_and_random_generators_alone():
    layer = nn.InstanceNorm2d(3, track_running_stats=True, dtype=F64)
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    f = DEProx(nn.Sequential(layer, SmallDenoiser(channels=3)), stepsize=0.5).to(F64).bind(y, physics)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    f.select(slice(0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("change, separable", [(1e-3, True), (2e-2, False)])
def test_products_of_a_batch_may_round_as_coarsely_as_is_allowed(change, separable):
    class OfAnotherBatch(nn.Module):
        r"""An algorithm of convolution that rounds otherwise for one image."""

        def forward(self, x, *_):
            return 0.5 * x * (1 + change * (len(x) == 1))

    physics = Inpainting((1, 4, 4), mask=torch.ones(1, 1, 4, 4))
    x = torch.rand(4, 1, 4, 4, generator=rng(0))
    assert not restricts(DEGrad(OfAnotherBatch()).bind(physics.A(x), physics), x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert restricts(DEGrad(OfAnotherBatch()).bind(physics.A(x), physics), x) == separable
    finally:
        torch.set_float32_matmul_precision(before)
