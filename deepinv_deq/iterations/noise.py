r"""Noise levels: which denoisers take one, under which name, and one for each sample of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from deepinv.models import Denoiser
from torch import Tensor, nn

_WRAPPED = ("module", "_orig_mod", "denoiser")  # of data-parallel, compiled, and deepinv's wrapped denoisers
_OTHER_NAMES = ("ths", "t")  # what deepinv's variational denoisers and its diffusion network call the noise level


def name_of_sigma(denoiser: nn.Module, sigma: Any, argument: str = "sigma") -> str:
    r"""The keyword under which a denoiser takes a noise level.

    :param torch.nn.Module denoiser: the denoiser.
    :param float, torch.Tensor, None sigma: the noise level that it gets.
    :param str argument: where a user gives the noise level, for the error.
    :return: the name; ``""`` where it takes none.
    :raises ValueError: if it needs one and gets none.
    """
    parameters = _parameters(denoiser)
    of_deepinv = isinstance(denoiser, Denoiser)
    names = ("sigma", *_OTHER_NAMES) if of_deepinv else ("sigma",)
    name = next((name for name in names if name in parameters), "sigma" if of_deepinv else "")
    given = parameters.get(name)
    needed = given is not None and given.default is inspect.Parameter.empty
    inside = next((m for child, m in denoiser.named_children() if child in _WRAPPED), None)
    wraps = of_deepinv or type(denoiser).__module__.startswith("torch.")
    if given is None and inside is not None and wraps:
        return name_of_sigma(inside, sigma, argument)
    if needed and sigma is None:
        raise ValueError(
            f"{type(denoiser).__name__} needs a noise level: pass {argument}=, in units of the image. model(y, physics, "
            "sigma=...) then replaces it for some measurements."
        )
    return name


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except ValueError:  # a module of TorchScript has no signature
        return {}


def noise_levels(sigma: Any, y: Any) -> float | Tensor | None:
    r"""A noise level that was given for a batch.

    :param float, torch.Tensor, None sigma: one number, one per sample, or a tensor with one entry per sample in dimension 0.
    :param torch.Tensor y: measurements.
    :return: a number, a tensor with one row per sample, or ``None`` where none was given.
    :raises ValueError: if it is negative or not finite, or its shape does not fit the batch.
    """
    if sigma is None:
        return None
    part = y if isinstance(y, Tensor) else y[0]
    if isinstance(sigma, (list, tuple)):
        sigma = torch.tensor(sigma, dtype=torch.float64)
    if not isinstance(sigma, Tensor):
        sigma = float(sigma)
        levels = torch.tensor(sigma)
    else:
        dtype = part.real.dtype if part.is_floating_point() or part.is_complex() else torch.get_default_dtype()
        sigma = levels = sigma.to(part.device, dtype)
    if not bool((torch.isfinite(levels) & (levels >= 0)).all()):
        raise ValueError(f"sigma is a noise level in units of the image, and must not be negative or NaN: got {sigma}.")
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    if len(sigma) not in (1, len(part)):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)}, and the batch {len(part)} samples: give one number, one per sample of shape "
            f"({len(part)},), or a tensor with one entry per sample in dimension 0."
        )
    if sigma.numel() == 1:
        return sigma.reshape(())
    return sigma


def broadcast(sigma: Any, x: Tensor, denoiser: nn.Module) -> Any:
    r"""One level per sample, as a denoiser takes it: deepinv's take shape ``(B,)``, and other modules broadcast it over images.

    :param float, torch.Tensor sigma: the noise level.
    :param torch.Tensor x: images of shape ``(B, C, H, W)``.
    :param torch.nn.Module denoiser: the denoiser.
    :return: the level, of shape ``(B, 1, 1, 1)`` where ``denoiser`` is not deepinv's.
    """
    one_each = isinstance(sigma, Tensor) and sigma.ndim == 1 and not isinstance(denoiser, Denoiser)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if one_each else sigma
