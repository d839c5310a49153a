r"""An iteration bound to one measurement: private replicas of everything it depends on, and the same map with other tensors."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from deepinv.physics import LinearPhysics, Physics
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin

from deepinv_deq._states import Rows, State, as_tuple
from deepinv_deq.iterations.checks import OwnInput, Watch, fits, shape, version
from deepinv_deq.iterations.circulant import Origin
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.iterations.samples import Samples, sample_tensors
from deepinv_deq.iterations.separability import Verdicts
from deepinv_deq.maps import Map

if TYPE_CHECKING:
    from deepinv_deq.iterations.base import FixedPointIteration

Put = dict[int, Tensor]


class BoundIteration(Map):
    r"""The map :math:`x \mapsto F_\theta(x; y)` of one measurement: what a solver iterates and a hook differentiates.

    :meth:`FixedPointIteration.bind` makes it. It owns replicas of the iteration and the physics, see
    :mod:`deepinv_deq.iterations.replica`: what is changed later does not change the map, and a tensor that is changed in place
    raises an error in :meth:`rebind`.

    :param FixedPointIteration iteration: the iteration.
    :param deepinv.physics.Physics physics: forward operator.
    :param torch.Tensor y: measurement.
    :raises ValueError: if ``y`` does not fit ``physics``.
    """

    def __init__(self, iteration: FixedPointIteration, physics: Physics, y: Any):
        self._pristine = Replica([iteration, physics])  # never evaluated: what evaluations cache must not reach rebind
        if any(isinstance(f.tensor, UninitializedTensorMixin) for f in self._pristine.found.values()):
            initialise(iteration, physics, y)
            self._pristine = Replica([iteration, physics])
        # the measurements are for a diagnosis only: a map lives until backward, and must not keep them alive
        self._y = weakref.ref(y) if type(y).__weakrefoffset__ else lambda: y
        self._batch = len(y if isinstance(y, Tensor) else y[0])
        self._verdicts = getattr(iteration, "_verdicts", None) or Verdicts()
        origin = Origin(weakref.ref(physics), self._pristine, 1, self._batch)
        self._pristine.roots[1].__dict__["_origin"] = origin
        self._networks, self._writes = OwnInput(), OwnInput()
        self._rows: Rows | None = None
        self._copies = self._copy_inference_tensors()
        self._replica = self._pristine.again(self._copies)
        self._constants = self._compute_constants(physics, y)
        self._whole_constants = self._constants
        self._watch = Watch(self._pristine.found.values(), self._constants)
        self._graded = torch.is_grad_enabled()
        self._inputs = self._find_inputs(y)
        self._shapes: list[tuple[torch.Size, torch.dtype, torch.device]] | None = None
        self._install()

    def _copy_inference_tensors(self) -> Put:
        # they do not count changes in place; those that are to be trained are left for autograd to refuse
        if torch.is_inference_mode_enabled():
            return {}
        tensors = [f.tensor for f in self._pristine.found.values()]
        return {id(t): t.clone() for t in tensors if t.is_inference() and not t.requires_grad}

    def _compute_constants(self, user_physics: Physics, y: Any) -> tuple[Tensor, ...]:
        iteration, physics = self._replica.roots
        try:
            constants = tuple(iteration.constants(y, physics))
            if isinstance(physics, LinearPhysics):
                fits.check(y, user_physics, physics, self._pristine.found.values())
        except torch.cuda.OutOfMemoryError:  # a RuntimeError, but the measurements are not to blame
            raise
        except (RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"Measurements of shape {shape(y)} do not fit {type(physics).__name__}: {error}. Check that y comes "
                "from this physics, at its image size, angles, coils or mask, and is on its device."
            ) from error
        if torch.is_inference_mode_enabled():
            return constants
        return tuple(c.clone() if c.is_inference() else c for c in constants)

    def _find_inputs(self, y: Any) -> tuple[Tensor, ...]:
        found = [f for f in self._pristine.found.values() if f.tensor.requires_grad and f.role != "closure"]
        doubtful = [f.tensor for f in found if f.role in ("buffer", "plain") and not f.tensor.is_leaf]
        if doubtful and self._graded:
            unused = self._unused(doubtful, y)
            found = [f for f in found if id(f.tensor) not in unused]
        needed = {id(t): t for t in (*self._constants, *(f.tensor for f in found)) if t.requires_grad}
        return tuple(needed.values())

    def _unused(self, doubtful: Sequence[Tensor], y: Any) -> set[int]:
        r"""Which tensors are left over from an earlier evaluation, as activations that a module keeps: the graph of one evaluation
        shows which of them the map depends on."""
        with torch.enable_grad():
            leaves = {id(t): t.detach().requires_grad_() for t in doubtful}
            replica = self._pristine.again(self._copies | leaves)
            iteration, physics = replica.roots
            image = iteration(iteration.init(y, physics), physics, *(c.detach() for c in self._constants))
        used, todo, seen = set[int](), [t.grad_fn for t in as_tuple(image)], set[Any]()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))
            todo.extend(parent for parent, _ in node.next_functions)
        return {key for key, leaf in leaves.items() if id(leaf) not in used}

    def _install(self) -> None:
        for network in self._replica.roots[0].networks():
            if self._networks.writes is not False:
                network.register_forward_pre_hook(self._networks, prepend=True)

    def __call__(self, x: State) -> State:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        :raises RuntimeError: if the iteration writes to its argument in place.
        """
        return self._evaluate(self._replica.roots[0], x)

    def step(self, x: State) -> State:
        r"""The residual :math:`F_\theta(x; y) - x`, see :meth:`FixedPointIteration.step`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: a state of the same shapes.
        :raises RuntimeError: if the iteration writes to its argument in place.
        """
        iteration = self._replica.roots[0]
        hooked = iteration._forward_hooks or iteration._forward_pre_hooks or "forward" in iteration.__dict__
        return super().step(x) if hooked else self._evaluate(iteration.step, x)

    def _evaluate(self, function: Callable[..., State], x: State) -> State:
        self._remember(x)
        first = (
            self._writes.writes is None
        )  # a copy, so that the caller's point survives an iteration that writes to it
        point = tuple(t.clone() for t in as_tuple(x)) if first else as_tuple(x)
        before = [version(t) for t in point]
        out = function(point[0] if isinstance(x, Tensor) else point, self._replica.roots[1], *self._constants)
        if [version(t) for t in point] != before:
            raise RuntimeError(
                f"{type(self._replica.roots[0]).__name__}.forward wrote to its argument x in place, which the solver still uses. "
                "Write to a copy (x.clone()), or name the network that does it in networks()."
            )
        self._writes.writes = False
        self._networks.settle()
        self._watch.evaluated()
        return out

    @property
    def inputs(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        r"""Every tensor that requires a gradient and on which the map depends: constants, weights, physics parameters.

        :raises RuntimeError: if the map was bound under ``torch.no_grad()``, where what it precomputed lost its gradient.
        """
        if not self._graded and self._inputs:
            raise RuntimeError(
                "This map was bound under torch.no_grad(): bind it with gradients enabled to train through it."
            )
        return self._inputs

    def rebind(self, inputs: Sequence[Tensor]) -> BoundIteration:
        r"""The same map, of the physics as it was when it was bound, with other tensors in the place of ``inputs``.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a map.
        :raises RuntimeError: if a tensor on which the map depends was changed in place since.
        """
        self._watch.check()
        put = {id(t): given for t, given in zip(self._inputs, inputs, strict=True)}
        for f in self._pristine.found.values():  # a tensor that was unfrozen since is a constant of this map
            if f.tensor.requires_grad and id(f.tensor) not in put and f.role != "closure" and f.tensor.is_leaf:
                put[id(f.tensor)] = f.tensor.detach()
        return self._with(put, self._rows)

    def select(self, rows: Rows) -> BoundIteration | None:
        r"""The same map of some samples, in a batch of their own; its :attr:`inputs` are those of the whole.

        :param torch.Tensor, slice rows: which samples.
        :return: a map of states of these samples; ``None`` where it is not certain which tensors belong to which sample, or where
            the denoiser couples the samples.
        """
        if not self._verdicts.separable(self):
            return None
        if self._rows is not None:
            index = torch.arange(self._batch, device=getattr(rows, "device", "cpu"))
            rows = index[self._rows if isinstance(self._rows, slice) else self._rows.to(index.device)][rows]
        return self._with({}, rows)

    def separable(self, x: State, fx: State | None = None) -> bool:
        r"""Whether :meth:`select` gives a map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state of all samples, for its shapes.
        :param torch.Tensor, tuple[torch.Tensor, ...], None fx: not used.
        :return: the answer.
        """
        self._remember(x)
        return self._verdicts.separable(self)

    def _remember(self, x: State) -> None:
        if self._shapes is None and self._rows is None:
            self._shapes = [(t.shape, t.dtype, t.device) for t in as_tuple(x)]

    def _with(self, put: Mapping[int, Tensor], rows: Rows | None) -> BoundIteration:
        r"""The same map with other tensors in some places, of some samples."""
        other = copy.copy(self)
        constants = tuple(put.get(id(c), c) for c in self._whole_constants)
        places = self._copies | dict(put)
        other._rows = rows
        if rows is not None:
            samples = self._sample_tensors()
            for t in () if samples is None else samples.rows:
                places[id(t)] = places.get(id(t), t)[rows]
            constants = cast(Any, self._pristine.roots[0].select_constants(constants, rows))
        other._constants = constants
        other._replica = self._pristine.again(places)
        other._replica.roots[1].__dict__["_origin"] = copy.copy(self._pristine.roots[1].__dict__["_origin"])
        other._replica.roots[1].__dict__["_origin"].rows = rows
        other._install()
        return other

    def _sample_tensors(self) -> Samples | None:
        state = self._example()
        return None if state is None else sample_tensors(self._pristine.roots[1], self._batch, len(state[0][0]))

    def _example(self) -> list[tuple[torch.Size, torch.dtype, torch.device]] | None:
        r"""Shapes, types and devices of the tensors of a state."""
        if self._shapes is None:
            y = self._y()
            if y is None:
                return None
            replica = self._pristine.again(self._copies)
            iteration, physics = replica.roots
            self._shapes = [(t.shape, t.dtype, t.device) for t in as_tuple(iteration.init(y, physics))]
        return self._shapes

    def init(self, y: Any) -> State:
        r"""The starting point of the iteration, computed with the replicas: nothing is cached on the user's physics.

        :param torch.Tensor y: measurement.
        :return: a state, without gradient.
        """
        return self._replica.roots[0].init(y, self._replica.roots[1])

    def preconditioner(self, x: State) -> Callable[[State], State] | None:
        r"""The iteration's approximate inverse of :math:`I - \partial F / \partial x`, see
        :meth:`FixedPointIteration.preconditioner`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a linear map of states, or ``None``.
        """
        self._remember(x)
        return self._replica.roots[0].preconditioner(x, self._replica.roots[1])

    def natural(self, x: State) -> Callable[[State], State] | None:
        r"""What makes steps comparable for all stepsizes, see :meth:`FixedPointIteration.natural`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a linear map of states, or ``None``.
        """
        return self._replica.roots[0].natural(x, self._replica.roots[1])

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed: compares the stepsize with the norm of the operator.

        :return: a sentence with the stepsize that would do, or an empty string.
        """
        replica = self._pristine.again(self._copies)
        iteration, physics = replica.roots
        eta = float(iteration.stepsize.detach().max())
        try:
            # the power method draws its start: not from the generators that a resumed run must find as they were
            with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                image = physics.A_adjoint(self._y())
                sqnorm = float(physics.compute_sqnorm(image, verbose=False))
        except Exception:  # whatever is wrong with this operator, the message of the solve matters more
            return ""
        safe = iteration.safe_stepsize(sqnorm)
        if eta < 2 * safe:
            return ""
        return (
            f"The stepsize {eta:.3g} diverges for this operator, whose squared norm is {sqnorm:.3g} "
            f"(physics.compute_sqnorm): use stepsize={safe:.2g}."
        )


def initialise(iteration: FixedPointIteration, physics: Physics, y: Any) -> None:
    r"""Give lazy layers (:class:`torch.nn.LazyConv2d`) their shapes by one evaluation of the user's modules.

    :param FixedPointIteration iteration: the iteration.
    :param deepinv.physics.Physics physics: forward operator.
    :param torch.Tensor y: measurement.
    """
    with torch.no_grad():
        iteration(iteration.init(y, physics), physics, *iteration.constants(y, physics))
