r"""Private names of PyTorch's tensors and modules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from deepinv_deq.compat.lookup import find

#: Where modules keep their tensors and submodules. There is no public way to put a tensor with a graph in the place of a parameter.
STORES = ("_parameters", "_buffers", "_modules")
PRE_HOOKS = "_forward_pre_hooks"
#: Where modules keep their hooks. In PyTorch 2.4, the stores are ordered dictionaries, too.
HOOKS = frozenset(k for k, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)).difference(STORES)
#: Every attribute that all modules have. The others are the user's.
OF_MODULES = frozenset(vars(nn.Module()))


def stored(module: nn.Module) -> list[tuple[str, Any]]:
    r"""Names and values of the parameters, the buffers and the attributes of a module, without its submodules and hooks."""
    inside = vars(module)
    own = [item for item in inside.items() if item[0] not in OF_MODULES]
    return [*inside[STORES[0]].items(), *inside[STORES[1]].items(), *own]


def without(module: nn.Module, names: Container[str]) -> nn.Module:
    r"""A shallow copy of a module without some of its tensors and submodules."""
    twin = copy.copy(module)
    for store in STORES:
        twin.__dict__[store] = {name: value for name, value in vars(module)[store].items() if name not in names}
    return twin


def has_hooks(module: nn.Module) -> bool:
    r"""Whether a call of a module does more than ``forward``."""
    return any(vars(module).get(name) for name in HOOKS)


def has_forward_hooks(module: nn.Module) -> bool:
    r"""Whether hooks see or change what a call of a module is given or returns."""
    return any(vars(module).get(name) for name in HOOKS if name.startswith("_forward"))


def has_global_hooks() -> bool:
    r"""Whether all modules have a forward hook. Without the names: no."""
    of = "torch.nn.modules.module._global_forward"
    return bool(find(f"{of}_hooks") or find(f"{of}_pre_hooks"))


def version(t: Tensor) -> int | None:
    r"""How often a tensor was changed in place; ``None`` for inference tensors, which do not count.

    Without the name: ``None``, and changes in place are not noticed.
    """
    return None if t.is_inference() else getattr(t, "_version", None)


def sparse_pieces(t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Indices and values of a COO tensor. Without the names: after summing entries of the same index."""
    if not hasattr(t, "_indices") or not hasattr(t, "_values"):
        t = t.coalesce()
        return t.indices(), t.values()
    return t._indices(), t._values()


def replica_of_script(module: Any) -> nn.Module:
    r"""A replica of a TorchScript module. Without the name: an AttributeError; such modules cannot be used."""
    return module._replicate_for_data_parallel()


def parts_of_script(module: Any) -> list[dict[str, Any]]:
    r"""Parameters, buffers and submodules of a TorchScript module, which are in C++."""
    return [dict(getattr(module, store).items()) for store in STORES]


def weight_hooks() -> tuple[tuple[Any, ...], Any]:
    r"""Classes of old-style hooks that compute a weight before every call, and that of pruning.

    Without one of them its weights are computed in every evaluation, as PyTorch does.
    """
    paths = ("spectral_norm.SpectralNorm", "weight_norm.WeightNorm", "prune.BasePruningMethod")
    found = [find(f"torch.nn.utils.{path}") for path in paths]
    return tuple(kind for kind in found if kind), found[2]


def layers_with_statistics() -> tuple[Any, ...]:
    r"""Base class of batch and instance norm. Without it, the public classes."""
    base = find("torch.nn.modules.batchnorm._NormBase")
    norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return (base,) if base else (*layers_that_change()[0], *norms)


def layers_that_change() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    r"""Base classes of batch norm and of dropout. Without them, the public classes for images and volumes."""
    norms = find("torch.nn.modules.batchnorm._BatchNorm")
    drops = find("torch.nn.modules.dropout._DropoutNd")
    return (
        (norms,) if norms else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        (drops,) if drops else (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    )
