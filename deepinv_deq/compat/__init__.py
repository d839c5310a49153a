r"""All private names of PyTorch, TorchDEQ and deepinv that the package uses.

Each function looks its name up when it is called. If a version of a library lacks the name, the feature in the docstring of
the function is lost; ``import deepinv_deq`` and training go on. To use another private name, add a function here.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from deepinv_deq.compat.lookup import find
from deepinv_deq.compat.modules import (
    HOOKS,
    OF_MODULES,
    PRE_HOOKS,
    STORES,
    has_forward_hooks,
    has_global_hooks,
    has_hooks,
    layers_that_change,
    layers_with_statistics,
    parts_of_script,
    replica_of_script,
    sparse_pieces,
    stored,
    version,
    weight_hooks,
    without,
)
from deepinv_deq.compat.operations import BUILT_ADJOINTS, dispatch_mode, numbers, operator_of_adjoint, random_numbers
from deepinv_deq.compat.precision import rounds_convolutions, unit_roundoff

__all__ = [
    "BUILT_ADJOINTS",
    "HOOKS",
    "OF_MODULES",
    "PRE_HOOKS",
    "STORES",
    "compile_again",
    "compiled_for_many_products",
    "dispatch_mode",
    "distributed_framework",
    "find",
    "forward_mode",
    "gather",
    "has_forward_hooks",
    "has_global_hooks",
    "has_hooks",
    "is_mapped",
    "layers_that_change",
    "layers_with_statistics",
    "numbers",
    "operator_of_adjoint",
    "outside_of_compiled_graphs",
    "parts_of_script",
    "random_numbers",
    "registered_solvers",
    "replica_of_script",
    "rotated_grid",
    "rounds_convolutions",
    "run_eagerly",
    "scatter",
    "sparse_pieces",
    "stored",
    "tangents",
    "transforms",
    "unit_roundoff",
    "version",
    "weight_hooks",
    "without",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


# torch.compile ------------------------------------------------------------------------------------------------------


class _Patches(threading.local):
    r"""One patch per setting and thread, used again: each new patch leaks a ContextVar (PyTorch 2.14)."""

    def off(self, config: Any, name: str) -> AbstractContextManager[Any]:
        if name not in self.__dict__:
            self.__dict__[name] = config.patch({name: False})
        return self.__dict__[name]


_patches = _Patches()


@contextmanager
def compiled_for_many_products() -> Iterator[None]:
    r"""Compile graphs whose backward pass runs several times, each for one batch size.

    The compiled backward runs several times, so buffer donation must be off (``donated_buffer``). Gradients of graphs
    for any batch size were measured to be wrong (``automatic_dynamic_shapes``; PyTorch 2.14, CPU). Without these settings
    compiled denoisers may fail in the backward pass.
    """
    paths = ["torch._functorch.config.donated_buffer"]
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        paths.append("torch._dynamo.config.automatic_dynamic_shapes")
    with ExitStack() as stack:
        for path in paths:
            owner, _, name = path.rpartition(".")
            config = find(owner)
            if getattr(config, name, False) and hasattr(config, "patch"):
                stack.enter_context(_patches.off(config, name))
        yield


def outside_of_compiled_graphs(function: _Function) -> _Function:
    r"""Decorator: ``torch.compile`` does not trace the function, but calls it between two graphs.

    Without ``torch.compiler.disable``, ``torch.compile(model)`` may fail.
    """
    disable = find("torch.compiler.disable")
    if disable is None:
        return function
    try:
        disabled = disable(function)
    except (ImportError, AttributeError, NameError):  # it imports torch._dynamo
        return function
    return cast(_Function, functools.wraps(function)(disabled))


def compile_again(module: nn.Module, twin: nn.Module) -> None:
    r"""Compile a copy as the original was, with PyTorch's cache. Without the names, the copy is not compiled."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if isinstance(module, getattr(frames, "OptimizedModule", ())):
        twin._initialize()  # type: ignore[operator]
    if twin.__dict__.get("_compiled_call_impl") is not None:
        kind = getattr(frames, "_TorchDynamoContext", ())
        cells = getattr(module._compiled_call_impl, "__closure__", None) or ()
        contexts = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, kind)]
        twin.__dict__["_compiled_call_impl"] = contexts[0](twin._call_impl) if contexts else None


