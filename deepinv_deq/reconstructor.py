r"""The deep equilibrium model as a deepinv reconstructor."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

from deepinv_deq._states import State
from deepinv_deq._warm_starts import WarmStarts
from deepinv_deq._weights import read_weights
from deepinv_deq.certificate import Certificate, certify
from deepinv_deq.denoisers import EquilibriumUNet
from deepinv_deq.implicit import ModularIDHook
from deepinv_deq.iterations import DEGrad, DEProx, FixedPointIteration
from deepinv_deq.solvers import Solver, SolverStat

_TEMPLATES: dict[str, type[DEGrad] | type[DEProx]] = {"DEGrad": DEGrad, "DEProx": DEProx}


class DEQReconstructor(Reconstructor):
    r"""Deep equilibrium model: :math:`\hat x` is the fixed point of a learned iteration (eq. 4).

    .. math::

        \hat x = F_\theta(\hat x; y)

    It takes the place of any :class:`deepinv.models.Reconstructor`: give it to a :class:`deepinv.Trainer` as ``model``,
    with any loss. Gradients are those of Proposition 1 (:class:`ModularIDHook`), for parameters, measurements and physics.

    :param FixedPointIteration iteration: the template :math:`F_\theta`, such as :class:`DEProx` or :class:`DEGrad`.
    :param Solver, None solver: forward solver; default ``Solver("anderson", max_iter=50, tol=1e-4)``.
    :param ModularIDHook, None hook: how the fixed point is differentiated; default implicit, with GMRES.
    :param int warm_starts: in training, keep the fixed points of as many samples and start from them when the same
        measurements come again, one epoch later: fewer evaluations, the same solution to the same tolerance. It takes
        effect in the third epoch (of measurements that were seen once a digest is kept, no more), costs one image of
        memory per sample, and is forgotten by copies and checkpoints: a resumed run repeats an uninterrupted one to the
        tolerance of the solves, not to the bit. ``0``, the default, keeps nothing.

    :raises TypeError: if a part is not of its class.
    :raises ValueError: if ``warm_starts`` is no number of samples.

    The attributes ``forward_stat`` and ``hook.stat`` hold the :class:`SolverStat` of the last forward and backward solve.

    Losses that divide a difference of two reconstructions by a small :math:`\tau`, as :class:`deepinv.loss.SureGaussianLoss`
    does, divide the errors of both solves by it too: give ``solver`` and ``hook`` tolerances below :math:`\tau` times the
    relative accuracy wanted of the gradient. Two solves from cold starts make nearly the same error, so that most of it
    cancels; with ``warm_starts`` it does not.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import MRI
    >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
    >>> physics = MRI(mask=torch.ones(1, 2, 16, 16), img_size=(2, 16, 16))
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(in_channels=2, channels=(4, 8)), stepsize=0.5))
    >>> x_hat = model(physics(torch.rand(1, 2, 16, 16)), physics)
    >>> x_hat.shape
    torch.Size([1, 2, 16, 16])
    """

    def __init__(
        self,
        iteration: FixedPointIteration,
        *,
        solver: Solver | None = None,
        hook: ModularIDHook | None = None,
        warm_starts: int = 0,
    ):
        super().__init__()
        solver = Solver("anderson", max_iter=50, tol=1e-4) if solver is None else solver
        hook = ModularIDHook() if hook is None else hook
        for name, part, kind in (
            ("iteration", iteration, FixedPointIteration),
            ("solver", solver, Solver),
            ("hook", hook, ModularIDHook),
        ):
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(part).__name__}.")
        self.iteration, self.solver, self.hook = iteration, solver, hook
        self.forward_stat: SolverStat | None = None
        self._warm_starts = WarmStarts(warm_starts)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: torch.device | str = "cpu", **settings: Any
    ) -> DEQReconstructor:
        r"""A trained model, in one line.

        :param str, os.PathLike name: ``"ct-ei"`` (sparse-view CT, 64×64 pixels, 30 views) or ``"mri-ei"`` (8x accelerated MRI,
            96×96 pixels, noise 0.05 in k-space), which ship with the package: the best of those trained without ground truth in
            ``examples/paper`` (equivariant imaging with fixed targets, and with turned operators for CT, with SURE for MRI); or a file written by
            :meth:`save_pretrained`.
        :param str, torch.device device: where to put it.
        :param settings: ``solver=``, ``hook=`` or ``warm_starts=`` in the place of the saved ones.
        :return: the model, in evaluation mode.
        :raises FileNotFoundError: if there is no such model.
        :raises ValueError: if the file is broken, or of something else.
        """
        saved = read_weights(name, "models")
        if not {"iteration", "denoiser", "solver", "hook", "state_dict"} <= saved.keys():
            raise ValueError(
                f"{str(name)!r} is no DEQReconstructor: weights of a denoiser are for EquilibriumUNet(pretrained=...)."
            )
        template = _TEMPLATES[saved["iteration"]](
            EquilibriumUNet(**saved["denoiser"]), learn_stepsize=saved["learn_stepsize"]
        )
        hook = ModularIDHook(Solver(**saved["hook"]["solver"]), mode=saved["hook"]["mode"])
        parts: dict[str, Any] = {"solver": Solver(**saved["solver"]), "hook": hook}
        model = cls(template, **(parts | settings))
        model.load_state_dict(saved["state_dict"])
        return model.to(device).eval()

    def save_pretrained(self, path: str | os.PathLike[str], **about: Any) -> None:
        r"""Save the model with all that is needed to build it again, for :meth:`from_pretrained`.

        :param str, os.PathLike path: file to write, at once or not at all.
        :param about: plain values to keep with it, such as what it was trained on.
        :raises TypeError: if the iteration is neither :class:`DEGrad` nor :class:`DEProx`, or its denoiser no
            :class:`EquilibriumUNet`: then save ``state_dict()``.
        """
        kind, denoiser = type(self.iteration).__name__, self.iteration.denoiser
        if _TEMPLATES.get(kind) is not type(self.iteration) or type(denoiser) is not EquilibriumUNet:
            raise TypeError(
                f"Only DEGrad and DEProx of an EquilibriumUNet can be saved with their settings, not {kind} of "
                f"{type(denoiser).__name__}. Save model.state_dict(), and build the model before you load it."
            )
        saved = {
            "iteration": kind,
            "denoiser": denoiser.settings,
            "learn_stepsize": isinstance(self.iteration.stepsize, torch.nn.Parameter),
            "solver": _settings(self.solver),
            "hook": {"solver": _settings(self.hook.solver), "mode": self.hook.mode},
            # the noise level is for denoisers that want one, which this one does not
            "state_dict": {k: t.cpu().contiguous() for k, t in self.state_dict().items() if k != "iteration.sigma"},
            "about": about,
        }
        partial = Path(f"{os.fspath(path)}.part")
        torch.save(saved, partial)
        partial.replace(path)

    def forward(
        self,
        y: Tensor,
        physics: Physics,
        init: Tensor | None = None,
        *,
        x_gt: Tensor | None = None,
        compute_metrics: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""Reconstruct.

        :param torch.Tensor y: measurements, of the shape ``physics.A`` returns, batch first.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor, None init: first point, of shape ``(B, C, H, W)``; default ``iteration.init(y, physics)``, or what
            ``warm_starts`` remembers.
        :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``, for the PSNR of the iterates.
        :param bool compute_metrics: whether to return the course of the solve too, as deepinv's optimisation models do.
        :param kwargs: ignored, as deepinv's models must.
        :return: reconstruction of shape ``(B, C, H, W)``; with ``compute_metrics``, also a dictionary with lists
            ``"residual"`` and, given ``x_gt``, ``"psnr"``: one list per sample, one number per evaluation.
        :raises ValueError: if ``y`` has NaN or Inf, or does not fit ``physics``.
        :raises TypeError: if ``physics`` has no adjoint.
        :raises ConvergenceError: if a solve misses its tolerance and its solver was told to raise.
        """
        _check_finite(y)
        f = self.iteration.bind(y, physics)
        x0 = self.iteration.init(y, physics) if init is None else init
        keys = self._warm_starts.keys(y) if init is None and self.training else []
        x0 = self._warm_starts.start(keys, x0)
        course = _Course(f, x_gt, self.iteration) if compute_metrics else None
        x_star, self.forward_stat = self.solver(course or f, x0)  # solvers never tape
        self._warm_starts.keep(keys, x_star, self.forward_stat.residual)
        x_hat = self.iteration.output(self.hook(f, x_star))
        return x_hat if course is None else (x_hat, course.metrics(self.forward_stat))

    def certify(
        self,
        y: Tensor,
        physics: Physics,
        *,
        x_gt: Tensor | None = None,
        products: int = 30,
        metric: torch.nn.Module | None = None,
    ) -> Certificate:
        r"""Measure whether the reconstruction is *the* fixed point: contraction, distance, and spread over starts.

        It solves from the linear reconstruction, from zeros, from noise and, if given, from the truth; once more a hundred times as
        exactly, for the distance to the fixed point; and computes the spectral radius of the Jacobian that has to contract
        (:meth:`FixedPointIteration.contractive_part`) with vector-Jacobian products. That is some ten times the cost of a reconstruction.

        :param torch.Tensor y: measurements.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.Tensor, None x_gt: ground truth of shape ``(B, C, H, W)``: one more start, and the PSNR of every solve.
        :param int products: number of vector-Jacobian products for the spectral radius.
        :param torch.nn.Module, None metric: metric of the PSNRs, such as ``deepinv.metric.PSNR(complex_abs=True)``.
        :return: the certificate; its ``outcome`` says in one sentence what was found.
        :raises ValueError: if a layer of the model is in a training mode that changes the map (batch norm, dropout).

        |sep|

        :Example:

        >>> import torch
        >>> from deepinv.physics import Inpainting
        >>> from deepinv_deq import DEProx, DEQReconstructor, EquilibriumUNet
        >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8)), stepsize=0.5)).eval()
        >>> physics = Inpainting((1, 8, 8), mask=torch.ones(1, 8, 8).tril())
        >>> certificate = model.certify(physics(torch.ones(1, 1, 8, 8)), physics)
        >>> round(certificate.spectral_radius.item(), 2), certificate.unique.tolist()
        (0.9, [True])
        """
        return certify(self.iteration, self.solver, y, physics, x_gt=x_gt, products=products, metric=metric)


