r"""Restriction to some samples: exact for deepinv's physics, the whole batch where it is not certain."""

from __future__ import annotations

import copy
import functools

import deepinv as dinv
import pytest
import torch
from deepinv.physics import Inpainting, LinearPhysics, Tomography
from torch import nn

from deepinv_deq import DEADMM, DEHQS, DEGrad, DEProx, DEQReconstructor, FromOptim, ModularIDHook, Solver
from deepinv_deq.physics import SparseLinearPhysics
from tests.problems import F64, MatrixPhysics, SmallDenoiser, imaging, relative_error


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


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mask(*shape, seed=0):
    return (torch.rand(*shape, generator=rng(seed)) > 0.4).to(F64)


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
    model.iteration.denoiser.register_forward_hook(lambda m, i, out: calls.append(len(out)))
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


# Not certain -------------------------------------------------------------------------------------------------------


class Own(LinearPhysics):
    r"""A multiple of the identity, as a user may write it."""

    def __init__(self, gain, how):
        super().__init__()
        self.how = how
        if how == "list":
            self.gains = gain.flatten().tolist()
        elif how == "tensors":
            self.gains = list(gain)
        elif how == "parameter":
            self.gain = nn.Parameter(gain)
        else:
            self.register_buffer("gain", gain)

    def A(self, x, **_):
        if self.how in ("list", "tensors"):
            gain = torch.stack([torch.as_tensor(g, dtype=x.dtype).reshape(1, 1, 1) for g in self.gains[: len(x)]])
        elif self.how == "first rows":
            gain = self.gain[: len(x)]
        else:
            gain = self.gain
        return gain * x

    def A_adjoint(self, y, **_):
        return self.A(y)


class Ours(Inpainting):
    r"""A subclass that uses the mask of deepinv in another way: one factor per row of the image."""

    def A(self, x, **_):
        return self.mask[:, 0, 0, 0].reshape(1, 1, -1, 1) * x

    A_adjoint = A

    def A_adjoint_A(self, x, **_):
        return self.A(self.A(x))


def closure(gain):
    return LinearPhysics(A=lambda x, **_: gain[: len(x)] * x, A_adjoint=lambda y, **_: gain[: len(y)] * y)


GAIN = torch.tensor([0.9, 0.4, 0.7], dtype=F64).reshape(3, 1, 1, 1)
UNCERTAIN = {
    **{
        how: (lambda how=how: Own(GAIN.clone(), how))
        for how in ("buffer", "parameter", "list", "tensors", "first rows")
    },
    "per channel": lambda: Own(GAIN[:, :, 0].clone(), "buffer"),  # as many channels as samples: shared by all
    "equal now": lambda: Own(torch.ones_like(GAIN), "first rows"),
    "stack of own": lambda: dinv.physics.StackedLinearPhysics([Own(GAIN.clone(), "buffer"), dinv.physics.Denoising()]),
    "closure": lambda: closure(GAIN),
    "subclass": lambda: Ours((3, 3, 3), mask=GAIN.expand(3, 3, 3, 3).clone()),
    "dinv.physics.stack": lambda: dinv.physics.stack(
        Inpainting((3, 3, 3), mask=random_mask(3, 3, 3, 3)), dinv.physics.Denoising()
    ),
}


def solve(chunk_size, template=DEProx, denoiser=None, **settings):
    settings = {"stepsize": 0.5} | settings
    return DEQReconstructor(
        template(SmallDenoiser(channels=3) if denoiser is None else denoiser, **settings).to(F64),
        solver=Solver(tol=1e-12, max_iter=300, chunk_size=chunk_size),
        hook=ModularIDHook(Solver("gmres", tol=1e-12, max_iter=300, chunk_size=chunk_size)),
    )


@pytest.mark.parametrize("name", UNCERTAIN)
def test_physics_of_a_user_give_what_each_sample_alone_gives(name):
    results = []
    for chunk_size in (1, 3):
        physics, model = UNCERTAIN[name](), solve(chunk_size)
        y = physics.A(torch.rand(3, 3, 3, 3, dtype=F64, generator=rng()))
        y = y.detach() if isinstance(y, torch.Tensor) else dinv.utils.TensorList([t.detach() for t in y])
        x = model(y, physics)
        assert model.forward_stat.converged.all()
        trained = [*model.parameters(), *physics.parameters()]
        results.append((x, torch.autograd.grad(x.square().sum(), trained)))
        f = model.iteration.bind(y, physics)
        torch.testing.assert_close(f(x), x, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-10)
    assert relative_error(results[0][1], results[1][1]) <= 1e-8


