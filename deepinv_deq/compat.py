r"""All private names of PyTorch, TorchDEQ and deepinv that the package uses.

Each function looks its name up when it is called. If a version of a library lacks the name, the feature in the docstring of
the function is lost; ``import deepinv_deq`` and training go on. To use another private name, add a function here.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def find(path: str) -> Any:
    r"""The object of a dotted path, such as ``"torch._functorch.config"``.

    :param str path: module and attributes.
    :return: the object, or ``None`` where this version has none.
    """
    module, *names = path.split(".")
    found: Any = sys.modules.get(module)
    if found is None:
        return None
    for name in names:
        module = f"{module}.{name}"
        value = getattr(found, name, None)
        if value is None:
            try:
                value = importlib.import_module(module)
            except (ImportError, AttributeError):
                return None
        found = value
    return found


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
    except (ImportError, AttributeError):  # it imports torch._dynamo
        return function
    return cast(_Function, functools.wraps(function)(disabled))


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


# TorchDEQ -----------------------------------------------------------------------------------------------------------


def registered_solvers() -> Mapping[str, Callable[..., Any]]:
    r"""TorchDEQ's table of solvers by name. Without it: an empty table, and TorchDEQ's own solvers are not listed."""
    return find("torchdeq.solver._solvers") or {}


# deepinv ------------------------------------------------------------------------------------------------------------


def distributed_gradient_sync() -> Any:
    r"""deepinv's autograd function that sums gradients of distributed tiles.

    Without it, :class:`deepinv_deq.distributed.SynchronisedDenoiser` cannot be made.
    """
    return find("deepinv.distributed.framework.distributed_utils.DistributedGradientSync")


def layers_that_change() -> tuple[tuple[type, ...], tuple[type, ...]]:
    r"""Base classes of batch norm and of dropout. Without them, the public classes for images and volumes."""
    norms = find("torch.nn.modules.batchnorm._BatchNorm")
    drops = find("torch.nn.modules.dropout._DropoutNd")
    nn = torch.nn
    return (
        (norms,) if norms else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        (drops,) if drops else (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    )
