r"""How well the solves of a :class:`DEQReconstructor` went, as deepinv Metrics for a Trainer and its loggers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from deepinv.loss.metric import Metric
from deepinv.physics import Physics
from torch import Tensor

from deepinv_deq.certificate import Certificate
from deepinv_deq.reconstructor import DEQReconstructor
from deepinv_deq.solvers import SolverStat

_SOLVES = ("forward", "backward")


class _ModelMetric(Metric):
    r"""One number per sample from the deep equilibrium model that reconstructed."""

    needs: tuple[str, ...] = ("model",)

    def forward(
        self,
        x_net: Tensor,
        x: Tensor | None = None,
        y: Any = None,
        physics: Physics | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""Measure every sample.

        :param torch.Tensor x_net: reconstruction, used for its batch size only.
        :param torch.Tensor, None x: not used.
        :param torch.Tensor, None y: measurements, where a certificate is computed.
        :param deepinv.physics.Physics, None physics: forward operator, where a certificate is computed.
        :param torch.nn.Module model: a :class:`DEQReconstructor`, or a model that wraps one, as deepinv's losses and
            :class:`torch.nn.parallel.DistributedDataParallel` do.
        :param kwargs: ignored.
        :return: tensor of shape ``(B,)``, where ``B`` is the batch size of the solve. NaN for a model that solves nothing,
            such as the linear one a Trainer compares with. NaN for the backward solve before the first one.
        :raises ValueError: without an argument that is needed, if the model holds several :class:`DEQReconstructor`, or if it was never called.
        """
        given = {"model": model, "y": y, "physics": physics}
        lacking = [name for name in self.needs if given[name] is None]
        if lacking:
            raise ValueError(f"{type(self).__name__} needs {', '.join(lacking)}, as deepinv.Trainer passes it.")
        deq = solving_model(model)
        values = None if deq is None else self.of(deq, y, physics)
        if values is None:
            return self.reducer(torch.full((x_net.shape[0],), torch.nan, device=x_net.device))
        values = values.detach()
        # a solve of the batch as one joint sample (Solver(batched=False)) was that of each of its samples
        return self.reducer(values.expand(x_net.shape[0]) if len(values) == 1 else values)

    def of(self, deq: DEQReconstructor, y: Any, physics: Any) -> Tensor | None:
        r"""What is measured; ``None`` where there is nothing yet."""
        raise NotImplementedError


class _SolveMetric(_ModelMetric):
    r"""One number per sample from the statistic of a model's last solve. Nothing is evaluated."""

    def __init__(self, *, which: Literal["forward", "backward"] = "forward", reduction: str | None = None):
        super().__init__(reduction=reduction)
        if which not in _SOLVES:
            raise ValueError(f"which must be one of {', '.join(_SOLVES)}, got {which!r}.")
        self.which = which

    def of(self, deq: DEQReconstructor, y: Any, physics: Any) -> Tensor | None:
        stat = deq.forward_stat if self.which == "forward" else deq.hook.stat
        if stat is None and self.which == "forward":
            raise ValueError(
                f"{type(self).__name__} reads the last solve, and this model was never called: reconstruct first."
            )
        return None if stat is None else self.read(stat)

    def read(self, stat: SolverStat) -> Tensor:
        r"""What is measured."""
        raise NotImplementedError


class FixedPointResidual(_SolveMetric):
    r"""Relative residual that the last solve of a model reached, per sample: the criterion of its :class:`Solver`.

    For a forward solve this is :math:`\|N (F(x) - x)\| / \|x\|` in natural units, so it does not depend on the stepsize. For an adjoint
    solve the residual of the linear equation is divided by the norm of the cotangent.

    Use it in ``Trainer(metrics=...)``: it is then averaged, plotted and logged, to Weights & Biases or MLflow too, as the
    other metrics are. Put it before metrics that call the model themselves, such as :class:`PipelineEquivariance`. While
    training, the last solve is that of the last loss that called the model.

    :param str which: ``"forward"``, the fixed point, or ``"backward"``, the adjoint equation of the last gradient. NaN if there
        was no such solve, as with ``mode="jfb"``. deepinv identifies a metric by the name of its class. To use both in one
        Trainer, derive a class with another name: ``class AdjointResidual(FixedPointResidual): pass``.
    :param str, None reduction: over the batch, as in all deepinv metrics; a Trainer wants ``None``, the default.

    :raises ValueError: if ``which`` is neither of the two.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deq import DEProx, DEQReconstructor, FixedPointResidual, Solver
    >>> model = DEQReconstructor(DEProx(torch.nn.Identity(), stepsize=0.5), solver=Solver("anderson", tol=1e-3))
    >>> x_net = model(torch.rand(2, 1, 8, 8), Denoising())
    >>> (FixedPointResidual()(x_net, model=model) <= 1e-3).tolist()
    [True, True]
    """

    def read(self, stat: SolverStat) -> Tensor:
        r"""The residual.

        :param SolverStat stat: statistic of a solve.
        :return: tensor of shape ``(B,)``.
        """
        return stat.residual


