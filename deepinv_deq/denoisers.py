r"""A denoiser architecture suited to fixed points."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepinv.models import UNet
from torch import nn
from torch.nn.utils import parametrize

from deepinv_deq import compat
from deepinv_deq.denoiser_settings import NORMS, check, settings_in, settings_of_file
from deepinv_deq.files import contents_of, read_weights
from deepinv_deq.group_norm import GroupNorm


class EquilibriumUNet(UNet):
    r"""Residual U-Net for deep equilibrium models (section 4.2.1): group norm, and spectral or weight normalisation.

    .. math::

        D_\theta(x) = c \, x + R_\theta(x)

    :math:`R_\theta` is deepinv's :class:`deepinv.models.UNet` with group norm (:footcite:t:`wu2018group`) in the place of batch norm,
    which would couple the samples of a batch, and with normalised convolutions
    (:footcite:t:`miyato2018spectral,salimans2016weight`). Images of any size are padded to a multiple of
    :math:`2^{\text{scales} - 1}` and cropped back.

    The last, 1x1 convolution is not normalised and starts at zero, so that training starts from :math:`D_\theta(x) = c \, x`. With
    ``contraction`` :math:`c < 1`, the untrained iteration contracts for every linear physics at a safe stepsize
    (:meth:`FixedPointIteration.safe_stepsize`): it has one fixed point, and the adjoint equation is well-posed. With :math:`c = 1` the adjoint equation of the untrained network is singular wherever the operator has a null
    space, and training does not start. Training changes the contraction: :class:`deepinv_deq.losses.ContractionLoss` bounds it, and
    :meth:`DEQReconstructor.certify` measures it. Spectral normalisation bounds the weight matrix of each convolution; it does not prove
    that the iteration contracts. Inside a :class:`DEQReconstructor` the normalisation is computed once per pass.

    :param int, None in_channels: image channels, 2 for real and imaginary part. Default 1, or that of the pretrained weights.
    :param int, None out_channels: output channels, default ``in_channels``. If they differ there is no residual connection.
    :param Sequence[int], None channels: feature maps of each scale, from fine to coarse; at least two scales. Default
        ``(32, 64, 128)``, or those of the pretrained weights.
    :param str, None norm: ``"spectral"``, ``"weight"`` or ``None``.
    :param float, None contraction: factor :math:`c \in (0, 1]` of the residual connection. Default 0.9, or that of the pretrained
        weights.
    :param int context_channels: channels of a second image that the network gets besides ``x``, such as the linear reconstruction
        (see ``context`` of :class:`FixedPointIteration`). Pretrained weights without context are extended by zeros.
    :param float, None saturation: with a context :math:`\bar x` of ``in_channels`` channels, the network sees
        :math:`\bar x + r \tanh((x - \bar x) / r)` in the place of :math:`x`, where :math:`r` is ``saturation`` times the root mean square
        of :math:`\bar x`. Far from the linear reconstruction the iteration then contracts by itself, so solves from any start come near.
        Default: no saturation.
    :param int dim: 2 for images, 3 for volumes of shape ``(B, C, D, H, W)``.
    :param str, os.PathLike, None pretrained: weights of a Gaussian denoiser: a file written by
        ``examples/paper/pretrain_denoiser.py``, or one that ships with the package: ``"gray"`` (1 channel), ``"complex"`` (2, real and
        imaginary part) or ``"color"`` (3, RGB). These have ``channels=(16, 32, 64)`` and spectral norm, and are blind up to a noise
        level of 0.1. Training: BSDS500, recoloured at random for RGB, with a penalty on the Jacobian. Their PSNR and norms are in :doc:`/guide/fixed_points`.
    :param int groups: largest number of groups of a group norm; a scale uses the largest divisor of its channels up to it.
    :param str, torch.device device: where to put the weights.

    The attribute ``settings`` holds these arguments, without ``pretrained`` and ``device``, as a dictionary.

    :raises ValueError: for an unknown ``norm``, a setting out of range, or pretrained weights of another architecture.
    :raises FileNotFoundError: if there are no such pretrained weights.

    |sep|

    :Example:

    >>> import torch
    >>> from deepinv_deq import EquilibriumUNet
    >>> EquilibriumUNet(in_channels=2, channels=(4, 8, 16))(torch.rand(1, 2, 21, 30)).shape
    torch.Size([1, 2, 21, 30])
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        *,
        channels: Sequence[int] | None = None,
        norm: str | None = "spectral",
        groups: int = 8,
        contraction: float | None = None,
        context_channels: int = 0,
        saturation: float | None = None,
        dim: int = 2,
        pretrained: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ):
        weights = None if pretrained is None else read_weights(pretrained)
        trained = {} if weights is None else settings_in(weights, pretrained)
        in_channels = trained.get("in_channels", 1) if in_channels is None else in_channels
        channels = trained.get("channels", (32, 64, 128)) if channels is None else channels
        contraction = trained.get("contraction", 0.9) if contraction is None else contraction
        settings: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": in_channels if out_channels is None else out_channels,
            "channels": tuple(channels),
            "norm": norm,
            "groups": groups,
            "contraction": contraction,
            "context_channels": context_channels,
            "saturation": saturation,
            "dim": dim,
        }
        check(settings)
        # the residual connection is in forward: it has a factor, and skips the context
        super().__init__(
            in_channels + context_channels,
            settings["out_channels"],
            residual=False,
            channels_per_scale=settings["channels"],
            dim=dim,
        )
        _normalise(self, norm, groups)
        self.settings = settings
        self.context_channels, self.saturation, self.dim = context_channels, saturation, dim
        self.contraction = contraction if in_channels == settings["out_channels"] else 0.0
        if weights is not None:
            with contents_of(str(pretrained), f"weights that fit {self.settings}"):
                _load(self, weights["state_dict"], trained, pretrained)
        # convolutions take the memory format of their weights, and this one is faster on a CPU (docs/cost.md, memory format)
        self.to(device, memory_format=torch.channels_last if dim == 2 else torch.channels_last_3d)

    def forward(
        self, x: torch.Tensor, sigma: Any = None, *, context: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        r"""Denoise.

        :param torch.Tensor x: images of shape ``(B, C, H, W)``, or volumes of shape ``(B, C, D, H, W)``.
        :param float, None sigma: ignored, the denoiser is blind.
        :param torch.Tensor, None context: a second image of the same size with ``context_channels`` channels.
        :param kwargs: ignored, too.
        :return: images of the same shape, or with ``out_channels`` channels.
        :raises ValueError: if the context is missing, not wanted, or of another shape; if ``x`` has the wrong number of dimensions.
        """
        if x.ndim != self.dim + 2:
            raise ValueError(
                f"x must have shape (B, C, {'D, ' * (self.dim - 2)}H, W) for dim={self.dim}, got {tuple(x.shape)}."
            )
        got = 0 if context is None else context.shape[1]
        if got != self.context_channels:
            raise ValueError(
                f"This network takes {self.context_channels} context channels (context_channels=), got {got}."
            )
        if context is not None:
            context = context.expand(len(x), *context.shape[1:])
            x = x if self.saturation is None else _saturated(x, context, self.saturation)
        net_input = x if context is None else torch.cat([x, context], dim=1)
        out = _cropped(super().forward, net_input, 2 ** (len(self.settings["channels"]) - 1))
        return (out + self.contraction * x if self.contraction else out).contiguous()


def _saturated(x: torch.Tensor, centre: torch.Tensor, saturation: float) -> torch.Tensor:
    r"""Near ``centre`` the identity; no point is mapped further from it than a multiple of its root mean square."""
    square = centre.square().flatten(1).mean(dim=1)
    size = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # of a zero image, too, with a finite gradient
    radius = saturation * size.reshape(-1, *[1] * (x.ndim - 1))
    return centre + radius * torch.tanh((x - centre) / radius)


def _normalise(net: UNet, norm: str | None, groups: int) -> None:
    r"""Group norm in the place of batch norm, normalised convolutions, and a last convolution that starts at zero."""
    for block in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(block):
            if isinstance(layer, compat.layers_that_change()[0]):
                block[i] = GroupNorm(_divisor(layer.num_features, groups), layer.num_features)
    # A random residual, however small, is amplified where the data say little: training would start far from every solution.
    last = net.Conv_1x1
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    normalise = NORMS[norm]
    if normalise is not None:
        for layer in [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m is not last]:
            normalise(layer)
            _make_picklable(layer)


def _cropped(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, factor: int) -> torch.Tensor:
    r"""Pad images to a multiple of ``factor`` on each side, apply a function, and crop the result."""
    missing = [-side % factor for side in x.shape[2:]]
    if not any(missing):
        return function(x)
    padding = [part for side in reversed(missing) for part in (side // 2, side - side // 2)]
    out = function(nn.functional.pad(x, padding, mode="replicate"))
    for axis, (m, side) in enumerate(zip(missing, x.shape[2:], strict=True), start=2):
        out = out.narrow(axis, m // 2, side)
    return out


def _load(net: EquilibriumUNet, state: dict[str, torch.Tensor], trained: dict[str, Any], name: Any) -> None:
    r"""Load a state dictionary; the weights of a context that it lacks are zero."""
    free = {"context_channels": net.context_channels, "saturation": net.saturation}
    wanted = net.settings | {"contraction": trained["contraction"]}
    known = trained["context_channels"] in (0, net.context_channels) and trained["saturation"] in (None, net.saturation)
    if trained | free != wanted or not known:
        raise ValueError(f"The weights {str(name)!r} are of an EquilibriumUNet with {trained}, not {net.settings}.")
    own = net.state_dict()
    for key, value in state.items():
        if own[key].shape != value.shape:  # the first convolution, and what spectral norm keeps of it
            axis = 1 if value.ndim > 1 else 0
            more = own[key].shape[axis] - value.shape[axis]
            value = torch.cat([value, torch.zeros_like(own[key].narrow(axis, 0, more))], axis)
        own[key] = value
    net.load_state_dict(own)


def _make_picklable(layer: nn.Module) -> None:
    r"""PyTorch gives a parametrised layer a class of its own, which refuses to be pickled. It can be made again."""
    # spectral and weight norm of old-style state dictionaries: a local function, which cannot be pickled
    vars(layer).get("_load_state_dict_pre_hooks", {}).clear()
    type(layer).__reduce_ex__ = _reduced  # type: ignore[method-assign]


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    kind = type(layer).__bases__[0]
    return _parametrised, (kind, tuple(layer.parametrizations)), super(type(layer), layer).__getstate__()


def _parametrised(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    r"""A layer without weights of the class that PyTorch gives to parametrised layers."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(layer, name, nn.Identity())
    _make_picklable(layer)
    return layer


def _rebuild(cls: Any, settings: dict[str, Any], state: dict[str, Any], training: bool, frozen: list[str]) -> Any:
    r"""Networks that version 0.1 pickled."""
    net = cls(**settings_of_file(settings, state))
    net.load_state_dict(state, assign=True)  # which keeps dtype and device
    for name, p in net.named_parameters():
        p.requires_grad_(name not in frozen)
    return net.train(training)


def _divisor(channels: int, most: int) -> int:
    return next(g for g in range(min(most, channels), 0, -1) if channels % g == 0)