def _settings(solver: Solver) -> dict[str, Any]:
    r"""What builds a solver again, as plain values."""
    return {f.name: getattr(solver, f.name) for f in fields(solver) if f.init} | {"options": dict(solver.options)}


class _Course:
    r"""A map that remembers the PSNR of the points it was evaluated at."""

    def __init__(self, f: Any, x_gt: Tensor | None, iteration: FixedPointIteration):
        self.f, self.x_gt, self.iteration = f, x_gt, iteration
        self.psnr: list[Tensor] = []

    def __call__(self, x: State) -> State:
        if self.x_gt is not None:
            self.psnr.append(PSNR()(self.iteration.output(x), self.x_gt))
        return self.f(x)

    def metrics(self, stat: SolverStat) -> dict[str, list[list[float]]]:
        out = {"residual": stat["rel_trace"].tolist()}
        return out | ({"psnr": torch.stack(self.psnr, dim=1).tolist()} if self.psnr else {})


def _check_finite(y: Any) -> None:
    for i, part in enumerate([y] if isinstance(y, Tensor) else list(y)):
        if not bool(torch.isfinite(part).all()):
            count = int((~torch.isfinite(part)).sum())
            raise ValueError(
                f"The measurements have {count} NaN or Inf values of {part.numel()}"
                f"{'' if isinstance(y, Tensor) else f' in part {i}'}. Repair or mask them before reconstructing."
            )