class SolverEvaluations(_SolveMetric):
    r"""Number of evaluations after which the last solve of a model was done, per sample.

    They are evaluations of :math:`F_\theta` in a forward solve, and vector-Jacobian products in a backward one. Use it in
    ``Trainer(metrics=...)``, as :class:`FixedPointResidual`. The remarks on FixedPointResidual apply.

    :param str which: ``"forward"``, the fixed point, or ``"backward"``, the adjoint equation of the last gradient.
    :param str, None reduction: over the batch, as in all deepinv metrics; a Trainer wants ``None``, the default.

    :raises ValueError: if ``which`` is neither of the two.
    """

    def read(self, stat: SolverStat) -> Tensor:
        r"""The number of evaluations.

        :param SolverStat stat: statistic of a solve.
        :return: tensor of shape ``(B,)``.
        """
        return stat["nstep"].float()


class _CertificateMetric(_ModelMetric):
    r"""One number per sample from the certificate of a model. It is computed anew: some ten reconstructions per batch."""

    needs = ("model", "y", "physics")

    def of(self, deq: DEQReconstructor, y: Any, physics: Any) -> Tensor | None:
        return self.read(deq.certify(y, physics))

    def read(self, certificate: Certificate) -> Tensor:
        r"""What is measured."""
        raise NotImplementedError


class ContractionFactor(_CertificateMetric):
    r"""Spectral radius of the Jacobian that has to contract, at the reconstruction, per sample. Below 1 is needed.

    Use it in ``Trainer(metrics=...)``; every evaluation certifies the batch (:meth:`DEQReconstructor.certify`), which costs some ten
    reconstructions.

    :param str, None reduction: over the batch, as in all deepinv metrics; a Trainer wants ``None``, the default.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deq import ContractionFactor, DEProx, DEQReconstructor, EquilibriumUNet
    >>> model = DEQReconstructor(DEProx(EquilibriumUNet(channels=(4, 8), contraction=0.8), stepsize=0.5)).eval()
    >>> y = torch.rand(2, 1, 8, 8)
    >>> ContractionFactor()(model(y, Denoising()), y=y, physics=Denoising(), model=model).round(decimals=2).tolist()
    [0.4000000059604645, 0.4000000059604645]
    """

    def read(self, certificate: Certificate) -> Tensor:
        r"""The spectral radius.

        :param Certificate certificate: of a batch.
        :return: tensor of shape ``(B,)``.
        """
        return certificate.spectral_radius


class FixedPointError(_CertificateMetric):
    r"""Estimated relative distance of the reconstruction to the fixed point, :math:`\|x - x^*\| / \|x^*\|`, per sample.

    Use it in ``Trainer(metrics=...)``, as :class:`ContractionFactor`, at the same cost.

    :param str, None reduction: over the batch, as in all deepinv metrics; a Trainer wants ``None``, the default.
    """

    def read(self, certificate: Certificate) -> Tensor:
        r"""The error.

        :param Certificate certificate: of a batch.
        :return: tensor of shape ``(B,)``.
        """
        return certificate.error


def solving_model(model: Any) -> DEQReconstructor | None:
    r"""The deep equilibrium model in a model that may wrap it, as losses, data parallelism and compilation do.

    :param torch.nn.Module model: any model.
    :return: it, or ``None`` if there is none.
    :raises ValueError: if there are several.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, DEQReconstructor)]
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(found)} DEQReconstructors: pass the one that is meant.")
    return found[0] if found else None