def run_eagerly(twin: nn.Module) -> None:
    r"""Let a copy run without compiled code, so that its operations can be watched. Without the names, it is not compiled."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if isinstance(twin, getattr(frames, "OptimizedModule", ())):
        twin.__dict__["forward"] = twin._orig_mod.__call__  # type: ignore[operator]
    twin.__dict__["_compiled_call_impl"] = None


# Forward mode and torch.func ----------------------------------------------------------------------------------------


def forward_mode() -> bool:
    r"""Whether forward mode is active: inside of ``forward_ad.dual_level()`` or ``torch.func.jvp``.

    Without the name, the function tries to make a dual tensor, with the same result.
    """
    level = getattr(forward_ad, "_current_level", None)
    if level is not None:
        return level >= 0
    probe = torch.zeros(1)
    try:
        forward_ad.make_dual(probe, probe)
    except (RuntimeError, NameError):  # PyTorch's own functions may lack it, too
        return False
    return True


def tangents(enabled: bool) -> AbstractContextManager[Any]:
    r"""Enable or disable forward mode for the operations in a block. ``torch.no_grad`` does not disable it.

    Without the name forward mode stays enabled: derivatives are the same and cost more.
    """
    switch = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    return nullcontext() if switch is None else switch(enabled)


def transforms() -> list[str]:
    r"""The active transforms of :mod:`torch.func`, from outside to inside: ``"Vmap"``, ``"Grad"``, ``"Jvp"``.

    Without the name: an empty list. Unsupported transforms then raise PyTorch's own errors.
    """
    stack = find("torch._C._functorch.get_interpreter_stack")
    return [level.key().name for level in (stack() or ())] if stack else []


def is_mapped(t: Tensor) -> bool:
    r"""Whether the older ``vmap`` inside of :mod:`torch.autograd` (``vectorize=True``, ``is_grads_batched=True``) maps over it.

    Without the name: ``False``, and ``vectorize=True`` raises an error.
    """
    known = find("torch._C._functorch.is_legacy_batchedtensor")
    return known is not None and bool(known(t))


def gather(t: Tensor) -> Tensor:
    r"""All tensors over which the older ``vmap`` maps, along a new first dimension."""
    return torch._remove_batch_dim(t, _level(), 1, 0)


def scatter(t: Tensor) -> Tensor:
    r"""The inverse of :func:`gather`."""
    return torch._add_batch_dim(t, 0, _level())


def _level() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return max(level, 1)  # threads of the autograd engine do not count


# TorchDEQ and deepinv ------------------------------------------------------------------------------------------------


def registered_solvers() -> Mapping[str, Callable[..., Any]]:
    r"""TorchDEQ's table of solvers by name. Without it: an empty table, and TorchDEQ's own solvers are not listed."""
    return find("torchdeq.solver._solvers") or {}


def distributed_framework() -> tuple[Any, Any, Any]:
    r"""deepinv's classes of distributed denoisers and of their parameters, and its sum of the gradients of distributed tiles.

    Without them (``None``), :class:`deepinv_deq.training.distributed.SynchronisedDenoiser` raises, and nothing else changes.
    """
    names = ("DistributedProcessing", "DistributedReplicatedParameters", "distributed_utils.DistributedGradientSync")
    processing, replicated, synchronise = (find(f"deepinv.distributed.framework.{name}") for name in names)
    return processing, replicated, synchronise


def rotated_grid(radon: Any, i: int) -> Tensor:
    r"""The sampling grid of one view of deepinv's Radon transform.

    Without it: an AttributeError, and :class:`deepinv_deq.physics.SparseLinearPhysics` measures the matrix by columns.
    """
    if not radon.parallel_computation:
        return radon.all_grids[i]
    detectors = radon.all_grids.shape[2] // len(radon.theta)
    return radon.all_grids[:, :, i * detectors : (i + 1) * detectors]
