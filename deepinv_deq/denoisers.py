r"""A denoiser architecture suited to fixed points."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from deepinv.models import UNet
from torch import nn
from torch.nn.utils import parametrizations

from deepinv_deq._weights import read_weights

_NORMS = {"spectral": parametrizations.spectral_norm, "weight": parametrizations.weight_norm, None: None}


class EquilibriumUNet(UNet):
    r"""Residual U-Net for deep equilibrium models (section 4.2.1): group norm, and spectral or weight normalisation.

    deepinv's :class:`deepinv.models.UNet` with every batch norm, which would couple the samples of a batch, replaced by
    group norm (:footcite:t:`wu2018group`), and normalised convolutions (:footcite:t:`miyato2018spectral,salimans2016weight`).
    Images of any size are padded to a multiple of :math:`2^{\text{scales} - 1}` and cropped back.

    The last, 1x1 convolution is not normalised and starts at zero: training starts from :math:`D_\theta = I`, where the
    fixed points of DE-Grad and DE-Prox are the least-squares solutions.
    Inside a :class:`DEQReconstructor` the normalisation is computed once per pass. Spectral normalisation bounds the
    weight matrix of each convolution; it favours, but does not prove, that the iteration contracts.

    :param int, None in_channels: image channels, 2 for real and imaginary part. Default 1, or that of the pretrained weights.
    :param int, None out_channels: output channels, default ``in_channels``. Without it equal there is no residual connection.
    :param Sequence[int], None channels: feature maps of each scale, from fine to coarse; at least two scales. Default
        ``(32, 64, 128)``, or those of the pretrained weights.
    :param str, None norm: ``"spectral"``, ``"weight"`` or ``None``.
    :param str, os.PathLike, None pretrained: weights of a Gaussian denoiser: ``"gray"`` or ``"complex"``, which ship with the
        package (one channel, or two for real and imaginary part; 16-32-64, spectral norm, blind up to a noise level of 0.1,
        BSDS500; the Jacobian of ``"complex"`` is kept below 0.9, as DE-Prox needs it), or a file written by
        ``examples/paper/pretrain_denoiser.py``.
    :param int groups: largest number of groups of a group norm; a scale uses the largest divisor of its channels up to it.
    :param str, torch.device device: where to put the weights.

    The attribute ``settings`` holds these arguments, all but the last two, as a dictionary.

    :raises ValueError: for an unknown ``norm``, fewer than two scales, or pretrained weights of another architecture.
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
        pretrained: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ):
        if norm not in _NORMS:
            raise ValueError(f"Unknown norm {norm!r}: must be one of 'spectral', 'weight', None.")
        weights = None if pretrained is None else read_weights(pretrained)
        if in_channels is None:
            in_channels = 1 if weights is None else weights["settings"]["in_channels"]
        if channels is None:
            channels = (32, 64, 128) if weights is None else weights["settings"]["channels"]
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"channels needs at least two scales of at least one feature map, got {tuple(channels)}.")
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(
            in_channels, out_channels, residual=in_channels == out_channels, channels_per_scale=tuple(channels)
        )
        for block in [m for m in self.modules() if isinstance(m, nn.Sequential)]:
            for i, layer in enumerate(block):
                if isinstance(layer, nn.BatchNorm2d):
                    block[i] = nn.GroupNorm(_divisor(layer.num_features, groups), layer.num_features)
        # The last layer is left free and starts at zero: a random residual, however small, is amplified where the data
        # say little, so that training would start far from every solution, or diverge before it has said a word.
        last = self.Conv_1x1
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        normalise = _NORMS[norm]
        if normalise is not None:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d) and m is not last]:
                normalise(layer)
        self.settings = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": tuple(channels),
            "norm": norm,
            "groups": groups,
        }
        if weights is not None:
            if weights["settings"] != self.settings:
                raise ValueError(
                    f"The weights {str(pretrained)!r} are of an EquilibriumUNet with {weights['settings']}, not {self.settings}."
                )
            self.load_state_dict(weights["state_dict"])
        # convolutions follow their weights, and are faster with the channels innermost: twice so on CPU
        self.to(device, memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, sigma: Any = None, **kwargs: Any) -> torch.Tensor:
        r"""Denoise.

        :param torch.Tensor x: images of shape ``(B, C, H, W)``.
        :param float, None sigma: ignored, the denoiser is blind.
        :param kwargs: ignored, too.
        :return: images of the same shape, or with ``out_channels`` channels.
        """
        return super().forward(x, sigma, **kwargs).contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        # PyTorch refuses to pickle parametrized layers; settings and state say all there is to say
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        return _rebuild, (type(self), self.settings, self.state_dict(), self.training, frozen)

    def __deepcopy__(self, memo: dict[int, Any]) -> EquilibriumUNet:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _rebuild(
    cls: type[EquilibriumUNet], settings: dict[str, Any], state: dict[str, Any], training: bool, frozen: list[str]
) -> EquilibriumUNet:
    net = cls(**settings)
    net.load_state_dict(state, assign=True)  # which keeps dtype and device
    for name, p in net.named_parameters():
        p.requires_grad_(name not in frozen)
    return net.train(training)


def _divisor(channels: int, most: int) -> int:
    return next(g for g in range(min(most, channels), 0, -1) if channels % g == 0)
