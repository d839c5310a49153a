r"""The same fixed-point model by other means: deepinv's own DEQ, TorchDEQ, and Fig. 2 of the paper as it is printed.

Every method is built as ``method(task, settings) -> model`` where ``model(y, physics)`` reconstructs with gradients.
All share the denoiser, the physics and the starting point (filtered back-projection or the adjoint). TorchDEQ and Fig. 2
iterate our bound map, which computes the adjoint of y and the normalised weights once; deepinv brings its own iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import deepinv as dinv
import torch
import torchdeq
from torch import Tensor, autograd
from torch.nn.utils import parametrize
from torchdeq.solver import get_solver

from deepinv_deq import DEGrad, DEQReconstructor, ModularIDHook, Solver
from deepinv_deq.iterations.base import linear_reconstruction
from tests.benchmarks.names import OURS
from tests.benchmarks.tasks import Task

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Settings:
    r"""Tolerances, in each method's own terms, and largest numbers of evaluations of both solves."""

    forward_tol: float = 1e-4
    backward_tol: float = 1e-3
    forward_iter: int = 100
    backward_iter: int = 100

    def exactly(self, iterations: int) -> Settings:
        r"""Tolerances that are never met: every solve takes this many iterations."""
        return replace(self, forward_tol=1e-30, backward_tol=1e-30, forward_iter=iterations, backward_iter=iterations)


# near what ours takes at equal gradient error
TYPICAL = {"ct": Settings(1e-6, 1e-3, 1500, 600), "mri": Settings(3e-4, 1e-2, 300, 200)}


def ours(task: Task, s: Settings, **solver) -> DEQReconstructor:
    r"""deepinv-deq with its defaults: Anderson forward, GMRES backward."""
    return DEQReconstructor(
        task.iteration,
        solver=Solver("anderson", max_iter=s.forward_iter, tol=s.forward_tol, on_failure="ignore", **solver),
        hook=ModularIDHook(
            Solver("gmres", max_iter=s.backward_iter, tol=s.backward_tol, on_failure="ignore", **solver)
        ),
    )


def whole_batch(task: Task, s: Settings) -> DEQReconstructor:
    r"""deepinv-deq without its solving by samples."""
    return ours(task, s, chunk_size=len(task.y))


def deepinv(task: Task, s: Settings, accelerated: bool = False) -> Model:
    r"""deepinv's ``PGD`` (DE-Prox) or ``GD`` (DE-Grad) with ``DEQ=True``, as it comes."""
    it = task.iteration
    anderson = dinv.optim.optimizers.AndersonAccelerationConfig(history_size=5, beta=1.0, eps=1e-4)
    kwargs = {
        "data_fidelity": dinv.optim.L2(sigma=float(it.data_weight) ** -0.5),
        "stepsize": float(it.stepsize),
        "max_iter": s.forward_iter,
        "early_stop": True,
        "thres_conv": s.forward_tol,
        "custom_init": it.init,
        "trainable_params": [],
        "anderson_acceleration": anderson if accelerated else False,
        "DEQ": dinv.optim.DEQConfig(anderson_acceleration_backward=accelerated, max_iter_backward=s.backward_iter),
    }
    denoiser = _WithoutSigma(it.denoiser)
    if isinstance(it, DEGrad):
        model = dinv.optim.GD(prior=dinv.optim.RED(denoiser), lambda_reg=1.0, **kwargs)
    else:
        model = dinv.optim.PGD(prior=dinv.optim.PnP(denoiser), **kwargs)
    check = model.check_conv_fn

    def check_backward(*args) -> bool:
        # deepinv has one threshold for both solves: give the backward one its own
        model.thres_conv = s.backward_tol
        try:
            return check(*args)
        finally:
            model.thres_conv = s.forward_tol

    model.check_conv_fn = check_backward  # the forward solve holds the original

    def reconstruct(y: Tensor, physics) -> Tensor:
        denoiser.context = linear_reconstruction(y, physics) if it.context else None
        with parametrize.cached():  # in its favour: normalise the weights once per pass, with their graph
            for module in it.denoiser.modules():
                if parametrize.is_parametrized(module, "weight"):
                    assert module.weight is not None
            return model(y, physics)

    return reconstruct


def deepinv_anderson(task: Task, s: Settings) -> Model:
    r"""deepinv's DEQ with Anderson acceleration in both solves, of depth 5, undamped, regularisation 1e-4."""
    return deepinv(task, s, accelerated=True)


def torchdeq_ift(task: Task, s: Settings, solver: str = "anderson") -> Model:
    r"""TorchDEQ with ``ift=True`` and relative stopping in both solves."""
    deq = torchdeq.get_deq(
        ift=True,
        f_solver=solver,
        b_solver=solver,
        f_max_iter=s.forward_iter,
        b_max_iter=s.backward_iter,
        f_tol=s.forward_tol,
        b_tol=s.backward_tol,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )

    def reconstruct(y: Tensor, physics) -> Tensor:
        deq.train(torch.is_grad_enabled())
        return deq(task.iteration.bind(y, physics), task.iteration.init(y, physics))[0][-1]

    return reconstruct


def torchdeq_broyden(task: Task, s: Settings) -> Model:
    r"""TorchDEQ with ``ift=True`` and its Broyden solver."""
    return torchdeq_ift(task, s, "broyden")


def figure_2(task: Task, s: Settings) -> Model:
    r"""Fig. 2 line by line, with TorchDEQ's Anderson as its ``solver``, which the paper used."""

    def solver(func, x0, tol: float, max_iter: int) -> Tensor:
        return get_solver("anderson")(func, x0, max_iter=max_iter, tol=tol, stop_mode="rel")[0]

    def forward(y: Tensor, physics) -> Tensor:
        f = task.iteration.bind(y, physics)
        with torch.no_grad():
            xhat = solver(f, task.iteration.init(y, physics), s.forward_tol, s.forward_iter)
        if not torch.is_grad_enabled():
            return xhat
        xhat = f(xhat)
        x2 = xhat.clone().detach().requires_grad_()
        fx = f(x2)

        def backward_hook(grad: Tensor) -> Tensor:
            step = lambda b: autograd.grad(fx, x2, b, retain_graph=True)[0] + grad  # noqa: E731
            return solver(step, torch.zeros_like(grad), s.backward_tol, s.backward_iter)

        xhat.register_hook(backward_hook)
        return xhat

    return forward


METHODS: dict[str, Callable[[Task, Settings], Model]] = {
    OURS: ours,
    "deepinv DEQ": deepinv,
    "deepinv DEQ, Anderson": deepinv_anderson,
    "TorchDEQ ift, Anderson": torchdeq_ift,
    "TorchDEQ ift, Broyden": torchdeq_broyden,
    "Fig. 2": figure_2,
}


class _WithoutSigma(torch.nn.Module):
    r"""deepinv hands every denoiser a noise level; ours is blind, but may take the linear reconstruction."""

    def __init__(self, denoiser: torch.nn.Module):
        super().__init__()
        self.denoiser, self.context = denoiser, None

    def forward(self, x: Tensor, sigma=None) -> Tensor:
        return self.denoiser(x) if self.context is None else self.denoiser(x, context=self.context)
