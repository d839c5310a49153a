r"""Problems with exact answers, shared by all tests.

Everything is small enough for a dense Jacobian, and in float64 unless a test asks otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepinv.physics import MRI, LinearPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, FixedPointIteration, ModularIDHook, Solver
from deepinv_deq.maps import Map

F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    r"""Zeros and ones: about 60 percent of the entries are ones."""
    return (torch.rand(*shape, generator=rng(seed)) > 0.4).to(F64)


def affine(batch: int = 3, n: int = 40, *, low: float = -0.3, high: float = 0.97, dtype=F64, seed: int = 0):
    r"""``f(x) = x Wᵀ + c`` with a symmetric ``W`` of known spectrum; returns ``f``, its fixed point and ``W``."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]
    w = q @ torch.diag(torch.linspace(low, high, n, dtype=F64)) @ q.T
    c = torch.randn(batch, n, generator=rng, dtype=F64)
    x = torch.linalg.solve(torch.eye(n, dtype=F64) - w, c.T).T
    w, c, x = w.to(dtype), c.to(dtype), x.to(dtype)
    return (lambda z: z @ w.T + c), x, w


class Batch(Map):
    r"""``x_i ↦ r_i S x_i + c_i`` with a cyclic shift ``S``: samples of different speeds, and a count of what is evaluated.

    ``calls`` lists the batch sizes of all evaluations.
    """

    def __init__(self, rates: Tensor, n: int, *, c: Tensor | None = None, calls: list[int] | None = None):
        rng = torch.Generator().manual_seed(0)
        self.rates, self.calls = rates, [] if calls is None else calls
        self.c = torch.randn(len(rates), n, generator=rng, dtype=rates.dtype) if c is None else c

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.rates[:, None] * x.roll(1, dims=1) + self.c

    def select(self, rows: Tensor | slice) -> Batch:
        return Batch(self.rates[rows], 0, c=self.c[rows], calls=self.calls)


class Parametric:
    r"""The :class:`~deepinv_deq.implicit.DifferentiableMap` ``x ↦ step(x, *inputs)``."""

    def __init__(self, step: Callable[..., Any], *inputs: Tensor):
        self.step, self.inputs = step, inputs

    def __call__(self, x: Any) -> Any:
        return self.step(x, *self.inputs)

    def rebind(self, inputs: Sequence[Tensor]) -> Parametric:
        return Parametric(self.step, *inputs)


class MatrixPhysics(LinearPhysics):
    r"""``y = M x`` for images of shape ``(B, 1, h, h)``: a dense matrix, kept as a buffer that ``update`` replaces."""

    def __init__(self, matrix: Tensor, side: int):
        super().__init__(img_size=(1, side, side))
        self.side = side
        self.register_buffer("matrix", matrix)

    def A(self, x: Tensor, **_) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y: Tensor, **_) -> Tensor:
        return (y @ self.matrix).reshape(-1, 1, self.side, self.side)


class SmallDenoiser(nn.Module):
    r"""A smooth contraction on images or volumes: ``s · tanh(conv(x)) + s · x`` with few weights."""

    def __init__(self, scale: float = 0.4, seed: int = 0, *, channels: int = 1, dims: int = 2):
        super().__init__()
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, channels, 3, padding=1)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.conv.parameters():
                p.copy_(0.75 / math.sqrt(channels * 3**dims) * torch.randn(p.shape, generator=rng))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x + torch.tanh(self.conv(x)))


def imaging(template=DEProx, *, side: int = 4, batch: int = 2, dtype=F64, tol: float = 1e-13, seed: int = 0, **hook):
    r"""A tiny DEQ for compressed measurements: returns ``model, physics, x, y``, everything with an exact answer."""
    rng = torch.Generator().manual_seed(seed)
    n, m = side * side, side * side // 2
    matrix = torch.randn(m, n, generator=rng, dtype=F64) / math.sqrt(n)
    physics = MatrixPhysics((matrix / torch.linalg.matrix_norm(matrix, 2)).to(dtype), side)
    x = torch.rand(batch, 1, side, side, generator=rng, dtype=F64).to(dtype)
    model = DEQReconstructor(
        template(SmallDenoiser(seed=seed), stepsize=0.5, learn_stepsize=True),
        solver=Solver("anderson", max_iter=300, tol=tol),
        hook=ModularIDHook(Solver("gmres", max_iter=200, tol=tol), **hook),
    ).to(dtype)
    return model, physics, x, physics.A(x)