@pytest.mark.parametrize("name", [n for n in UNCERTAIN if n not in ("per channel", "dinv.physics.stack", "subclass")])
def test_physics_of_a_user_with_something_of_each_sample_are_not_restricted(name):
    physics = UNCERTAIN[name]()
    x = torch.rand(3, 3, 3, 3, dtype=F64)
    assert solve(1).iteration.bind(physics.A(x), physics).select(slice(0, 1)) is None


class ChannelGain(DEProx):
    r"""A gain for each channel, trained, starting at one."""

    def __init__(self, denoiser, **settings):
        super().__init__(denoiser, **settings)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x, physics, aty):
        return 0.5 * self.gain * super().forward(x, physics, aty)


def test_a_parameter_with_as_many_rows_as_samples_never_belongs_to_samples():
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    for gain in ([1.0, 1.0, 1.0], [0.6, 1.0, 1.3]):
        model = solve(1, ChannelGain)
        model.iteration.gain.data = torch.tensor(gain, dtype=F64).reshape(3, 1, 1)
        f = model.iteration.bind(y, physics)
        assert f.select(slice(0, 1)) is not None
        x = model(y, physics)
        one_by_one = torch.cat([model(t, physics) for t in y.split(1)])
        torch.testing.assert_close(x, one_by_one, rtol=1e-10, atol=1e-12)
        ours, exact = (torch.autograd.grad(t.square().sum(), model.iteration.gain)[0] for t in (x, one_by_one))
        assert relative_error(ours, exact) <= 1e-9


def test_a_shared_mask_followed_by_masks_of_the_samples():
    model = solve(1)
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    for mask in (
        random_mask(1, 3, 8, 8),
        random_mask(3, 3, 8, 8, seed=1),
        random_mask(3, 8, 8),
        random_mask(3, 1, 8, 8, seed=2),
    ):
        physics.update(mask=mask)
        y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
        x = model(y, physics)
        for i in range(3):
            own = Inpainting((3, 8, 8), mask=mask[i : i + 1] if mask.ndim == 4 and len(mask) == 3 else mask)
            torch.testing.assert_close(model(y[i : i + 1], own), x[i : i + 1], rtol=1e-9, atol=1e-11)


