r"""A template bound to one measurement: every tensor it depends on, and the same map with others in their place."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepinv_deq.states import Rows, State, as_tuple, take

if TYPE_CHECKING:
    from deepinv_deq.iterations import FixedPointIteration


class BoundIteration:
    r"""The map :math:`x \mapsto F_\theta(x; y)` of one measurement: what a solver iterates and a hook differentiates.

    It is made by :meth:`FixedPointIteration.bind`, and keeps the tensors that it found there: a later
    ``physics.update(...)``, which replaces them, does not change what :meth:`rebind` evaluates, and a change in place, as
    by an optimiser, is an error.

    :param FixedPointIteration iteration: the template.
    :param deepinv.physics.Physics physics: forward operator.
    :param tuple[torch.Tensor, ...] constants: what the template computes once per solve.
    :param torch.Tensor y: measurement.
    """

    def __init__(self, iteration: FixedPointIteration, physics: Physics, constants: tuple[Tensor, ...], y: Tensor):
        self._iteration, self._physics, self._constants = iteration, physics, constants
        # for a diagnosis only: every pass of a loss waits for its gradient with this map
        self._y = weakref.ref(y) if type(y).__weakrefoffset__ else lambda: y
        self._weights = _normalised_weights(iteration, physics)
        self._graded = torch.is_grad_enabled()
        self._slots = [*_slots(iteration), *_slots(physics)]
        guarded = [slot.value for slot in self._slots if slot.guarded]
        self._versions = [(t, t._version) for t in guarded if not t.is_inference()]
        self._tensors = [*constants, *self._weights.values(), *(slot.value for slot in self._slots)]
        self._needs = [
            t.requires_grad for t in self._tensors
        ]  # now: who freezes a weight later does not change the past
        self._batch, self._rows = len(y if isinstance(y, Tensor) else y[0]), cast(Rows | None, None)
        self._map = _Map(iteration, physics, constants, self._weights)

    def __call__(self, x: State) -> State:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        """
        return self._map(x)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        r"""Every tensor that requires a gradient and on which the map depends: constants, weights, physics parameters.

        :raises RuntimeError: if the map was bound under ``torch.no_grad()``, where what it precomputed lost its gradient.
        """
        inputs = tuple(t for t, needed in zip(self._tensors, self._needs, strict=True) if needed)
        if not self._graded and inputs:
            raise RuntimeError(
                "This map was bound under torch.no_grad(): bind it with gradients enabled to train through it."
            )
        return inputs

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[State], State]:
        r"""The same map, of the physics as it was when it was bound, with other tensors in the place of ``inputs``.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a callable.
        :raises RuntimeError: if a tensor of the physics or a weight was changed in place since.
        """
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                "A tensor of the physics or a weight was changed in place between forward and backward, so the gradient "
                "would be that of another map. Replace a tensor of the physics instead (physics.update(...) does), and "
                "step optimisers after backward."
            )
        given = iter(inputs)
        tensors = [next(given) if needed else t for t, needed in zip(self._tensors, self._needs, strict=True)]
        n, m = len(self._constants), len(self._weights)
        weights = dict(zip(self._weights, tensors[n : n + m], strict=True))
        placed = list(zip(self._slots, tensors[n + m :], strict=True))
        rebound = _Map(self._iteration, self._physics, tuple(tensors[:n]), weights, placed)
        return rebound if self._rows is None else rebound.select(self._rows, self._batch, self._of_samples())

    def select(self, rows: Rows) -> BoundIteration:
        r"""The same map of some samples, in a batch of their own; its :attr:`inputs` are those of the whole.

        :param torch.Tensor, slice rows: which samples. Ask :meth:`separable` first.
        :return: a map of states of these samples.
        """
        part = copy.copy(self)
        index = torch.arange(self._batch, device=getattr(rows, "device", "cpu"))
        part._rows = rows if self._rows is None else index[self._rows][rows]
        part._map = self._whole().select(part._rows, self._batch, self._of_samples())
        return part

    def preconditioner(self, x: State) -> Callable[[State], State] | None:
        r"""The template's approximate inverse of :math:`I - \partial F / \partial x`, see
        :meth:`FixedPointIteration.preconditioner`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a linear map of states, or ``None``.
        """
        return self._map.preconditioner(x)

    def separable(self, x: State, fx: State | None = None) -> bool:
        r"""Whether :meth:`select` gives what the whole map gives, told by an evaluation for one sample.

        It does not where the denoiser couples the samples, or where the physics keeps something of each sample in another
        way than in the first dimension of a tensor. The template remembers the verdict on physics and measurements of
        the same make, so that it costs nothing later.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state of all samples.
        :param torch.Tensor, tuple[torch.Tensor, ...], None fx: its image, if known; else it is evaluated.
        :return: the verdict.
        """
        known, make = self._iteration._separable, self._make()
        if make not in known:
            with torch.no_grad():
                fx = self(x) if fx is None else fx
                if not all(bool(torch.isfinite(t).all()) for t in as_tuple(fx)):
                    return False  # nothing to compare: another solve may tell
                if len(known) >= 64:  # physics of ever new shapes must not pile up here
                    known.clear()
                known[make] = next((guess for guess in (True, False) if self._agrees(x, fx, guess)), None)
        return known[make] is not None

    def _agrees(self, x: State, fx: State, of_samples: bool) -> bool:
        r"""Whether one sample alone has the image that it has in the batch."""
        row = slice(self._batch // 2, self._batch // 2 + 1)
        try:
            image = self._whole().select(row, self._batch, of_samples)(take(x, row))
        except torch.cuda.OutOfMemoryError:  # no verdict, which would be remembered
            raise
        except Exception:  # whatever a physics says about a batch that it does not expect
            return False
        pairs = zip(as_tuple(image), as_tuple(take(fx, row)), strict=True)
        return all(a.shape == b.shape and bool((a - b).norm() <= _rounding(a) * b.norm()) for a, b in pairs)

    def _whole(self) -> _Map:
        return _Map(
            self._iteration,
            self._physics,
            self._constants,
            self._weights,
            [(s, s.value) for s in self._slots if s.outer],
        )

    def _make(self) -> tuple[Any, ...]:
        r"""All that decides how the map is restricted to samples: everything but the values."""
        shapes = tuple((slot.name, slot.value.shape) for slot in self._slots if slot.outer)
        modes = tuple(module.training for module in _modules(self._iteration))
        return type(self._physics), shapes, tuple(c.shape for c in self._constants), modes

    def _of_samples(self) -> bool:
        return bool(self._iteration._separable.get(self._make()))

    def contractive_part(self, x: State, exact: bool = False) -> tuple[State, Callable[[State], State] | None]:
        r"""See :meth:`FixedPointIteration.contractive_part`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :param bool exact: whether the linear map that defines the norm is to be exact.
        :return: image of the part, and that map.
        """
        return self._map.contractive_part(x, exact)

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed: compares the stepsize with the norm of the operator.

        :return: a sentence with the stepsize that would do, or an empty string.
        """
        eta = float(self._iteration.stepsize)
        try:
            # the power method draws its start: not from the generators that a resumed run must find as they were
            with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                image = self._physics.A_adjoint(self._y())
                sqnorm = float(self._physics.compute_sqnorm(image, verbose=False))
        except Exception:  # whatever is wrong with this operator, the solve has something to say that matters more
            return ""
        safe = self._iteration.safe_stepsize(sqnorm)
        if eta < 2 * safe:
            return ""
        return (
            f"The stepsize {eta:.3g} diverges for this operator, whose squared norm is {sqnorm:.3g} "
            f"(physics.compute_sqnorm): use stepsize={safe:.2g}."
        )


@dataclass(frozen=True)
class _Map:
    r"""A template with everything it depends on in place."""

    iteration: FixedPointIteration
    physics: Physics
    constants: tuple[Tensor, ...]
    weights: Mapping[nn.Module, Tensor]
    placed: Sequence[tuple[_Slot, Tensor]] = ()  # where a module is to find another tensor than its own

    def __call__(self, x: State) -> State:
        with _installed(self.placed), _cached(self.weights), _recorded_solves(self.physics):
            return self.iteration(x, self.physics, *self.constants)

    def contractive_part(self, x: State, exact: bool = False) -> tuple[State, Callable[[State], State] | None]:
        with _installed(self.placed), _cached(self.weights), _recorded_solves(self.physics):
            return self.iteration.contractive_part(x, self.physics, *self.constants, exact=exact)

    def preconditioner(self, x: State) -> Callable[[State], State] | None:
        with _installed(self.placed):
            return self.iteration.preconditioner(x, self.physics)

    def select(self, rows: Rows, batch: int, of_samples: bool) -> _Map:
        r"""For some samples: their rows of the constants and, if they are ``of_samples``, of the tensors of the physics and
        of the template itself, wherever the first dimension is the batch."""

        def pick(t: Tensor) -> Tensor:
            return t[rows] if t.ndim and len(t) == batch else t

        placed = [(slot, pick(t) if of_samples and slot.outer else t) for slot, t in self.placed]
        return replace(self, constants=tuple(pick(c) for c in self.constants), placed=placed)


def _rounding(t: Tensor) -> float:
    r"""What evaluations in other batches may differ by: far more than they do, far less than wrong samples would."""
    device = t.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype
    return torch.finfo(dtype).eps ** 0.5


# --------------------------------------------------------------------------------------------------------------------
# Where the tensors of modules live, so that a map can be evaluated with others in their place


class _Slot:
    r"""A place where a module keeps a tensor: a parameter, a buffer, or a plain attribute. It is ``outer`` if that module is
    the template itself or of the physics."""

    def __init__(self, store: dict[str, Any], name: str, guarded: bool, outer: bool):
        self.store, self.name, self.value, self.guarded, self.outer = store, name, store[name], guarded, outer

    def get(self) -> Tensor:
        return self.store[self.name]

    def set(self, value: Tensor) -> None:
        self.store[self.name] = value


def _modules(*roots: nn.Module) -> Iterator[nn.Module]:
    r"""Submodules, without those that only compute a parametrized weight: the weight itself is cached instead."""
    seen: set[int] = set()
    queue = [root for root in roots if isinstance(root, nn.Module)]
    while queue:
        module = queue.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        queue.extend(
            child for name, child in module._modules.items() if child is not None and name != "parametrizations"
        )


def _slots(root: nn.Module) -> list[_Slot]:
    r"""Where a template or a physics keeps tensors. All are guarded but the statistics that layers may keep: those are theirs
    to change."""
    return [
        _Slot(store, name, guarded=outer or store is module._parameters, outer=outer)
        for module in _modules(root)
        for outer in [module is root or isinstance(root, Physics)]
        for store in (module._parameters, module._buffers, module.__dict__)
        for name, value in store.items()
        if isinstance(value, Tensor)
    ]


@contextmanager
def _installed(placed: Sequence[tuple[_Slot, Tensor]]) -> Iterator[None]:
    previous = [slot.get() for slot, _ in placed]
    try:
        for slot, value in placed:
            slot.set(value)
        yield
    finally:
        for (slot, _), value in zip(placed, previous, strict=True):
            slot.set(value)


@contextmanager
def _recorded_solves(physics: Physics) -> Iterator[None]:
    r"""Let autograd record the linear solves inside a physics (``prox_l2`` without a formula).

    deepinv's own implicit backward would solve with the physics as it is in the backward pass, not as it was bound, and would
    add the gradient of its tensors to their ``grad``, where it does not belong.
    """
    modules = [
        m for m in _modules(physics) if torch.is_grad_enabled() and getattr(m, "implicit_backward_solver", False)
    ]
    try:
        for module in modules:
            cast(Any, module).implicit_backward_solver = False
        yield
    finally:
        for module in modules:
            cast(Any, module).implicit_backward_solver = True


def _normalised_weights(*roots: nn.Module) -> dict[nn.Module, Tensor]:
    r"""All parametrized tensors, by what computes them; each computed once: in training mode, spectral norm changes with
    every access."""
    return {
        parametrization: parametrization()
        for module in _modules(*roots)
        if parametrize.is_parametrized(module)
        for parametrization in cast(nn.ModuleDict, module.parametrizations).values()
    }


_in_force: dict[int, Tensor] = {}  # values in force, by the identity of what would compute them
_readers: weakref.WeakKeyDictionary[nn.Module, Callable[[], Tensor]] = weakref.WeakKeyDictionary()


@contextmanager
def _cached(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    r"""Use these tensors as the values of parametrized weights.

    PyTorch has a cache of them, but it takes a copy of a module for the module itself (and finds the weights of the one for the
    other), so it is switched off meanwhile. Readers stay the same from one time to the next, and look the tensor up: compiled
    graphs hold on to what they read with.
    """
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    outer = dict(_in_force)
    for parametrization, weight in weights.items():
        _in_force[id(parametrization)] = weight
        if parametrization not in _readers:
            _readers[parametrization] = partial(_in_force.__getitem__, id(parametrization))
        parametrization.__dict__["forward"] = _readers[parametrization]
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
        for parametrization in weights:
            if id(parametrization) not in outer:
                parametrization.__dict__.pop("forward", None)
        _in_force.clear()
        _in_force.update(outer)
