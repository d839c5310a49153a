r"""How operations are watched, and random numbers and values inside of ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deq.compat.lookup import find

#: Attributes in which deepinv's physics keep an adjoint, or ``None`` if it is built from a method by backpropagation. Without them:
#: such an adjoint has no gradient for the parameters of its operator.
BUILT_ADJOINTS = {"A_adj": "A", "_V": "V_adjoint", "_U_adjoint": "U"}


def dispatch_mode(listed: Callable[[str, Any, Any], bool]) -> Any:
    r"""A context manager that passes the name and the arguments of every operation inside to a function.

    Its attribute ``certain`` tells whether the function returned True for all. Without the name: ``None``, and batches are solved
    whole.
    """
    base: Any = find("torch.utils._python_dispatch.TorchDispatchMode")
    if base is None:
        return None

    class Watching(base):
        certain = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.certain = self.certain and listed(func.overloadpacket.__name__, args, kwargs)
            return func(*args, **(kwargs or {}))

    return Watching()


def random_numbers(rng: np.random.Generator, shape: Sequence[int], normal: bool = False) -> Tensor:
    r"""Random numbers of NumPy: inside of ``torch.func.vmap``, and so of ``jacfwd``, PyTorch draws none.

    :param numpy.random.Generator rng: what draws them.
    :param Sequence[int] shape: shape.
    :param bool normal: whether they are normal, else uniform in [0, 1).
    :return: a tensor in double precision, on the CPU.
    """
    return torch.from_numpy(np.asarray(rng.standard_normal(tuple(shape)) if normal else rng.random(tuple(shape))))


def numbers(values: Tensor) -> list[float]:
    r"""The values of a tensor, read with one synchronisation. In PyTorch 2.4, tensors inside of ``torch.func`` have no ``tolist``.

    :param torch.Tensor values: of one dimension.
    :return: the values.
    """
    try:
        return values.tolist()
    except RuntimeError:
        return [float(value) for value in values]


def operator_of_adjoint(function: Any) -> Any:
    r"""The operator :math:`A` of what :func:`deepinv.physics.adjoint_function` returned; ``None`` for other functions.

    Without the names, such an adjoint is that of the user's own operator, also after a change of it.
    """
    owner = getattr(function, "__self__", None)
    if getattr(owner, "__qualname__", None) != "adjoint_function.<locals>.Adjoint":
        return None
    backward = getattr(owner, "backward", None)
    names, cells = getattr(backward, "__code__", None), getattr(backward, "__closure__", None)
    inside = zip(names.co_freevars if names else (), cells or (), strict=True)
    return next((cell.cell_contents for name, cell in inside if name == "A"), None)
