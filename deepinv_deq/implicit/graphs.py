r"""Products with the Jacobian of a graph, and the tensors at which it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepinv_deq.maps import Tensors

AUXILIARY = "_auxiliary"  # attribute of a tensor that a graph needs, and on whose values nothing depends
_REENTRANT = (
    "A part of the iteration is checkpointed with torch.utils.checkpoint(use_reentrant=True), as by deepinv's "
    "SwinIR(use_checkpoint=True), which allows no vector-Jacobian products. Switch it off, or use use_reentrant=False: the backward "
    "pass has the graph of one evaluation in memory, however many iterations the solver takes."
)

Gradients = tuple[Tensor | None, ...]  # None: the map does not depend on that tensor


def vjp(outputs: Tensors, inputs: Tensors, cotangent: Tensors, keep: bool = False, graph: bool = False) -> Gradients:
    r"""Product of a cotangent with the Jacobian of ``outputs`` over ``inputs``.

    :param tuple[torch.Tensor, ...] outputs: tensors with a graph.
    :param tuple[torch.Tensor, ...] inputs: tensors of that graph.
    :param tuple[torch.Tensor, ...] cotangent: one tensor for each of ``outputs``.
    :param bool keep: whether the graph of ``outputs`` is used again.
    :param bool graph: whether the product gets a graph of its own; if so, that of ``outputs`` is kept, too.
    :return: one tensor for each of ``inputs``, ``None`` where there is no dependence.
    :raises RuntimeError: if the graph has parts that are checkpointed with ``use_reentrant=True``.
    """
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangent, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    outs, cots = zip(*pairs, strict=True)
    try:
        return torch.autograd.grad(
            outs, inputs, cots, retain_graph=keep or graph, create_graph=graph, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise RuntimeError(_REENTRANT) from error
        raise


def as_leaf(t: Tensor) -> Tensor:
    r"""The same numbers as the end of a graph; still a parameter, with the attributes that the user gave it."""
    leaf = torch.nn.Parameter(t.detach()) if type(t) is torch.nn.Parameter else t.detach().requires_grad_()
    leaf.__dict__.update(t.__dict__)
    return leaf


def zeros_for_none(products: Gradients, like: Tensors) -> Tensors:
    r"""The same products, with zeros where there is no dependence."""
    return tuple(torch.zeros_like(t) if p is None else p for p, t in zip(products, like, strict=True))


def leaves(outputs: Tensors) -> Iterator[Tensor]:
    r"""The tensors that require a gradient and at which the graph of ``outputs`` ends, each once, without those marked ``AUXILIARY``."""
    seen, nodes = set[Any](), [t.grad_fn for t in outputs]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not hasattr(node.variable, AUXILIARY):
            yield node.variable
        nodes.extend(parent for parent, _ in node.next_functions)


def refuse_no_graph(image: Tensors) -> None:
    r"""Raise if a map has no graph at all: its gradient would be none, in silence."""
    if not any(t.requires_grad for t in image):
        raise RuntimeError(
            "The iteration builds no autograd graph, so its fixed point has no gradient: its network runs under torch.no_grad(), detaches "
            "its output, or computes outside of PyTorch. Make it differentiable, or reconstruct under torch.no_grad()."
        )


def refuse_hidden_leaves(image: Tensors, known: Tensors) -> None:
    r"""Raise if the map depends on a trainable tensor that is none of its inputs: its gradient would be lost."""
    known_ids = {id(t) for t in known}
    for leaf in leaves(image):
        if id(leaf) not in known_ids:
            raise RuntimeError(
                f"The iteration depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and was none of "
                "its inputs in the forward pass, so its gradient would be lost. If it was frozen then, unfreeze it before "
                "the forward pass, and run that again. If it is no parameter, buffer or attribute of the iteration or the "
                "physics, make it an attribute of one of them, or detach it."
            )
