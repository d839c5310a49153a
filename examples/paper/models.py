r"""
The methods: deep equilibrium models, and what they are compared with
=====================================================================

:data:`METHODS` has one line for each method. A new method is a function that builds it, and such a line.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepinv as dinv
import torch
from data import TASKS, Task
from deepinv.models.PDNet import PDNet_DualBlock, PDNet_PrimalBlock
from torch import Tensor, nn

from deepinv_deq import DEGrad, DEProx, DEQReconstructor, EquilibriumUNet, ModularIDHook, Solver
from deepinv_deq.iterations.base import linear_reconstruction

CG_STEPS = 8  # of each data step of MoDL


@dataclass(frozen=True)
class Method:
    r"""A method of the tables.

    - ``build``: function of the task, the hyperparameters and the file of pretrained weights.
    - ``family``: methods of one family share hyperparameters and their search.
    - ``epochs``: key of the number of epochs in :data:`data.SCALES`; ``None`` for a method that is not trained.
    - ``weights``: the pretrained network it starts from: ``"unet"``, ``"dncnn"`` or ``None``.
    - ``tried``: the hyperparameter of its own that the search varies, and the values.
    - ``seeds``: number of trainings at scale ``"small"`` and ``"paper"``.
    - ``jacobian_free``: whether its gradient is that of one step.
    """

    title: str
    build: Callable[[Task, dict[str, Any], str | None], nn.Module]
    family: str
    epochs: str | None
    tasks: tuple[str, ...] = TASKS
    weights: str | None = "unet"
    tried: tuple[str, tuple[float, ...]] | None = None
    seeds: dict[str, int] = field(default_factory=lambda: {"small": 1, "paper": 1})
    jacobian_free: bool = False

    @property
    def is_deq(self) -> bool:
        return self.epochs == "deq"


def make_model(task: Task, method: str, s: dict[str, Any], weights: str | None) -> nn.Module:
    r"""Build a method.

    :param dict s: hyperparameters, see :func:`settings.settings_of`.
    :param str weights: file of the pretrained network, if the method has one.
    """
    return METHODS[method].build(task, s, weights)


def _denoiser(task: Task, s: dict[str, Any], weights: str | None, context: bool = False) -> EquilibriumUNet:
    options = {"context_channels": task.channels, "saturation": s.get("saturation")} if context else {}
    return EquilibriumUNet(task.channels, channels=tuple(s["channels"]), pretrained=weights, **options)


def _deq(task: Task, s: dict[str, Any], weights: str | None, *, mode: str) -> nn.Module:
    template = DEGrad if task.name == "ct" else DEProx
    iteration = template(
        _denoiser(task, s, weights, s["context"]), stepsize=s["stepsize"], data_weight=s["data_weight"]
    )
    return DEQReconstructor(
        iteration,
        solver=Solver("anderson", max_iter=s["max_iter"], tol=s["forward_tol"], history=8, on_failure="ignore"),
        hook=ModularIDHook(
            Solver("gmres", max_iter=s["max_iter"], tol=s["backward_tol"], on_failure="ignore"), mode=mode
        ),
    )


def _pnp(task: Task, s: dict[str, Any], weights: str | None) -> nn.Module:
    r"""PnP for MRI, RED for CT, with a DnCNN (section 4.2.4)."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    net = dinv.models.DnCNN(**state["settings"], pretrained=None).eval()
    net.load_state_dict(state["state_dict"])
    net.to(task.x)  # deepinv does not move the network of a prior with the model
    stop = {"early_stop": True, "thres_conv": 1e-5}
    return _optimisation(task, s, net, iterations=s["iterations"], **stop)


def _unrolled(task: Task, s: dict[str, Any], weights: str | None, *, layers: int) -> nn.Module:
    options = {"unfold": True, "trainable_params": ["stepsize"]}
    return _optimisation(task, s, _denoiser(task, s, weights), iterations=layers, **options)


def _optimisation(task: Task, s: dict[str, Any], net: nn.Module, *, iterations: int, **options: Any) -> nn.Module:
    grad = task.name == "ct"
    prior = dinv.optim.RED if grad else dinv.optim.PnP
    return (dinv.optim.GD if grad else dinv.optim.PGD)(
        prior=prior(WithoutSigma(net)),
        data_fidelity=dinv.optim.L2(sigma=s["data_weight"] ** -0.5),
        stepsize=s["stepsize"],
        lambda_reg=1.0,
        max_iter=iterations,
        custom_init=linear_reconstruction,
        **options,
    )


def _refinement(task: Task, s: dict[str, Any], weights: str | None) -> nn.Module:
    return Refinement(_denoiser(task, s, weights), linear_reconstruction)


def _modl(task: Task, s: dict[str, Any], weights: str | None, *, blocks: int) -> nn.Module:
    r"""MoDL (Aggarwal et al. 2018): half-quadratic splitting with shared weights. It is deepinv's ``MoDL`` with the data weight of
    its own that CT needs, with the linear reconstruction as its start, and with few CG steps for physics without a closed form."""
    return dinv.optim.HQS(
        prior=dinv.optim.PnP(WithoutSigma(_denoiser(task, s, weights))),
        data_fidelity=FewCGSteps(sigma=s["data_weight"] ** -0.5),
        stepsize=[1.0] * blocks,
        lambda_reg=1.0,
        max_iter=blocks,
        unfold=True,
        trainable_params=["stepsize"],
        custom_init=linear_reconstruction,
    )


