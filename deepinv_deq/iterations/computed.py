r"""Modules that replicas treat in their own way: normalised weights, functions that deepinv builds on first use, TorchScript."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import Physics, Tomography
from torch import Tensor, nn

from deepinv_deq import compat


class _AnyShape:
    r"""Equal to every shape, so that deepinv does not build its own adjoint for another one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class _Adjoint:
    r"""The adjoint of a :class:`deepinv.physics.Tomography` by backpropagation through one graph.

    deepinv keeps such a function on the module. It refers to the original, and it is a class inside a reference cycle, which
    keeps its graph until the garbage collector runs.

    :param deepinv.physics.Tomography physics: replica.
    """

    _shared_by_replicas = True  # every replica gets its own

    def __init__(self, physics: Tomography):
        self._physics = weakref.ref(physics)
        self._graph: tuple[Any, Tensor, Tensor] | None = None

    def __call__(self, y: Tensor) -> Tensor:
        return _AdjointProduct.apply(y, self, self._physics())

    def product(self, y: Tensor, physics: Tomography) -> Tensor:
        r"""Apply the adjoint to measurements."""
        shape = (*y.shape[:2], physics.img_width, physics.img_width)
        with torch.inference_mode(False), torch.enable_grad():
            if self._graph is None or self._graph[0] != (shape, y.device):
                x = torch.zeros(shape, device=y.device, dtype=physics.dtype, requires_grad=True)
                self._graph = (shape, y.device), x, physics.A(x)
            _, x, measured = self._graph
            cotangent = (y.clone() if y.is_inference() else y.detach()).to(measured.dtype)
            return torch.autograd.grad(measured, x, cotangent, retain_graph=True)[0]


class _AdjointProduct(torch.autograd.Function):
    r"""The adjoint, whose own adjoint is the operator."""

    @staticmethod
    def forward(y: Tensor, adjoint: _Adjoint, physics: Tomography) -> Tensor:
        return adjoint.product(y, physics)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.physics = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.physics.A(g), None, None


def renew(module: nn.Module) -> None:
    r"""Give a replica its own version of what deepinv built on first use from the original, and let autograd go through it."""
    if isinstance(module, Tomography) and "_auto_grad_adjoint_fn" in module.__dict__:
        module.__dict__["_auto_grad_adjoint_fn"] = _Adjoint(module)
        module.__dict__["_auto_grad_adjoint_input_shape"] = _AnyShape()
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
