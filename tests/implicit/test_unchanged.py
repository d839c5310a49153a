r"""A map that was changed between forward and backward is refused, also where no copy and no version counter can tell."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import Denoising, LinearPhysics

from deepinv_deq import DEProx, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.implicit.unchanged import Reached
from tests.problems import F64, SmallDenoiser, deq, rng


def in_a_closure():
    gain = 0.6

    class Gain(LinearPhysics):
        def A(self, x, **_):
            return gain * x

        A_adjoint = A

    def change(value):
        nonlocal gain
        gain = value

    return Gain(), change


def in_a_default():
    class Gain(LinearPhysics):
        def A(self, x, settings={"gain": 0.6}, **_):  # noqa: B006
            return settings["gain"] * x

        A_adjoint = A

    return Gain(), lambda value: Gain.A.__defaults__[0].update(gain=value)


def in_another_class():
    class Settings:
        gain = 0.6

    class Gain(LinearPhysics):
        def A(self, x, **_):
            return Settings.gain * x

        A_adjoint = A

    return Gain(), lambda value: setattr(Settings, "gain", value)


def in_the_data_of_a_tensor():
    gain = torch.full((1, 1, 6, 6), 0.6, dtype=F64)

    class Gain(LinearPhysics):
        def A(self, x, **_):
            return gain * x

        A_adjoint = A

    return Gain(), gain.data.fill_


@pytest.mark.parametrize("mode", ["implicit", "jfb"])
@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("make", [in_a_closure, in_a_default, in_another_class, in_the_data_of_a_tensor])
def test_a_change_that_nobody_could_copy_raises(make, chunk_size, mode):
    physics, change = make()
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng())
    model = DEQReconstructor(
        DEProx(SmallDenoiser(), stepsize=0.7).to(F64),
        solver=Solver(tol=1e-6, chunk_size=chunk_size),
        hook=ModularIDHook(Solver("gmres", tol=1e-5, chunk_size=chunk_size), mode=mode),
    )
    model(y, physics).sum().backward()
    loss = model(y, physics).sum()
    change(0.9)
    with pytest.raises(RuntimeError, match=r"changed since the forward pass: .* residual was .*e-\d+ then"):
        loss.backward()
    change(0.6)
    loss.backward()


def test_a_change_raises_under_create_graph_too():
    physics, change = in_a_closure()
    loss = deq(DEProx(SmallDenoiser(), stepsize=0.7))(torch.rand(1, 1, 6, 6, dtype=F64), physics).sum()
    change(0.9)
    with pytest.raises(RuntimeError, match="changed since the forward"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("max_iter", [1, 3])
def test_a_solve_that_did_not_converge_has_its_gradient(max_iter):
    model = deq(DEProx(SmallDenoiser(), stepsize=0.7))
    model.solver = Solver(tol=1e-12, max_iter=max_iter, on_failure="ignore")
    model(torch.rand(2, 1, 6, 6, dtype=F64), Denoising()).sum().backward()
    assert model.hook.stat.converged.all()


@pytest.mark.parametrize("batched", [True, False])
def test_a_callable_that_was_changed_raises(batched):
    weight, number = torch.nn.Parameter(torch.tensor(0.5, dtype=F64)), [1.0]
    hook = ModularIDHook(Solver("gmres", tol=1e-10, batched=batched))

    def f(x):
        return number[0] * weight * torch.cos(x)

    x_star, _ = Solver(tol=1e-12)(f, torch.zeros(2, 3, dtype=F64))
    hook(f, x_star).sum().backward()
    exact = 6 * torch.cos(x_star[0, 0]) / (1 + 0.5 * torch.sin(x_star[0, 0]))
    assert torch.isclose(weight.grad, exact)
    x_hat = hook(f, x_star)
    number[0] = 1.01
    with pytest.raises(RuntimeError, match="changed since .* its image has changed by 1.0e-02"):
        x_hat.sum().backward()
    number[0] = 1.0
    x_hat = hook(f, x_star)
    with torch.no_grad():
        weight.add_(1e-3)
    with pytest.raises(RuntimeError, match=r"changed since the forward|changed in place"):
        x_hat.sum().backward()


def test_every_sample_is_compared_with_its_own_residual():
    reached = Reached(torch.tensor([1e-6, 1e-1, torch.inf]), torch.float32)
    x = torch.ones(3, 1, 4, 4)
    reached.check(x, x * torch.tensor([1 + 1e-7, 1.5, torch.nan])[:, None, None, None], steps=False)
    reached.check(x, x * torch.tensor([1e-7, 0.5, torch.nan])[:, None, None, None], steps=True)
    reached.check(torch.zeros_like(x), torch.zeros_like(x), steps=False)
    for first in (1 + 1e-3, torch.nan):
        with pytest.raises(RuntimeError, match=r"was 1.0e-06 then, and is (1.0e-03|nan) now"):
            reached.check(x, x * torch.tensor([first, 1.5, 1.0])[:, None, None, None], steps=False)
    with pytest.raises(RuntimeError, match="was 1.0e-06 then"):
        reached.select(slice(0, 1)).check(x[:1], 1.5 * x[:1], steps=False)
    joint = Reached(torch.tensor([1e-6]), torch.float32)
    joint.check(x, x, steps=False)
    with pytest.raises(RuntimeError, match="was 1.0e-06 then"):
        joint.check(x, 1.1 * x, steps=False)


class Pair:
    r"""Two variables with different batch sizes, solved as one sample."""

    def __init__(self, weight):
        self.inputs, self.weight = (weight,), weight

    def __call__(self, x):
        return self.weight * torch.cos(x[0]) + 0.1 * x[1].sum(), self.weight * torch.sin(x[1])

    def rebind(self, inputs):
        return Pair(*inputs)


def test_a_joint_solve_of_variables_of_different_batch_sizes_is_compared():
    weight = torch.tensor(0.5, dtype=F64, requires_grad=True)
    start = torch.zeros(2, 4, dtype=F64), torch.ones(3, 5, dtype=F64)
    x, stat = Solver(tol=1e-10, batched=False)(Pair(weight), start)
    hook = ModularIDHook(Solver("gmres", tol=1e-10, batched=False))
    with_check, without = (
        torch.autograd.grad(sum(t.sum() for t in hook(Pair(weight), x, stat=s)), weight) for s in (stat, None)
    )
    assert torch.equal(*with_check, *without)


LEVEL = 0.0


class Levelled(SmallDenoiser):
    def forward(self, x):
        return super().forward(x) + LEVEL * torch.relu(-x)  # acts on negative images only


@pytest.mark.parametrize("batched", [True, False])
def test_a_joint_solve_is_compared_in_all_chunks(batched, monkeypatch):
    y = 1 + torch.rand(3, 1, 6, 6, dtype=F64)
    y[1:] *= -1
    forward, backward = Solver(tol=1e-6, batched=False), Solver("gmres", tol=1e-6, batched=batched, chunk_size=1)
    model = DEQReconstructor(DEProx(Levelled().to(F64), stepsize=0.3), solver=forward, hook=ModularIDHook(backward))
    model(
        1000.0 ** torch.arange(3, dtype=F64)[:, None, None, None] * y, Denoising()
    ).sum().backward()  # nothing changed
    x_hat = model(y, Denoising())
    monkeypatch.setitem(globals(), "LEVEL", 0.5)
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        x_hat.sum().backward()


class Coupled(SmallDenoiser):
    r"""What a sample becomes depends on the others, as with batch norm."""

    def forward(self, x):
        return super().forward(x) + 0.2 * torch.tanh(x.mean(0, keepdim=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-6])
def test_samples_that_influence_each_other_are_no_change(tol):
    y = torch.rand(3, 1, 6, 6, dtype=F64, generator=rng()) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None, None]
    model = DEQReconstructor(DEProx(Coupled(), stepsize=0.6).to(F64), solver=Solver(tol=tol))
    model(y, Denoising()).sum().backward()


def test_samples_that_stopped_at_different_evaluations_have_the_largest_residual():
    rates, y = torch.tensor([[0.1], [0.9]], dtype=F64), torch.ones(2, 3, dtype=F64)
    for start, together in ((torch.zeros_like(y), False), (y / (1 - rates), True)):
        _, stat = Solver("fixed_point_iter", tol=1e-6, max_iter=300)(lambda x: rates * x + y, start)
        assert bool((stat["nstep"] == stat["nstep"][0]).all()) is together
        largest = 10 * stat["plain_residual"].max()
        assert torch.equal(Reached.of(stat).residual, stat["plain_residual"] if together else largest.expand(2))


def test_products_in_lower_precision_may_round_more():
    x, reached = torch.ones(1, 1, 4, 4), Reached(torch.tensor([1e-6]), torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        reached.check(x, 1.01 * x, steps=False)
        with pytest.raises(RuntimeError, match="changed since the forward"):
            reached.check(x, 1.5 * x, steps=False)
        with pytest.raises(RuntimeError, match="changed since the forward"):
            Reached(torch.tensor([1e-6]), torch.float64).check(x.double(), 1.01 * x.double(), steps=False)
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(RuntimeError, match="changed since the forward"):
        reached.check(x, 1.01 * x, steps=False)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_gradients_of_higher_order_may_be_coarser_than_the_fixed_point(order, tol):
    y = torch.rand(2, 1, 6, 6, dtype=F64, generator=rng()).requires_grad_()
    model = DEQReconstructor(
        DEProx(SmallDenoiser(), stepsize=0.7).to(F64),
        solver=Solver(tol=1e-12),
        hook=ModularIDHook(Solver("gmres", tol=tol)),
    )
    derivative = model(y, Denoising()).square().sum()
    for _ in range(order - 1):
        derivative = torch.autograd.grad(derivative, y, create_graph=True)[0].square().sum()
    derivative.backward()
    assert torch.isfinite(y.grad).all()
