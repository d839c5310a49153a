r"""Whether a bound map may be restricted to some samples of its batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.iterations.dataflow import passes_nan_on
from deepinv_deq.iterations.fingerprint import fingerprint
from deepinv_deq.states import as_tuple

if TYPE_CHECKING:
    from deepinv_deq.iterations.capture import Capture
    from deepinv_deq.iterations.replica import Replica

_LIMIT = 64  # verdicts kept
_CACHES = ("_verdicts", "_origin", "_warned_stochastic")


class Verdicts:
    r"""Whether the maps of an iteration can be restricted to samples. The result is cached per structure (modules, shapes, dtypes).

    Everything that may depend on samples must be known: constants by their contract, tensors of the physics by the table of
    :mod:`deepinv_deq.iterations.samples`; parameters never do. What is not in the table (the denoiser, a physics of a user) must
    treat samples one by one, with tensors that all samples share. This is proved for all values at once, at random states and
    tensors: no value of one sample reaches another (:mod:`deepinv_deq.iterations.dataflow`). The operations are the same at every
    place in the batch, and for the number of samples in question. Without this proof, the batch is solved whole. So it is where a
    module has forward hooks.
    """

    _shared_by_replicas = True

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Verdicts:
        return Verdicts()

    def __reduce__(self) -> tuple[Callable[[], Verdicts], tuple[()]]:
        return Verdicts, ()

    def separable(self, f: Capture, size: int) -> bool:
        r"""The verdict on a map.

        :param Capture f: what the map depends on.
        :param int size: number of samples of the restriction.
        :return: whether its restrictions are exact.
        """
        if f.samples() is None or not _constants_are_known(f) or _in_doubt(f):
            return False
        try:
            make = size, _make(f)
        except (RuntimeError, TypeError):  # values that cannot be read, as inside of torch.func
            return False
        with self._lock:
            if make in self._known:
                return self._known[make]
        verdict = _treats_samples_one_by_one(f, size)
        if verdict is None:
            return False
        with self._lock:
            if len(self._known) >= _LIMIT:
                self._known.clear()
            self._known[make] = verdict
        return verdict


def _constants_are_known(f: Capture) -> bool:
    own, _ = f.iteration.split(f.constants)
    return f.iteration.select_constants(own, slice(0, 1)) is not None and all(
        c.ndim and len(c) == f.batch for c in f.constants
    )


def _in_doubt(f: Capture) -> bool:
    r"""Whether a buffer of the iteration has one row per sample, such as noise levels, or couples them in a known way, or a module
    has forward hooks."""
    scalars = _settings(f) | {id(f.levels)}
    known = f.samples()
    samples = {id(t) for t in (known.rows if known else ()) if t is not f.levels}
    for found in f.pristine.found.values():
        of_iteration = 0 in found.roots and not found.layer and found.role in ("buffer", "plain")
        rows = found.tensor.ndim and len(found.tensor) == f.batch > 1
        if (of_iteration and rows and id(found.tensor) not in scalars) or (found.statistic and 0 in found.roots):
            return True
        if id(found.tensor) in samples and 0 in found.roots:
            return True
    # a hook may couple samples, depending on what it refers to, and the test would show it random images and NaN
    if compat.has_global_hooks() or any(compat.has_forward_hooks(m) for root in f.pristine.modules for m in root):
        return True
    batch_norms, _ = compat.layers_that_change()
    return any(isinstance(m, batch_norms) and m.training for m in f.pristine.modules[0])


def _settings(f: Capture) -> set[int]:
    r"""The stepsize and the data weight, as they are stored, by identity."""
    return {id(t) for name, t in compat.stored(f.iteration) if name in ("stepsize", "data_weight")}


def _make(f: Capture) -> tuple[Any, ...]:
    r"""Everything that decides on the verdict but the values of tensors, which the test replaces by random ones."""
    iteration, physics, known = f.iteration, f.physics, f.samples()
    shared = {id(t) for t in (known.shared if known else ())}
    modules = tuple(fingerprint(m, _CACHES) for root in f.pristine.modules for m in root if m is not iteration)
    own = fingerprint(iteration, (*_CACHES, "sigma"))  # the noise level is the same for all samples
    tensors = tuple(
        (found.role, t.shape, t.dtype, _content(t) if key in shared or found.roots == {0} else None)
        for key, found in f.pristine.found.items()
        for t in [found.tensor]
    )
    return modules, own, type(physics), tensors, tuple(c.shape for c in f.constants), tuple(f.example() or ())


def _content(t: Tensor) -> bytes | None:
    r"""The values of indices and masks, which cannot be replaced by random ones."""
    return None if _is_random(t) else t.detach().cpu().numpy().tobytes()


def _is_random(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _treats_samples_one_by_one(f: Capture, size: int) -> bool | None:
    r"""Whether the map of ``size`` samples is that of the batch, for any values; ``None`` where that shows nothing.

    Three evaluations with random states and tensors show it. The batch; the batch with its samples turned by one place, the first of
    them NaN: they treat all samples alike, and no value of one sample reaches another; some samples by themselves.
    """
    example, batch = f.example(), f.batch
    if example is None or any(len(shape) < 1 or shape[0] != batch for shape, _, _ in example):
        return False
    rng = np.random.default_rng(0)
    put: dict[int, Tensor] = {}
    known = f.samples()
    shared, rows = ({id(t) for t in (getattr(known, name) if known else ())} for name in ("shared", "rows"))
    fixed = _settings(f)
    for key, found in f.pristine.found.items():
        t, trained = found.tensor, found.role in ("parameter", "computed")
        if (key in shared or (found.roots == {0} and key not in fixed)) and t.numel() and _is_random(t):
            noise = _noise(t.shape, t, rng)  # buffers may have to stay positive, as variances
            put[key] = t.detach() + _scale(t) * (2 * noise - 1 if trained else noise)
        elif found.role == "buffer":
            put[key] = t.detach().clone()  # a layer that keeps statistics must not keep those of random images
    turned = {key: put.get(key, f.pristine.found[key].tensor).roll(1, 0) for key in rows}
    levels = f.levels
    if levels is not None and id(levels) in turned:  # which go through the user's code
        turned[id(levels)] = _turned(put.get(id(levels), levels))
    # constants become random, too, but not negative: they may be counts
    constants = {id(c): c.detach() + _scale(c) * _noise(c.shape, c, rng) for c in f.constants if c.numel()}
    state = [compat.random_numbers(rng, s, normal=True).to(device, dtype) for s, dtype, device in example]
    some = slice(batch - size, batch)
    try:
        with torch.no_grad():
            # copies: a network may write to its input
            part = _evaluate(f.replicate(put | constants, some), tuple(t[some].clone() for t in state))
            of_turned = f.replicate(put | turned | {key: _turned(c) for key, c in constants.items()})
            points = tuple(_turned(t) for t in state)
            image, passed_on = passes_nan_on(lambda: _evaluate(of_turned, points))
            whole = _evaluate(f.replicate(put | constants), tuple(state))
    except torch.cuda.OutOfMemoryError:  # no verdict, which would be remembered
        raise
    except Exception:  # whatever a physics says about a batch that it does not expect
        return False
    if not all(bool(torch.isfinite(t).all()) for t in whole):
        return None
    pairs = [(a, b[some]) for a, b in zip(part, whole, strict=True)]
    pairs += [(a[1:], b[:-1]) for a, b in zip(image, whole, strict=True)]
    return passed_on and all(a.shape == b.shape and bool((a - b).norm() <= _rounding(a) * b.norm()) for a, b in pairs)


def _turned(t: Tensor) -> Tensor:
    t = t.roll(1, 0)
    t[0] = torch.nan
    return t


def _evaluate(made: tuple[Replica, tuple[Tensor, ...]], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    replica, constants = made
    for module in (m for root in replica.modules for m in root):
        compat.run_eagerly(module)
    return as_tuple(replica.roots[0](state[0] if len(state) == 1 else state, replica.roots[1], *constants))


def _scale(t: Tensor) -> float:
    return max(0.1 * float(t.detach().abs().square().mean().sqrt()), 0.02)


def _noise(shape: torch.Size, like: Tensor, rng: np.random.Generator) -> Tensor:
    return compat.random_numbers(rng, shape).to(like.device, like.dtype)


def _rounding(t: Tensor) -> float:
    r"""Largest relative difference by rounding between evaluations in different batches."""
    device = t.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.real.dtype
    return 8 * max(torch.finfo(dtype).eps ** 0.75, compat.unit_roundoff(dtype, t.device))
