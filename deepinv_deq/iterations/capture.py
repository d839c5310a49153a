r"""What a bound map captures: private replicas, what is computed once from the measurements, and the tensors to differentiate."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor
from torch.nn.parameter import is_lazy

from deepinv_deq.compat import STORES, transforms
from deepinv_deq.implicit.graphs import leaves
from deepinv_deq.iterations.checks import Watch, refuse_other_dimension
from deepinv_deq.iterations.circulant import Origin
from deepinv_deq.iterations.measurements import fits, shape, unwritten
from deepinv_deq.iterations.originals import Originals, has_stored
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.iterations.samples import Samples, read_by_maps, sample_tensors
from deepinv_deq.iterations.separability import Verdicts
from deepinv_deq.iterations.terms import all_constants, constants_of_rows
from deepinv_deq.states import Rows, State, as_tuple

if TYPE_CHECKING:
    from deepinv_deq.iterations.base import FixedPointIteration

Put = Mapping[int, Tensor]
Replicated = tuple[Replica, tuple[Tensor, ...]]


class Capture:
    r"""Everything on which a bound map depends, as it is when the map is bound.

    :param FixedPointIteration iteration: the iteration.
    :param deepinv.physics.Physics physics: forward operator.
    :param torch.Tensor y: measurement.
    :param float, torch.Tensor, None sigma: a noise level in the place of the iteration's, with one row per sample if it has rows.
    :raises ValueError: if ``y`` does not fit ``physics``.

    ``pristine`` is never evaluated. Evaluations may store caches on modules; replicas are made from this clean copy.
    """

    def __init__(self, iteration: FixedPointIteration, physics: Physics, y: Any, sigma: float | Tensor | None = None):
        self.pristine = Replica([iteration, physics])
        if any(is_lazy(f.tensor) for f in self.pristine.found.values()):
            initialise(iteration, physics, y)
            self.pristine = Replica([iteration, physics])
            _refuse_unused(iteration, physics)
        # only until the first evaluation: a map must not keep the user's objects alive
        renewed = lambda: _private(Replica([iteration, physics]), sigma)  # noqa: E731
        self._originals: Originals | None = Originals(self.pristine.pairs, renewed)
        self.pristine.pairs = ()
        self.pristine = _private(self.pristine, sigma)
        self.levels = sigma if isinstance(sigma, Tensor) and sigma.ndim else None  # one row per sample
        # the measurements are for a diagnosis only: a map lives until backward, and must not keep them alive
        self._y = weakref.ref(y) if type(y).__weakrefoffset__ else lambda: y
        first = y if isinstance(y, Tensor) else y[0]
        if not first.ndim:
            raise ValueError(f"Measurements need a batch dimension, got a single number of shape (): {first}.")
        self.batch = len(first)
        self.iteration, self.physics = self.pristine.roots
        self._origin = Origin(weakref.ref(physics), self.pristine, 1, self.batch)  # not on ``physics``: a cycle
        self._copies = self._copy_inference_tensors()
        self.constants: tuple[Tensor, ...] = ()
        self.first = self.replicate()[0]
        with unwritten(y, physics, iteration):
            self.constants = self._compute_constants(physics, y)
        self.stores = False
        self.note_stored()
        self.watch = Watch(read_by_maps(self.pristine, self.physics), self.constants)
        self.graded = torch.is_grad_enabled()
        self.inputs = self._find_inputs(y)
        self._shapes: list[tuple[torch.Size, torch.dtype, torch.device]] | None = None
        self._verdicts, self._separable = getattr(iteration, "_verdicts", None) or Verdicts(), set[int]()

    def replicate(self, put: Put | None = None, rows: Rows | None = None, of: Replica | None = None) -> Replicated:
        r"""Replicas and constants of a map, with other tensors in some places.

        :param Mapping put: tensors by the identity of those that they replace.
        :param torch.Tensor, slice, None rows: which samples, default all.
        :param Replica, None of: what is replicated. Default: the objects as they were when the map was bound.
        :return: the replica and the constants.
        """
        places = {**self._copies, **(put or {})}
        constants = tuple(places.get(id(c), c) for c in self.constants)
        if rows is not None:
            samples = self.samples()
            places |= {id(t): places.get(id(t), t)[rows] for t in (() if samples is None else samples.rows)}
            # Never None: `separable` was checked before.
            constants = cast(Any, constants_of_rows(self.iteration, constants, rows))
        replica = (of or self.pristine).again(places)
        replica.roots[1].__dict__["_origin"] = self._origin.of(rows)
        return replica, constants

    def first_evaluation(self) -> Originals | None:
        r"""What was replicated, noted before the first evaluation; ``None`` before any other."""
        originals, self._originals = self._originals, None
        if originals is not None:
            originals.note()
        return originals

    def note_stored(self) -> None:
        r"""Note whether ``constants`` or ``init`` stored something on the iteration or the physics."""
        self.stores = self.stores or has_stored(self.first, self.pristine)

    def separable(self, size: int) -> bool:
        r"""Whether the map can be restricted to any ``size`` samples."""
        if self.stores:  # a part of the batch is made of what was there before
            return False
        if size not in self._separable and self._verdicts.separable(self, size):
            self._separable.add(size)
        return size in self._separable

    def samples(self) -> Samples | None:
        r"""Which tensors of the physics belong to samples; ``None`` where this is not certain."""
        state = self.example()
        return None if state is None else _with(self, sample_tensors(self.physics, self.batch, len(state[0][0])))

    def remember(self, x: State, rows: Rows | None = None) -> None:
        r"""Note the shapes of a state of all samples; of ``rows``, nothing.

        :raises ValueError: if a stepsize per channel is none for such states.
        """
        if self._shapes is None and rows is None:
            refuse_other_dimension(self.iteration.stepsize, as_tuple(x)[0])
            self._shapes = [(t.shape, t.dtype, t.device) for t in as_tuple(x)]

    def example(self) -> list[tuple[torch.Size, torch.dtype, torch.device]] | None:
        r"""Shapes, types and devices of the tensors of a state, if they are known."""
        y = self._y()
        if self._shapes is None and y is not None:
            replica = self.replicate()[0]
            self.remember(replica.roots[0].init(y, replica.roots[1]))
        return self._shapes

    def _copy_inference_tensors(self) -> dict[int, Tensor]:
        # they do not count changes in place; those that are to be trained are left for autograd to refuse
        if torch.is_inference_mode_enabled():
            return {}
        tensors = [f.tensor for f in self.pristine.found.values()]
        return {id(t): t.clone() for t in tensors if t.is_inference() and not t.requires_grad}

    def _compute_constants(self, user_physics: Physics, y: Any) -> tuple[Tensor, ...]:
        iteration, physics = self.first.roots
        try:
            if isinstance(physics, LinearPhysics):
                fits.check(y, user_physics, physics, self.pristine)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError too, but not one of shapes
            raise
        except (RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"Measurements of shape {shape(y)} do not fit {type(physics).__name__}: {error}. Check that y comes "
                "from this physics, at its image size, angles, coils or mask, and is on its device."
            ) from error
        constants = all_constants(
            iteration, y, physics
        )  # outside of the block above: a user's code may be wrong itself
        if torch.is_inference_mode_enabled():
            return constants
        return tuple(c.clone() for c in constants)  # they may be views of the measurements, whose memory is used again

    def _find_inputs(self, y: Any) -> tuple[Tensor, ...]:
        found = [f for f in self.pristine.found.values() if f.tensor.requires_grad and f.role != "closure"]
        doubtful = [f.tensor for f in found if f.role in ("buffer", "plain") and not f.tensor.is_leaf]
        if doubtful and self.graded and not transforms():  # those of torch.func forbid requires_grad_()
            unused = self._unused(doubtful, y)
            found = [f for f in found if id(f.tensor) not in unused]
        needed = {id(t): t for t in (*self.constants, *(f.tensor for f in found)) if t.requires_grad}
        return tuple(needed.values())

    def _unused(self, doubtful: Sequence[Tensor], y: Any) -> set[int]:
        r"""Which tensors are left over from an earlier evaluation, as activations that a module keeps: the graph of one evaluation
        shows which of them the map depends on."""
        with torch.enable_grad():
            put = {id(t): t.detach().requires_grad_() for t in doubtful}
            replica = self.replicate(put)[0]
            iteration, physics = replica.roots
            image = iteration(_copy(iteration.init(y, physics)), physics, *(c.detach() for c in self.constants))
        used = {id(leaf) for leaf in leaves(as_tuple(image))}
        return {key for key, leaf in put.items() if id(leaf) not in used}


def _copy(start: State) -> State:
    r"""A start that a network may write to: the original may be the measurements themselves."""
    return start.clone() if isinstance(start, Tensor) else tuple(t.clone() for t in start)


def _with(capture: Capture, known: Samples | None) -> Samples | None:
    if known is not None and capture.levels is not None and len(capture.levels) == capture.batch:
        known.rows.append(capture.levels)
    return known


def _private(replica: Replica, sigma: float | Tensor | None) -> Replica:
    r"""Mark the iteration as a replica, and give it another noise level, if there is one."""
    iteration = replica.roots[0]
    iteration.__dict__["_private"] = True
    if sigma is None:
        return replica
    for store in (iteration.__dict__[name] for name in STORES):
        store.pop("sigma", None)
    iteration.__dict__["sigma"] = sigma
    return replica.again()  # which finds the new tensor


def initialise(iteration: FixedPointIteration, physics: Physics, y: Any) -> None:
    r"""Give lazy layers (:class:`torch.nn.LazyConv2d`) their shapes by one evaluation of the user's modules.

    :param FixedPointIteration iteration: the iteration.
    :param deepinv.physics.Physics physics: forward operator.
    :param torch.Tensor y: measurement.
    """
    with torch.no_grad():
        iteration(iteration.init(y, physics), physics, *all_constants(iteration, y, physics))


def _refuse_unused(*modules: torch.nn.Module) -> None:
    r"""Raise if a lazy layer is still without a shape after an evaluation."""
    for module in modules:
        for name, t in module.named_parameters():
            if is_lazy(t):
                raise ValueError(
                    f"The lazy parameter {name} of {type(module).__name__} has no shape, because an evaluation does not use it: "
                    "remove its layer, or call the layer once."
                )
