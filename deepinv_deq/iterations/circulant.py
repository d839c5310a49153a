r"""A circulant model of :math:`A^\top A`, with which a solver can take the physics out of a fixed-point problem.

The iterations of a DEQ converge as slowly as the least visible frequencies of the image. Tomography, blur and MRI act on
frequencies nearly one by one, so a division in the Fourier domain undoes most of that, for the price of two Fourier transforms.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from deepinv.physics import Physics
from torch import Tensor

from deepinv_deq.compat import random_numbers, version
from deepinv_deq.iterations.fingerprint import fingerprint
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.iterations.samples import sample_tensors
from deepinv_deq.states import Rows

_DRAWS = 6  # probes that the model is made of
_CHECKS = 2  # probes that judge it
_EXACT, _HOPELESS = 1e-4, 0.7  # relative errors of the model of one probe, beyond which the other probes change nothing
_FIT = 0.5  # largest relative error of a model that is of use; sparse-view CT has 0.33, random inpainting 0.7

State = tuple[tuple[Any, ...], tuple[Any, ...]]
_known: WeakKeyDictionary[Physics, tuple[State, torch.Size, Tensor | None]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass
class Origin:
    r"""Of which physics a replica is: kept on the replica, so that what was measured for the original serves all its replicas.

    :param weakref.ref physics: the user's physics.
    :param Replica whole: a replica that was never evaluated, of the physics for all samples.
    :param int root: which root of ``whole`` the physics is.
    :param int batch: number of samples.
    :param torch.Tensor, slice, None rows: the samples of this replica, where it is restricted to some.
    """

    physics: weakref.ref[Physics]
    whole: Replica
    root: int
    batch: int
    rows: Rows | None = None
    _shared_by_replicas = True

    def of(self, rows: Rows | None) -> Origin:
        r"""The origin of a replica for some samples."""
        return replace(self, rows=rows)


def spectrum(physics: Physics, x: Tensor) -> Tensor | None:
    r"""Eigenvalues of the circulant operator nearest to :math:`A^\top A`, measured with a few random images.

    They are measured anew when any tensor, number or part of the physics changes, as in ``physics.update(mask=...)``. This costs 8
    products with :math:`A^\top A`, or 2 where the operator is circulant, or far from it. The global random generators are left alone.

    :param deepinv.physics.Physics physics: linear operator.
    :param torch.Tensor x: any state, of shape ``(B, C, *spatial)``.
    :return: values on the grid of :func:`torch.fft.rfftn` over the spatial dimensions, not negative, of shape
        ``(B or 1, 1, *grid)``; NaN for samples without a good circulant approximation; None if no sample has one.
    """
    if x.is_complex() or x.ndim < 3 or not x.numel():
        return None
    origin = physics.__dict__.get("_origin")
    if origin is None:
        origin = Origin(weakref.ref(physics), Replica([physics]), 0, len(x))
    key, whole = origin.physics(), origin.whole
    state, twin = _state(whole, origin.root), whole.roots[origin.root]
    known = sample_tensors(twin, origin.batch, x.ndim)
    own = known is None or bool(known.rows or known.shared)  # every sample has, or may have, its own operator
    shape = torch.Size((origin.batch if own else 1, *x.shape[1:]))
    with _lock:
        measured = None if key is None else _known.get(key)
    if measured is None or measured[1] != shape or not _same(measured[0], state):
        with torch.inference_mode(False):
            replica = whole.again()
            measured = state, shape, _measure(replica.roots[origin.root], shape, x)
        if key is not None:
            with _lock:
                _known[key] = measured
    model = measured[2]
    return model if model is None or len(model) == 1 or origin.rows is None else model[origin.rows]


class CirculantInverse:
    r"""Division by ``response`` in the Fourier domain, a self-adjoint map of tensors of shape ``(B, C, *spatial)``.

    Two of the same response are equal, so that a solver which gets the same one twice applies it once.

    :param torch.Tensor response: positive values, shaped as :func:`spectrum` returns them; NaN leaves a frequency as it is.
    """

    def __init__(self, response: Tensor):
        # a product of complex numbers is four times as fast as a quotient
        self.factors = response.nan_to_num(1.0).reciprocal()

    def __call__(self, r: Tensor) -> Tensor:
        return _filtered(r.to(self.factors.dtype), self.factors).to(r.dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CirculantInverse):
            return NotImplemented
        mine, its = self.factors, other.factors
        return (mine.dtype, mine.device) == (its.dtype, its.device) and torch.equal(mine, its)

    def __hash__(self) -> int:
        return hash(self.factors.shape)


@torch.no_grad()
def _measure(physics: Physics, shape: torch.Size, like: Tensor) -> Tensor | None:
    def quotient() -> Tensor:
        return (above.sum(1, keepdim=True) / below.sum(1, keepdim=True)).clamp_min(0)

    dims = tuple(range(2, len(shape)))
    rng = np.random.default_rng(0)
    dtype = torch.promote_types(torch.float32, like.dtype)
    with torch.autocast(like.device.type, enabled=False):
        above = below = torch.zeros((), dtype=dtype, device=like.device)
        for i in range(_DRAWS):
            w, aw = _probe(physics, shape, rng, like, dtype)
            if i == 1:
                early = quotient()
                error, size = _energy(_filtered(w, early) - aw), _energy(aw)
                known, hopeless = error <= _EXACT**2 * size, error > _HOPELESS**2 * size
                early = early.masked_fill(~known, torch.nan)
                settled = (known | hopeless).all()
                outcome = int(settled.long() + (settled & known.any()))  # one synchronisation
                if outcome:
                    return early if outcome == 2 else None
            above = above + (torch.fft.rfftn(aw, dim=dims) * torch.fft.rfftn(w, dim=dims).conj()).real
            below = below + torch.fft.rfftn(w, dim=dims).abs().square()
        model = quotient()
        missed = size = torch.zeros((), dtype=dtype, device=like.device)
        for _ in range(_CHECKS):
            w, aw = _probe(physics, shape, rng, like, dtype)
            missed, size = missed + _energy(_filtered(w, model) - aw), size + _energy(aw)
    fits = torch.isfinite(size) & (missed <= _FIT**2 * size) & ~hopeless
    # each sample as it would be alone
    model = torch.where(known, early, model.masked_fill(~fits, torch.nan))
    return model if bool((fits | known).any()) else None


def _filtered(w: Tensor, model: Tensor) -> Tensor:
    dims = tuple(range(2, w.ndim))
    return torch.fft.irfftn(torch.fft.rfftn(w, dim=dims) * model, s=w.shape[2:], dim=dims)


def _energy(w: Tensor) -> Tensor:
    # in double precision: the squares of a large operator's images are Inf in single precision, and would fit anything
    return w.double().square().sum(dim=tuple(range(1, w.ndim)), keepdim=True)


def _probe(
    physics: Physics, shape: torch.Size, rng: np.random.Generator, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""An image with a flat spectrum and random phases, the same for all samples, and what :math:`A^\top A` makes of it."""
    dims = tuple(range(2, len(shape)))
    w = torch.fft.fftn(random_numbers(rng, (1, *shape[1:]), normal=True), dim=dims)
    w = torch.fft.ifftn(w / w.abs(), dim=dims).real.to(like.device, dtype).expand(shape).contiguous()
    return w, physics.A_adjoint_A(w.to(like.dtype)).to(dtype)


def _state(replica: Replica, root: int) -> State:
    r"""Everything on which the physics depends: tensors with their versions, and the plain attributes of all modules."""
    found = [f.tensor for f in replica.found.values() if root in f.roots]
    tensors = tuple((weakref.ref(t), version(t)) for t in found)
    return tensors, tuple(fingerprint(module, skip={"_origin"}) for module in replica.modules[root])


def _same(a: State, b: State) -> bool:
    same = len(a[0]) == len(b[0]) and all(s() is t() and v == w for (s, v), (t, w) in zip(a[0], b[0], strict=True))
    return same and a[1] == b[1]
