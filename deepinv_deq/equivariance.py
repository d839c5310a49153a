r"""How equivariant a trained model is: the measures of Tables 2 and 3 (section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.loss.metric import PSNR
from deepinv.physics import Physics
from deepinv.transform import Rotate, Transform
from torch import Tensor

from deepinv_deq.iterations.starts import state_of
from deepinv_deq.metrics import solving_model


class _Equivariance(PSNR):
    r"""PSNR between ``T f(x)`` and ``f(T x)``, one group element for both."""

    def __init__(self, transform: Transform | None = None, *, params: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if transform is None:
            transform, params = Rotate(multiples=90, positive=True), {"theta": [90]} if params is None else params
        if not isinstance(transform, Transform):
            raise TypeError(f"transform must be a deepinv.transform.Transform, got {type(transform).__name__}.")
        self.transform, self.params = transform, params

    def forward(
        self,
        x_net: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        physics: Physics | None = None,
        model: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        r"""Compute the measure. Options such as ``complex_abs`` apply to the two images that are compared.

        :param torch.Tensor x_net: reconstruction, used for its batch size only.
        :param torch.Tensor, None x: ground truth, of shape ``(B, C, H, W)``.
        :param torch.Tensor, None y: not used, the measurement is :math:`A x`.
        :param deepinv.physics.Physics physics: forward operator.
        :param torch.nn.Module model: reconstruction model.
        :param kwargs: ignored.
        :return: PSNR in dB, of shape ``(B,)``; NaN where there is no ground truth, as deepinv's metrics do.
        :raises ValueError: without ``physics`` or ``model``.
        """
        if physics is None or model is None:
            raise ValueError(f"{type(self).__name__} needs physics= and model=, as deepinv.Trainer passes them.")
        system = self.system(physics, model)
        if x is None or system is None:
            return torch.full((x_net.shape[0],), torch.nan)
        params = self.transform.get_params(x) if self.params is None else self.params
        with torch.no_grad():
            turned_after = self.transform.transform(system(x), **params)
            turned_before = system(self.transform.transform(x, **params))
        return super().forward(turned_before, turned_after)

    def system(self, physics: Physics, model: Any) -> Callable[[Tensor], Tensor] | None:
        r"""The map whose equivariance is measured."""
        raise NotImplementedError


class PipelineEquivariance(_Equivariance):
    r"""Equivariance of measuring and reconstructing, :math:`f_\theta \circ A` (Table 2).

    PSNR of the difference between :math:`f_\theta(A T_g x)` and :math:`T_g f_\theta(A x)`, in dB; higher is more
    equivariant. Use it in ``Trainer(metrics=...)`` for any model, or call it with ``x_net``, ``x``, ``physics``, ``model``.

    :param deepinv.transform.Transform, None transform: group; default the rotation by 90° counterclockwise, which needs no
        interpolation. Of any other, one random element is drawn per call.
    :param dict, None params: fixed parameters of the transform, such as ``{"theta": [90]}``, instead of random ones.
    :param kwargs: arguments of :class:`deepinv.loss.metric.PSNR`.

    :raises TypeError: if ``transform`` is not a deepinv transform.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv.physics import Denoising
    >>> from deepinv_deq import PipelineEquivariance
    >>> x = torch.rand(2, 1, 8, 8)
    >>> PipelineEquivariance()(x, x, physics=Denoising(), model=lambda y, physics: y)
    tensor([80., 80.])
    """

    def system(self, physics: Physics, model: Any) -> Callable[[Tensor], Tensor]:
        r""":math:`x \mapsto f_\theta(A x)`.

        :param deepinv.physics.Physics physics: forward operator.
        :param torch.nn.Module model: reconstruction model.
        :return: the map.
        """
        return lambda x: model(physics.A(x), physics)


class IterationEquivariance(_Equivariance):
    r"""Equivariance of the learned operator :math:`F_\theta` of a :class:`DEQReconstructor` (Table 3).

    PSNR of the difference between :math:`T_g F_\theta(x, A x)` and :math:`F_\theta(T_g x, A T_g x)`, in dB; higher is more
    equivariant. For a model without an ``iteration``, such as the linear one a Trainer compares with, it is NaN.

    :param deepinv.transform.Transform, None transform: group; default the rotation by 90° counterclockwise, which needs no
        interpolation. Of any other, one random element is drawn per call.
    :param dict, None params: fixed parameters of the transform, such as ``{"theta": [90]}``, instead of random ones.
    :param kwargs: arguments of :class:`deepinv.loss.metric.PSNR`.

    :raises TypeError: if ``transform`` is not a deepinv transform.
    """

    def system(self, physics: Physics, model: Any) -> Callable[[Tensor], Tensor] | None:
        r""":math:`x \mapsto F_\theta(x; A x)`.

        :param deepinv.physics.Physics physics: forward operator.
        :param DEQReconstructor model: deep equilibrium model.
        :return: the map, or ``None`` if the model has no iteration.
        """
        iteration = getattr(solving_model(model) or model, "iteration", None)
        if iteration is None:
            return None

        def once(x: Tensor) -> Tensor:
            f = iteration.bind(y := physics.A(x), physics)
            return iteration.output(f(state_of(x, f.init(y))))

        return once