def unrolled(model: DEQReconstructor, y: Tensor, physics, steps: int = 400) -> Tensor:
    r"""The same fixed point by plain iteration under autograd."""
    f = model.iteration.bind(y, physics)
    x = model.iteration.init(y, physics)
    for _ in range(steps):
        x = f(x)
    return model.iteration.output(x)


def deq(iteration: FixedPointIteration) -> DEQReconstructor:
    r"""A DEQ in float64 that is solved and differentiated to rounding."""
    solver = Solver("anderson", tol=1e-12, max_iter=500)
    return DEQReconstructor(
        iteration.to(F64), solver=solver, hook=ModularIDHook(Solver("gmres", tol=1e-12, max_iter=300))
    )


def assert_unrolled_gives_the_same(model: DEQReconstructor, physics, y, steps: int = 400) -> None:
    r"""Reconstruction, and the gradient for all parameters and all measurements."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    leaves = [t.clone().requires_grad_() for t in (y if isinstance(y, TensorList) else [y])]
    measured = TensorList(leaves) if isinstance(y, TensorList) else leaves[0]

    def gradients(x):
        grads = torch.autograd.grad(x.abs().square().sum(), [*parameters, *leaves], materialize_grads=True)
        return grads[: len(parameters)], grads[len(parameters) :]

    x_hat = model(measured, physics)
    assert model.forward_stat is not None and model.forward_stat.converged.all()
    x = unrolled(model, measured, physics, steps)
    assert torch.allclose(x_hat, x, atol=1e-9)
    for ours, exact in zip(gradients(x_hat), gradients(x), strict=True):
        assert relative_error(ours, exact) <= 1e-8


def dense_gradient(f: Callable[[Tensor], Tensor], x_star: Tensor, g: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    r"""Implicit gradient with the dense Jacobian: ``(I - Jᵀ) b = g`` by LU, then ``b ∂F/∂inputs``."""
    x = x_star.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(x.numel(), x.numel())
    b = torch.linalg.solve(torch.eye(x.numel(), dtype=x.dtype) - jacobian.T, g.flatten())
    return list(torch.autograd.grad(f(x), inputs, b.reshape(x.shape)))


def relative_error(a, b) -> float:
    r"""``‖a - b‖ / ‖b‖`` over one tensor or a list of tensors."""
    a, b = ([t] if isinstance(t, Tensor) else list(t) for t in (a, b))
    a, b = ([torch.view_as_real(t) if t.is_complex() else t for t in ts] for ts in (a, b))
    a, b = (torch.cat([t.detach().flatten().double() for t in ts]) for ts in (a, b))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


TEMPLATES = [DEGrad, DEProx]


class Synchronisations(TorchDispatchMode):
    r"""Counts how often the host reads a value of a tensor, which on an accelerator is when it waits."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self._lists = _Lists(self)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self._lists.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in (*waiting, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    r"""Counts what is no operation of the dispatcher."""

    def __init__(self, counter: Synchronisations):
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self._counter.count += func in (Tensor.tolist, Tensor.numpy)
        return func(*args, **(kwargs or {}))


def mri(size: int = 16) -> MRI:
    r"""MRI without every third column."""
    mask = torch.ones(1, 2, size, size)
    mask[..., ::3] = 0
    return MRI(mask=mask, img_size=(2, size, size))


class _Shrinking(EquilibriumUNet):
    def forward(self, x, sigma=None):
        return 0.6 * super().forward(x)


def small_deq() -> tuple[DEQReconstructor, MRI, Tensor]:
    r"""A contracting U-Net for MRI, the physics, and three measurements."""
    torch.manual_seed(0)
    physics, denoiser = mri(), _Shrinking(2, channels=(4, 8))
    nn.init.normal_(denoiser.Conv_1x1.weight, std=0.005)
    model = DEQReconstructor(DEProx(denoiser, stepsize=0.5), solver=Solver("anderson", max_iter=80, tol=1e-5)).eval()
    return model, physics, physics.A(torch.rand(3, 2, 16, 16))


def weights(model: nn.Module) -> Tensor:
    r"""All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Forged:
    r"""Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)
