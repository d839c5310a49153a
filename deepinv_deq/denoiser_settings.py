r"""Settings of :class:`EquilibriumUNet`: which are valid, and those of saved networks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrizations

from deepinv_deq.files import contents_of

#: Normalisations of a convolution, by their names.
NORMS = {"spectral": parametrizations.spectral_norm, "weight": parametrizations.weight_norm, None: None}


def check(settings: dict[str, Any]) -> None:
    r"""Refuse settings out of range.

    :param dict settings: those of an :class:`EquilibriumUNet`.
    :raises ValueError: if one is out of range.
    """
    norm, channels, contraction = (settings[k] for k in ("norm", "channels", "contraction"))
    context_channels, dim = settings["context_channels"], settings["dim"]
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}: must be one of {', '.join(map(repr, NORMS))}.")
    if len(channels) < 2 or min(channels) < 1:
        raise ValueError(f"channels needs at least two scales of at least one feature map, got {tuple(channels)}.")
    if not 0 < contraction <= 1:
        raise ValueError(f"contraction must be in (0, 1], got {contraction}.")
    if context_channels < 0:
        raise ValueError(f"context_channels must not be negative, got {context_channels}.")
    if dim not in (2, 3):
        raise ValueError(f"dim must be 2 (images) or 3 (volumes), got {dim}.")
    _check_saturation(settings["saturation"], settings["in_channels"], context_channels)


def _check_saturation(saturation: float | None, in_channels: int, context_channels: int) -> None:
    if saturation is None:
        return
    if not 0 < saturation < float("inf"):
        raise ValueError(f"saturation must be positive and finite, got {saturation}.")
    if context_channels != in_channels:
        raise ValueError(
            f"saturation needs a context with the {in_channels} channels of the image, got context_channels={context_channels}."
        )


def settings_in(weights: dict[str, Any], name: Any) -> dict[str, Any]:
    r"""Complete settings of a file of weights.

    :param dict weights: contents of the file.
    :param str, os.PathLike name: the file, for errors.
    :raises ValueError: if the file holds something else.
    """
    if "settings" not in weights or "state_dict" not in weights:
        raise ValueError(f"{str(name)!r} holds no weights of an EquilibriumUNet.")
    with contents_of(name, "weights of an EquilibriumUNet"):
        return settings_of_file(weights["settings"], weights["state_dict"])


def settings_of_file(settings: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    r"""Complete settings of a saved network; those of version 0.1 had no factor, no context and two dimensions.

    :param dict settings: as saved, with the weights ``state``.
    :raises ValueError: if a setting is of a wrong type, or such a network has more weights than are there: it must not be built.
    """
    known = {"contraction": 1.0, "context_channels": 0, "saturation": None, "dim": 2} | settings
    known["channels"] = channels = tuple(known["channels"])
    numbers = (*channels, *(known[k] for k in ("in_channels", "out_channels", "groups", "context_channels", "dim")))
    right = all(type(n) is int and n >= 0 for n in numbers) and isinstance(known["contraction"], (int, float))
    if not right or not isinstance(known["saturation"], (int, float, type(None))):
        raise ValueError(f"settings that no EquilibriumUNet has: {known}")
    check(known)
    inputs, outputs = known["in_channels"] + known["context_channels"], known["out_channels"]
    least = 3 ** known["dim"] * (sum(n * n for n in channels) + channels[0] * inputs) + channels[0] * outputs
    if sum(t.numel() for t in state.values()) < least:
        raise ValueError(f"fewer than {least:,} weights, which such a network has")
    return known
