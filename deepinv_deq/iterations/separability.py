r"""Whether a bound map may be restricted to some samples of its batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.states import as_tuple

if TYPE_CHECKING:
    from deepinv_deq.iterations.capture import Capture
    from deepinv_deq.iterations.replica import Replica

_LIMIT = 64  # verdicts kept
_CACHES = ("_verdicts", "_origin", "_warned_stochastic")
_NUMBERS = (int, float, bool, str, type(None))


class Verdicts:
    r"""Whether the maps of an iteration can be restricted to samples, decided once for all maps of the same make.

    Everything that may depend on samples must be known: constants by their contract, tensors of the physics by the table of
    :mod:`deepinv_deq.iterations.samples`; parameters never do. What is not in the table (the denoiser, a physics of a user) must
    treat samples one by one, with tensors that all samples share. This is tested with random states *and random tensors*, because
    the present ones may hide a dependence, as masks per sample that are all one, or a coupling behind a layer that starts at zero.
    """

    _shared_by_replicas = True

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Verdicts:
        return Verdicts()

    def __reduce__(self) -> tuple[Callable[[], Verdicts], tuple[()]]:
        return Verdicts, ()

    def separable(self, f: Capture) -> bool:
        r"""The verdict on a map.

        :param Capture f: what the map depends on.
        :return: whether its restrictions are exact.
        """
        if f.samples() is None or not _constants_are_known(f) or _in_doubt(f):
            return False
        make = _make(f)
        with self._lock:
            if make in self._known:
                return self._known[make]
        verdict = _treats_samples_one_by_one(f)
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
    r"""Whether a buffer of the iteration has one row per sample, such as noise levels, or couples them in a known way."""
    iteration = f.iteration
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
    batch_norms, _ = compat.layers_that_change()
    return any(isinstance(m, batch_norms) and m.training for m in f.pristine.modules[0])


def _settings(f: Capture) -> set[int]:
    r"""The stepsize and the data weight, as they are stored, by identity."""
    inside = f.iteration.__dict__
    stored = inside["_parameters"] | inside["_buffers"]
    return {id(stored[name]) for name in ("stepsize", "data_weight") if name in stored}


def _make(f: Capture) -> tuple[Any, ...]:
    r"""Everything that decides on the verdict but the values of tensors."""
    iteration, physics = f.iteration, f.physics
    modules = tuple((type(m), _plain(m.__dict__, skip=m is iteration)) for root in f.pristine.modules for m in root)
    tensors = tuple((found.role, found.tensor.shape) for found in f.pristine.found.values())
    return modules, type(physics), tensors, tuple(c.shape for c in f.constants), tuple(f.example() or ())


def _plain(value: Any, skip: bool = False) -> Any:
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, dict):  # the noise level of the iteration is the same for all samples
        return tuple((str(k), _plain(v)) for k, v in value.items() if not (skip and k == "sigma") and k not in _CACHES)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return type(value)


def _treats_samples_one_by_one(f: Capture) -> bool | None:
    r"""Compare one sample alone with the same sample in the batch; ``None`` where that shows nothing."""
    example, batch, iteration = f.example(), f.batch, f.iteration
    if example is None or any(len(shape) < 1 or shape[0] != batch for shape, _, _ in example):
        return False
    rng = torch.Generator().manual_seed(0)
    put: dict[int, Tensor] = {}
    known = f.samples()
    shared = {id(t) for t in (known.shared if known else ())}
    fixed = _settings(f)
    for key, found in f.pristine.found.items():
        t = found.tensor
        random = key in shared or (found.roots == {0} and found.role in ("parameter", "computed") and key not in fixed)
        if random and t.numel() and (t.is_floating_point() or t.is_complex()):
            put[key] = t.detach() + _scale(t) * (2 * _noise(t.shape, t, rng) - 1)
        elif found.role == "buffer":
            put[key] = t.detach().clone()  # a layer that keeps statistics must not keep those of random images
    # constants become random, too, but not negative: they may be counts
    put |= {id(c): c.detach() + _scale(c) * _noise(c.shape, c, rng) for c in f.constants if c.numel()}
    state = [torch.randn(s, generator=rng, dtype=torch.float32).to(device, dtype) for s, dtype, device in example]
    row = slice(batch // 2, batch // 2 + 1)
    try:
        with torch.no_grad():
            alone = tuple(t[row].clone() for t in state)  # a network may write to its input
            whole = _evaluate(f.replicate(put), tuple(state))
            part = _evaluate(f.replicate(put, row), alone)
    except torch.cuda.OutOfMemoryError:  # no verdict, which would be remembered
        raise
    except Exception:  # whatever a physics says about a batch that it does not expect
        return False
    if not all(bool(torch.isfinite(t).all()) for t in whole):
        return None
    pairs = [(a, b[row]) for a, b in zip(part, whole, strict=True)]
    return all(a.shape == b.shape and bool((a - b).norm() <= _rounding(a) * b.norm()) for a, b in pairs)


def _evaluate(made: tuple[Replica, tuple[Tensor, ...]], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    replica, constants = made
    return as_tuple(replica.roots[0](state[0] if len(state) == 1 else state, replica.roots[1], *constants))


def _scale(t: Tensor) -> float:
    return max(0.1 * float(t.detach().abs().square().mean().sqrt()), 0.02)


def _noise(shape: torch.Size, like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng, dtype=torch.float32).to(like.device, like.dtype)


def _rounding(t: Tensor) -> float:
    r"""Largest relative difference by rounding between evaluations in different batches."""
    device = t.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype
    return 8 * torch.finfo(dtype).eps ** 0.75
