r"""A circulant model of :math:`A^\top A`, with which a solver can take the physics out of a fixed-point problem.

The iterations of a DEQ converge as slowly as the least visible frequencies of the image. Tomography, blur and MRI act on
frequencies nearly one by one, so a filter undoes most of that, for the price of two Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from deepinv.physics import Physics
from torch import Tensor

_DRAWS = 6  # probes that the model is made of
_CHECKS = 2  # probes that judge it
_FIT = 0.5  # largest relative error of a model that is of use; sparse-view CT has 0.33, random inpainting 0.7

Versions = tuple[tuple[Tensor, int], ...]
_known: WeakKeyDictionary[Physics, tuple[Versions, torch.Size, Tensor | None]] = WeakKeyDictionary()


def spectrum(physics: Physics, x: Tensor) -> Tensor | None:
    r"""Eigenvalues of the circulant operator nearest to :math:`A^\top A`, measured with a few random images.

    They are kept as long as the tensors of the physics are, and the global random generators are left alone.

    :param deepinv.physics.Physics physics: linear operator.
    :param torch.Tensor x: any state, of shape ``(B, C, *spatial)``.
    :return: values on the grid of :func:`torch.fft.rfftn` over the spatial dimensions, not negative, of shape
        ``(B or 1, 1, *grid)``; NaN for samples to whose operator no circulant one comes near, ``None`` if that is all.
    """
    if x.is_complex() or x.ndim < 3 or not x.numel():
        return None
    tensors = [t for t in (*physics.parameters(), *physics.buffers()) if t.ndim]
    own = any(len(x) > 1 and len(t) == len(x) for t in tensors)  # every sample may have its own operator
    shape = torch.Size((len(x) if own else 1, *x.shape[1:]))
    versions = tuple((t, 0 if t.is_inference() else t._version) for t in tensors)
    known = _known.get(physics)
    if known is None or known[1] != shape or not _same(known[0], versions):
        known = _known[physics] = versions, shape, _measure(physics, shape, x)
    return known[2]


def inverse_filter(response: Tensor) -> Callable[[Tensor], Tensor]:
    r"""The filter that divides by ``response`` in the Fourier domain; self-adjoint.

    :param torch.Tensor response: positive values, shaped as :func:`spectrum` returns them; NaN is no filter at all.
    :return: a map of tensors of shape ``(B, C, *spatial)``.
    """
    response = response.nan_to_num(1.0)

    def apply(r: Tensor) -> Tensor:
        dims = tuple(range(2, r.ndim))
        out = torch.fft.irfftn(torch.fft.rfftn(r.to(response.dtype), dim=dims) / response, s=r.shape[2:], dim=dims)
        return out.to(r.dtype)

    return apply


@torch.no_grad()
def _measure(physics: Physics, shape: torch.Size, like: Tensor) -> Tensor | None:
    dims = tuple(range(2, len(shape)))
    rng = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(torch.float32, like.dtype)
    with torch.autocast(like.device.type, enabled=False):
        above = below = torch.zeros((), dtype=dtype, device=like.device)
        for _ in range(_DRAWS):
            w, aw = _probe(physics, shape, rng, like, dtype)
            above = above + (torch.fft.rfftn(aw, dim=dims) * torch.fft.rfftn(w, dim=dims).conj()).real
            below = below + torch.fft.rfftn(w, dim=dims).abs().square()
        model = (above.sum(1, keepdim=True) / below.sum(1, keepdim=True)).clamp_min(0)
        missed = size = torch.zeros((), dtype=dtype, device=like.device)
        for _ in range(_CHECKS):
            w, aw = _probe(physics, shape, rng, like, dtype)
            guess = torch.fft.irfftn(torch.fft.rfftn(w, dim=dims) * model, s=shape[2:], dim=dims)
            missed, size = missed + _energy(guess - aw), size + _energy(aw)
    fits = missed <= _FIT**2 * size
    return model.masked_fill(~fits, torch.nan) if bool(fits.any()) else None


def _energy(w: Tensor) -> Tensor:
    return w.square().sum(dim=tuple(range(1, w.ndim)), keepdim=True)


def _probe(
    physics: Physics, shape: torch.Size, rng: torch.Generator, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""An image with a flat spectrum and random phases, the same for all samples, and what :math:`A^\top A` makes of it."""
    dims = tuple(range(2, len(shape)))
    w = torch.fft.fftn(torch.randn(1, *shape[1:], generator=rng, dtype=torch.float64), dim=dims)
    w = torch.fft.ifftn(w / w.abs(), dim=dims).real.to(like.device, dtype).expand(shape).contiguous()
    return w, physics.A_adjoint_A(w.to(like.dtype)).to(dtype)


def _same(a: Versions, b: Versions) -> bool:
    return len(a) == len(b) and all(s is t and v == w for (s, v), (t, w) in zip(a, b, strict=True))
