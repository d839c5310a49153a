r"""An iteration bound to one measurement: the map that solvers iterate and hooks differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.compat import has_hooks, version
from deepinv_deq.iterations.capture import Capture, Put
from deepinv_deq.iterations.checks import OwnInput, changed
from deepinv_deq.iterations.diagnosis import diagnose
from deepinv_deq.iterations.measurements import unwritten
from deepinv_deq.iterations.replica import Replica
from deepinv_deq.iterations.starts import checked_start
from deepinv_deq.maps import Map
from deepinv_deq.states import Rows, State, as_tuple

_HOOKED = (
    "The iteration has hooks or another forward, so its residual is a difference, which loses digits for small stepsizes: put "
    "hooks on the denoiser instead. "
)
_WROTE = (
    "{iteration}.forward wrote to its argument x in place, which the solver still uses. Write to a copy (x.clone()), or name the network that "
    "does it in networks()."
)


class BoundIteration(Map):
    r"""The map :math:`x \mapsto F_\theta(x; y)` of one measurement: what a solver iterates and a hook differentiates.

    :meth:`FixedPointIteration.bind` makes it, with private replicas, see :mod:`deepinv_deq.iterations.replica`: what is changed
    later does not change the map, and a tensor that is changed in place raises an error in :meth:`rebind`.

    :param Capture capture: what the map depends on.
    :param Replica replica: replica to evaluate.
    :param tuple[torch.Tensor, ...] constants: what the iteration computed from the measurements.
    :param torch.Tensor, slice, None rows: the samples of the map, default all.
    :param OwnInput, None network: what is known of the network's writes to its input.
    """

    def __init__(
        self,
        capture: Capture,
        replica: Replica,
        constants: tuple[Tensor, ...],
        rows: Rows | None = None,
        network: OwnInput | None = None,
    ):
        self._capture, self._replica, self._constants, self._rows = capture, replica, constants, rows
        self._network, self._pure = network or OwnInput(), network is not None
        self._iteration, self._physics = replica.roots
        if self._network.writes is not False:
            for module in self._iteration.networks():
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    module.register_forward_pre_hook(self._network, prepend=True, with_kwargs=True)

    def __call__(self, x: State) -> State:
        r"""Evaluate the map.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: its image, of the same shape.
        :raises RuntimeError: if the iteration writes to its argument in place.
        """
        return self._evaluate("__call__", x)

    def step(self, x: State) -> State:
        r"""The residual :math:`F_\theta(x; y) - x`, see :meth:`FixedPointIteration.step`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: point.
        :return: a state of the same shapes.
        """
        if _is_hooked(self._iteration):
            return super().step(x)  # which calls the iteration with its hooks
        return self._evaluate("step", x)

    @property
    def has_own_step(self) -> bool:
        r"""Whether the iteration computes its residual without a difference that loses digits."""
        return self._iteration.has_own_step and not _is_hooked(self._iteration)

    def _evaluate(self, name: str, x: State) -> State:
        self._capture.remember(x, self._rows)
        # in the first evaluation a copy, so that the caller's point survives an iteration that writes to it
        point = as_tuple(x) if self._pure else tuple(t.clone() for t in as_tuple(x))
        before, originals = [version(t) for t in point], self._capture.first_evaluation()
        out = _of(self._replica, name, point[0] if isinstance(x, Tensor) else point, self._constants)
        if any(changed(*each) for each in zip(point, before, as_tuple(x), strict=True)):
            raise RuntimeError(_WROTE.format(iteration=type(self._iteration).__name__))
        self._pure = True
        self._network.settle()
        self._capture.watch.evaluated()
        if originals is not None and not self._capture.stores:
            replicate, rows = self._capture.replicate, self._rows
            originals.refuse_stale(x, lambda of, x: _of(replicate(rows=rows, of=of)[0], name, x, self._constants))
        return out

    @property
    def inputs(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        r"""Every tensor that requires a gradient and on which the map depends: constants, weights, physics parameters.

        :raises RuntimeError: if the map was bound under ``torch.no_grad()``, where what it precomputed lost its gradient.
        """
        if not self._capture.graded and self._capture.inputs:
            raise RuntimeError(
                "This map was bound under torch.no_grad(): bind it with gradients enabled to train through it."
            )
        return self._capture.inputs

    def rebind(self, inputs: Sequence[Tensor]) -> BoundIteration:
        r"""The same map, of the physics as it was when it was bound, with other tensors in the place of ``inputs``.

        :param Sequence[torch.Tensor] inputs: one tensor for each of :attr:`inputs`.
        :return: a map.
        :raises RuntimeError: if a tensor on which the map depends was changed in place since.
        """
        capture = self._capture
        capture.watch.check()
        put = {id(t): given for t, given in zip(capture.inputs, inputs, strict=True)}
        for f in capture.pristine.found.values():  # a tensor that was unfrozen since is a constant of this map
            t = f.tensor
            if t.requires_grad and id(t) not in put and f.role != "closure" and t.is_leaf:
                put[id(t)] = t.detach()
        return self._with(put, self._rows)

    def select(self, rows: Rows) -> BoundIteration | None:
        r"""The same map of some samples, in a batch of their own; its :attr:`inputs` are those of the whole.

        :param torch.Tensor, slice rows: which samples.
        :return: a map of states of these samples; ``None`` where it is not certain to be exact.
        """
        index = torch.arange(self._capture.batch, device=getattr(rows, "device", "cpu"))
        if self._rows is not None:
            rows = index[self._rows if isinstance(self._rows, slice) else self._rows.to(index.device)][rows]
        if not self._capture.separable(len(index[rows])):
            return None
        return self._with({}, rows)

    def _with(self, put: Put, rows: Rows | None) -> BoundIteration:
        replica, constants = self._capture.replicate(put, rows)
        return BoundIteration(self._capture, replica, constants, rows, self._network)

    def init(self, y: Any) -> State:
        r"""The starting point, computed with the replicas: nothing is cached on the user's physics.

        :param torch.Tensor y: measurement.
        :return: a state, without gradient.
        """
        with unwritten(y, self._physics, self._iteration):
            state = checked_start(self._iteration.init(y, self._physics), self._iteration)
        self._capture.note_stored()
        return state

    def preconditioner(self, x: State) -> Callable[[State], State] | None:
        r"""An approximate inverse of :math:`I - \partial F / \partial x`, see :meth:`FixedPointIteration.preconditioner`.

        :param torch.Tensor, tuple[torch.Tensor, ...] x: a state.
        :return: a linear map of states, or ``None``.
        """
        self._capture.remember(x, self._rows)
        return self._iteration.preconditioner(x, self._physics)

    def natural(self, x: State) -> Callable[[State], State] | None:
        r"""What makes steps comparable for all stepsizes, see :meth:`FixedPointIteration.natural`."""
        return self._iteration.natural(x, self._physics)

    def contractive_part(self, x: State, exact: bool = False) -> tuple[State, Callable[[State], State] | None]:
        r"""See :meth:`FixedPointIteration.contractive_part`."""
        self._capture.remember(x, self._rows)
        return self._iteration.contractive_part(x, self._physics, *self._constants, exact=exact)

    def diagnose(self) -> str:
        r"""Why a solve of this map may have failed, see :func:`diagnose`."""
        return (_HOOKED if _is_hooked(self._iteration) and self._iteration.has_own_step else "") + diagnose(
            self._capture
        )


def _of(replica: Replica, name: str, x: State, constants: tuple[Tensor, ...]) -> State:
    iteration, physics = replica.roots
    return getattr(iteration, name)(x, physics, *constants)


def _is_hooked(iteration: Any) -> bool:
    r"""Whether ``step`` may be of another map than ``forward``: that has hooks, or was replaced on the object or its class later."""
    kind = type(iteration)
    return has_hooks(iteration) or "forward" in vars(iteration) or kind.forward is not kind._forward_of_step