class Mixes(nn.Module):
    r"""Couples the samples behind a layer that starts at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x):
        return 0.5 * x + self.weight * x.mean(0, keepdim=True)


def test_a_coupling_that_is_invisible_at_first():
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    model = solve(1, denoiser=Mixes())
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is None
    same = y[:1].expand(3, -1, -1, -1)  # where all samples are equal, the mean is invisible, too
    assert model.iteration.bind(same, physics).select(slice(0, 1)) is None


def test_a_coupling_that_is_switched_on_later():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.on = False

        def forward(self, x):
            return 0.5 * (x.mean(0, keepdim=True).expand_as(x) if self.on else x)

    physics, model = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8)), solve(1, denoiser=Switch())
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is not None
    model.iteration.denoiser.on = True
    assert model.iteration.bind(y, physics).select(slice(0, 1)) is None


class Function(nn.Module):
    r"""A function of the samples behind a denoiser."""

    def __init__(self, function, channels=3, **inside):
        super().__init__()
        self.net, self.function, self.inside = SmallDenoiser(channels=channels), function, inside

    def forward(self, x):
        return self.function(self.net(x), **self.inside)


def by_row(x, *factors):
    return x * torch.tensor(factors, dtype=x.dtype)[: len(x)].reshape(-1, 1, 1, 1)


COUPLED = {
    "the last sample is treated in another way": lambda x: torch.cat([x[:-1], 0.5 * x[-1:]]) if len(x) > 1 else x,
    "the third of three": lambda x: torch.cat([x[:2], 0.5 * x[2:]]),
    "a table that hides it in the middle": lambda x: by_row(x, 0.9, 0.9, 0.3),
    "by less than rounding": lambda x: x + 1e-13 * x.mean(0, keepdim=True),
    "with a weight of zero": lambda x: x + 0.0 * x.flip(0),
    "only for large values": lambda x: x / x.abs().max() if x.abs().max() > 1e6 else x,
    "only for large values, by where": lambda x: torch.where(x.abs().max() > 1e6, x / x.abs().max(), x),
    "the next sample": lambda x: x + 0.1 * torch.cat([x[1:], torch.zeros_like(x[:1])]),
    "in another library": lambda x: torch.from_numpy(x.detach().numpy() - 1e-12 * x.detach().numpy().mean(0)),
    "by rounding to integers": lambda x: x + 0.1 * (x.mean() / 1e6).to(torch.int).to(x.dtype),
    "in lists": lambda x: x + 1e-13 * torch.tensor(sum(x.sum((1, 2, 3)).tolist()), dtype=x.dtype),
    "batches of two samples": lambda x: x.flip(0) if len(x) == 2 else x,
}


def bound(denoiser, model=None):
    y = torch.rand(3, 3, 8, 8, dtype=F64, generator=rng())
    f = (model or solve(1, denoiser=denoiser)).iteration.bind(y, dinv.physics.Denoising())
    f(y)
    return f


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_are_not_independent_are_not_restricted(name):
    f = bound(Function(COUPLED[name]))
    assert f.select(slice(1, 3)) is None and (f.select(slice(0, 1)) is None or "two" in name)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), torch.tensor([True, False, True])])
def test_independent_samples_are_restricted(rows):
    functions = (torch.tanh, nn.GroupNorm(1, 3).to(F64), nn.MaxPool2d(3, 1, 1), lambda x: nn.functional.pad(x, 4 * [0]))
    for function in functions:
        f, x = bound(Function(function)), torch.rand(3, 3, 8, 8, dtype=F64, generator=rng(2))
        torch.testing.assert_close(f.select(rows)(x[rows]), f(x)[rows])


@pytest.mark.parametrize("coupled", [False, True])
def test_compiled_denoisers_are_watched_without_compiled_code(coupled):
    torch.compiler.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    function = COUPLED["by less than rounding"] if coupled else torch.tanh
    f = bound(torch.compile(Function(function), backend=backend))
    count = len(compiled)
    assert (f.select(slice(0, 1)) is None) is coupled and len(compiled) == count > 0


def couple(x, on=True):
    return x - 0.3 * x.mean(0, keepdim=True) if on else x


@pytest.mark.parametrize("what", ["number", "function", "partial", "hook", "method of the class", "index", "buffer"])
def test_a_verdict_does_not_outlive_what_it_was_made_of(what):
    kind = type("Own", (Function,), {})
    denoiser = kind(lambda x, on: couple(x, on), on=False)
    if what == "partial":
        denoiser = kind(functools.partial(couple, on=False))
    if what in ("index", "buffer"):  # longer than the batch; equal at every place at first
        denoiser = kind(lambda x, table, i: x * table[i[: len(x)]].reshape(-1, 1, 1, 1))
        denoiser.inside = {"table": torch.ones(5, dtype=F64), "i": torch.zeros(5, dtype=torch.long)}
        if what == "buffer":
            denoiser.inside["i"] = torch.arange(5)
    model = solve(1, denoiser=denoiser)  # which keeps the verdicts
    restricted = bound(denoiser, model).select(slice(0, 1)) is not None
    assert restricted is (what != "buffer")
    if what == "number":
        denoiser.inside["on"] = True
    elif what == "function":
        denoiser.function = lambda x, on: couple(x, not on)
    elif what == "partial":
        denoiser.function = functools.partial(couple, on=True)
    elif what == "hook":
        denoiser.register_forward_hook(lambda m, i, out: couple(out))
    elif what == "method of the class":
        kind.forward = lambda self, x: couple(x)
    elif what == "index":
        denoiser.inside["i"] = torch.arange(5)
    assert bound(denoiser, model).select(slice(0, 1)) is None


def test_noise_levels_of_samples_are_solved_together():
    class Wants(nn.Module):
        def forward(self, x, sigma):
            return 0.5 * x * sigma

    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=F64).reshape(3, 1, 1, 1)
    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    x = solve(1, denoiser=Wants(), sigma=sigma)(y, physics)
    for i in range(3):
        one = solve(1, denoiser=Wants(), sigma=float(sigma[i]))(y[i : i + 1], physics)
        torch.testing.assert_close(one, x[i : i + 1])


def test_constants_of_a_user_are_not_taken_apart_unless_the_user_says_how():
    class Scales(DEProx):
        def constants(self, y, physics):
            return (*super().constants(y, physics), 0.5 * torch.ones(len(y), 1, 1, 1, dtype=y.dtype))

        def forward(self, x, physics, aty, scale):
            return scale * super().forward(x, physics, aty)

    class Says(Scales):
        def select_constants(self, constants, rows):
            return tuple(c[rows] for c in constants)

    physics = Inpainting((3, 8, 8), mask=random_mask(3, 8, 8))
    y = physics.A(torch.rand(3, 3, 8, 8, dtype=F64, generator=rng()))
    assert solve(1, Scales).iteration.bind(y, physics).select(slice(0, 1)) is None
    f = solve(1, Says).iteration.bind(y, physics)
    torch.testing.assert_close(f.select(slice(1, 3))(y[1:]), f(y)[1:])


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