def _varnet(task: Task, s: dict[str, Any], weights: str | None, *, cascades: int) -> nn.Module:
    r"""deepinv's VarNet. Its network is the gradient of a regulariser; each cascade has weights of its own."""
    net = dinv.models.VarNet(Gradient(_denoiser(task, s, weights)), num_cascades=cascades)
    for block in net.backbone_net:
        block.denoiser = copy.deepcopy(block.denoiser)
        nn.init.constant_(block.dc_weight, s["stepsize"])
    return net


def _primal_dual(task: Task, s: dict[str, Any], weights: str | None, *, blocks: int) -> nn.Module:
    return LearnedPrimalDual(blocks, scale=s["data_weight"] ** 0.5)


class Refinement(dinv.models.Reconstructor):
    r"""A network after the fast linear reconstruction, :math:`D_\theta(A^\dagger y)` (section 4.2.3)."""

    def __init__(self, denoiser: nn.Module, start: Callable[..., Tensor]):
        super().__init__()
        self.denoiser, self.start = denoiser, start

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        return self.denoiser(self.start(y, physics))


class LearnedPrimalDual(dinv.models.Reconstructor):
    r"""Learned primal-dual (Adler and Öktem 2018) of deepinv's blocks, each with weights of its own.

    :param int blocks: number of pairs of a dual and a primal step.
    :param float scale: the operator and the measurements are multiplied by this, so that both networks see numbers of order one.
    :param int memory: channels of the primal and the dual variable.
    """

    def __init__(self, blocks: int = 8, *, scale: float = 1.0, memory: int = 5):
        super().__init__()
        self.scale, self.memory = scale, memory
        self.dual = nn.ModuleList(PDNet_DualBlock(memory + 2, memory) for _ in range(blocks))
        self.primal = nn.ModuleList(PDNet_PrimalBlock(memory + 1, memory) for _ in range(blocks))

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        x = linear_reconstruction(y, physics).repeat(1, self.memory, 1, 1)
        u = y.new_zeros(len(y), self.memory, *y.shape[2:])
        for dual, primal in zip(self.dual, self.primal, strict=True):
            u = dual(u, self.scale * physics.A(x[:, 1:2]), self.scale * y)
            x = primal(x, physics.A_adjoint(u[:, :1]) / self.scale)
        return x[:, :1]


class FewCGSteps(dinv.optim.L2):
    r"""The L2 data term whose proximal operator is computed by a few steps of conjugate gradients, with a graph through them."""

    def prox(self, x: Tensor, y: Tensor, physics: Any, *args: Any, gamma: Any = 1.0, **kwargs: Any) -> Tensor:
        if isinstance(physics, dinv.physics.DecomposablePhysics):
            return physics.prox_l2(x, y, self.norm * gamma)
        weight = self.norm * gamma
        residual = direction = weight * (physics.A_adjoint(y) - physics.A_adjoint(physics.A(x)))
        size = _squared(residual)
        for _ in range(CG_STEPS):
            image = weight * physics.A_adjoint(physics.A(direction)) + direction
            step = size / (direction * image).flatten(1).sum(dim=1).clamp_min(1e-30)
            x, residual = x + _rows(step, x) * direction, residual - _rows(step, x) * image
            size, before = _squared(residual), size
            direction = residual + _rows(size / before.clamp_min(1e-30), x) * direction
        return x


def _squared(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(dim=1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


class WithoutSigma(nn.Module):
    r"""deepinv passes a noise level to every denoiser. This wrapper ignores it."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Any = None, **kwargs: Any) -> Tensor:
        return self.denoiser(x)


class Gradient(nn.Module):
    r""":math:`x - D(x)`, the gradient of the regulariser that belongs to a denoiser."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor) -> Tensor:
        return x - self.denoiser(x)


_DEQ: Any = {"epochs": "deq", "seeds": {"small": 3, "paper": 3}}
_STEP = ("stepsize", (0.3, 0.6, 1.0))
_WEIGHT = ("data_weight", (0.5, 1.0, 2.0))  # factors of the default
_RIVAL = {"small": 1, "paper": 3}
METHODS = {
    "deq-id": Method("DEQ, ID", partial(_deq, mode="implicit"), "deq-id", tried=_WEIGHT, **_DEQ),
    "deq-jfb": Method("DEQ, JFB", partial(_deq, mode="jfb"), "deq-jfb", tried=_WEIGHT, jacobian_free=True, **_DEQ),
    "unet": Method("U-Net", _refinement, "unet", "unet"),
    **{
        f"unrolled-{n}": Method(f"unrolled {n}", partial(_unrolled, layers=n), "unrolled", "unrolled", tried=_STEP)
        for n in (1, 3, 5, 7)
    },
    "modl": Method("MoDL", partial(_modl, blocks=5), "modl", "modl", tried=_WEIGHT, seeds=_RIVAL),
    "lpd": Method("learned primal-dual", partial(_primal_dual, blocks=8), "lpd", "lpd", ("ct",), None, _WEIGHT, _RIVAL),
    "varnet": Method("VarNet", partial(_varnet, cascades=7), "varnet", "varnet", ("mri",), tried=_STEP, seeds=_RIVAL),
    "denoiser": Method("PnP / RED", _pnp, "denoiser", None, weights="dncnn"),
}
