r"""Modules that replicas treat in their own way: normalised weights, functions that deepinv builds on first use, TorchScript."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepinv.physics import LinearPhysics, Physics
from torch import Tensor, nn

from deepinv_deq import compat
from deepinv_deq.iterations.adjoints import own_adjoint


def renew(module: nn.Module) -> None:
    r"""Give a replica its own version of what deepinv built on first use from the original, and let autograd go through it."""
    if isinstance(module, LinearPhysics):
        own_adjoint(module)
    if module.__dict__.get("implicit_backward_solver") is True and isinstance(module, Physics):
        # deepinv's own backward of prox_l2 solves with the physics as it is then, and adds to the ``grad`` of its tensors
        module.__dict__["implicit_backward_solver"] = False


def compute_weights(twin: nn.Module, normalised: nn.ModuleDict | None) -> set[str]:
    r"""Compute normalised weights once, and put them in place as plain tensors.

    In training mode, spectral norm changes with every access.

    :param torch.nn.Module twin: replica.
    :param torch.nn.ModuleDict, None normalised: parametrisations of the original.
    :return: names of the weights.
    """
    inside, names = twin.__dict__, set[str]()
    for name, parametrization in ({} if normalised is None else dict(normalised.items())).items():
        store = compat.STORES[0 if len(list(parametrization.parameters(recurse=False))) else 1]
        inside[store][name] = parametrization()
        names.add(name)
    hooks = inside[compat.PRE_HOOKS]
    kinds, pruning = compat.weight_hooks() if hooks else ((), None)
    for key, hook in list(hooks.items()):
        if isinstance(hook, kinds):
            hook(twin, None)
            names.add(hook._tensor_name if pruning and isinstance(hook, pruning) else hook.name)
            del hooks[key]
    return names


def replicate_script(
    module: Any,
    keep: Callable[[Any, Any], Any],
    replicate: Callable[[Any], Any],
    place: Callable[[Tensor, str, None], Tensor],
) -> nn.Module:
    r"""Replicate a module of TorchScript, whose tensors are in C++, as PyTorch's own data parallelism does.

    :param torch.jit.ScriptModule module: the module, or a replica.
    :param Callable keep: notes a replica.
    :param Callable replicate: replicates a submodule.
    :param Callable place: the tensor to use in the place of another.
    :return: the replica.
    """
    known = module.__dict__.get(
        "_of_replica"
    )  # in a replica, neither tensors nor submodules are in PyTorch's own lists
    if known is None:
        parameters, buffers, modules = compat.parts_of_script(module)
        stores = (("parameter", parameters), ("buffer", buffers))
        tensors = {name: (t, role) for role, store in stores for name, t in store.items()}
        known = modules, tensors
    twin = keep(module, compat.replica_of_script(module))
    children = {name: replicate(child) for name, child in known[0].items()}
    placed = {name: (place(t, role, None), role) for name, (t, role) in known[1].items()}
    for name, value in (*children.items(), *((name, t) for name, (t, _) in placed.items())):
        setattr(twin, name, value)
    twin.__dict__["_of_replica"] = children, placed
    return twin
