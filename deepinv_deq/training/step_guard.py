r"""No optimiser step after a solve that diverged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from deepinv_deq.reconstructor import DEQReconstructor
from deepinv_deq.solvers import ConvergenceError, ConvergenceWarning, SolverStat

_ON_DIVERGENCE = ("ignore", "skip", "raise")


def check_divergence(on_divergence: str, limit: float) -> None:
    r"""Check the settings of a Trainer that guards its steps.

    :param str on_divergence: what becomes of a step after a solve that diverged.
    :param float limit: relative residual above which a solve that missed its tolerance has diverged.
    :raises ValueError: if one of them is out of range.
    """
    if on_divergence not in _ON_DIVERGENCE:
        raise ValueError(f"on_divergence must be one of {', '.join(_ON_DIVERGENCE)}, got {on_divergence!r}.")
    if not limit > 0:
        raise ValueError(f"diverged_above must be positive, got {limit}.")


class StepGuard(GradScaler):
    r"""The gradient scaler of a Trainer, which every optimiser step goes through, disabled or not.

    :param torch.nn.Module model: the model, as the Trainer calls it.
    :param float limit: relative residual above which a solve that missed its tolerance has diverged.
    :param bool throw: whether to raise instead of making no step.
    :param scaling: arguments of :class:`torch.amp.GradScaler`.
    """

    def __init__(self, model: nn.Module, limit: float, throw: bool, **scaling: Any):
        super().__init__(**scaling)
        self._model, self._limit, self._throw = model, limit, throw
        self._causes: list[str] = []
        self.skipped = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        r"""Look at the statistic of every solve that is made in the block, forward and adjoint."""
        models = [module for module in self._model.modules() if isinstance(module, DEQReconstructor)]
        handles = [model.on_solve(self._judge) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _judge(self, which: str, stat: SolverStat) -> None:
        bad = ~(stat.residual <= self._limit) & ~stat.converged
        if which == "backward" and self.is_enabled():  # a scaled loss may overflow, and a lower scale puts it right
            bad &= torch.isfinite(stat.residual)
        if bool(bad.any()):
            self._causes.append(f"the {which} solve diverged ({stat.outcome})")

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        r"""Step, unless a solve since the last one diverged or a gradient is not finite.

        :param torch.optim.Optimizer optimizer: the optimiser.
        :param args: handed on.
        :param kwargs: handed on.
        :return: what the optimiser returns, or ``None``.
        :raises ConvergenceError: instead of making no step, if told to, or if the weights themselves are not finite.
        """
        causes, self._causes = self._causes, []
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # a scaler that is enabled looks for Inf itself, and lowers its scale: with float16 that is no divergence
        if not self.is_enabled() and not _finite([p.grad for p in parameters if p.grad is not None]):
            causes.append("the gradient is NaN or Inf")
        if not self._agreed(causes):
            return super().step(optimizer, *args, **kwargs)
        message = f"No optimiser step: {'; '.join(dict.fromkeys(causes))}."
        if not _finite(parameters):
            raise ConvergenceError(f"{message} The weights are NaN or Inf already: go back to an earlier checkpoint.")
        if self._throw:
            raise ConvergenceError(
                f"{message} Lower the learning rate, clip gradients, or make the map more contractive."
            )
        self.skipped += 1
        warnings.warn(
            f"{message} The weights are as before ({self.skipped} skipped).", ConvergenceWarning, stacklevel=2
        )
        if self.is_enabled():  # GradScaler.update() requires unscale_ for each optimiser.
            try:
                self.unscale_(optimizer)
            except RuntimeError:  # clipping has done it
                pass
        return None

    def _agreed(self, causes: list[str]) -> bool:
        r"""Whether any process has a cause: all of them must step, or none."""
        if any(isinstance(module, DistributedDataParallel) for module in self._model.modules()):
            count = torch.tensor(float(len(causes)), device=next(self._model.parameters()).device)
            torch.distributed.all_reduce(count)
            if bool(count > 0) and not causes:
                causes.append("another process met a divergence")
        return bool(causes)


def _finite(tensors: list[Tensor]) -> bool:
    r"""Whether all numbers are finite, with one synchronisation per device."""
    flags: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        flags.setdefault(t.device, []).append(torch.isfinite(t).all())
    return all(bool(torch.stack(found).all()) for found in flags.values())
