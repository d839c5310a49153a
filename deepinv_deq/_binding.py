r"""A template bound to one measurement: every tensor it depends on, and the same map with others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from deepinv.physics import Physics
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepinv_deq._states import State

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
        self._iteration, self._physics, self._constants, self._y = iteration, physics, constants, y
        self._weights = _normalised_weights(iteration, physics)
        self._graded = torch.is_grad_enabled()
        self._slots = [*_slots(iteration), *_slots(physics)]
        guarded = [slot.value for slot in self._slots if slot.guarded]
        self._versions = [(t, t._version) for t in guarded if not t.is_inference()]
        self._tensors = [*constants, *self._weights.values(), *(slot.value for slot in self._slots)]
        self._needs = [
            t.requires_grad for t in self._tensors
        ]  # now: who freezes a weight later does not change the past

    def __call__(self, x: State) -> State:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        """
        with _cached(self._weights):
            return self._iteration(x, self._physics, *self._constants)

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

    def rebind(self, inputs: Sequence[Tensor]) -> Any:
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
        constants, weights = tensors[:n], dict(zip(self._weights, tensors[n : n + m], strict=True))

        def evaluate(x: State) -> State:
            with _installed(self._slots, tensors[n + m :]), _cached(weights):
                return self._iteration(x, self._physics, *constants)

        return evaluate

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed: compares the stepsize with the norm of the operator.

        :return: a sentence with the stepsize that would do, or an empty string.
        """
        eta = float(self._iteration.stepsize)
        try:
            # the power method draws its start: not from the generators that a resumed run must find as they were
            with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                image = self._physics.A_adjoint(self._y)
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


# --------------------------------------------------------------------------------------------------------------------
# Where the tensors of modules live, so that a map can be evaluated with others in their place


class _Slot:
    r"""A place where a module keeps a tensor: a parameter, a buffer, or a plain attribute."""

    def __init__(self, store: dict[str, Any], name: str, guarded: bool):
        self.store, self.name, self.value, self.guarded = store, name, store[name], guarded

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
        _Slot(store, name, store is module._parameters or module is root or isinstance(root, Physics))
        for module in _modules(root)
        for store in (module._parameters, module._buffers, module.__dict__)
        for name, value in store.items()
        if isinstance(value, Tensor)
    ]


@contextmanager
def _installed(slots: Sequence[_Slot], values: Sequence[Tensor]) -> Iterator[None]:
    previous = [slot.get() for slot in slots]
    try:
        for slot, value in zip(slots, values, strict=True):
            slot.set(value)
        yield
    finally:
        for slot, value in zip(slots, previous, strict=True):
            slot.set(value)


def _normalised_weights(*roots: nn.Module) -> dict[tuple[int, str], Tensor]:
    r"""All parametrized tensors, each computed once: in training mode, spectral norm changes with every access."""
    return {
        (id(module), name): getattr(module, name)
        for module in _modules(*roots)
        if parametrize.is_parametrized(module)
        for name in cast(nn.ModuleDict, module.parametrizations)
    }


@contextmanager
def _cached(weights: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    r"""Use these tensors as the values of parametrized weights, through PyTorch's own cache of them."""
    if not weights:
        yield
        return
    with parametrize.cached():
        outer = dict(parametrize._cache)
        parametrize._cache.update(weights)
        try:
            yield
        finally:
            parametrize._cache.clear()
            parametrize._cache.update(outer)
