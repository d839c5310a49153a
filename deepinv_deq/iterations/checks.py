r"""Checks of what a user hands to an iteration, and of what happens to it between forward and backward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepinv_deq import compat
from deepinv_deq.compat import version
from deepinv_deq.implicit.unchanged import IN_PLACE
from deepinv_deq.iterations.replica import Found


class Watch:
    r"""Notices when a shared tensor is changed in place.

    Tensors that an evaluation changes itself, such as a counter or statistics of a user's own layer, are not watched.

    :param Iterable found: tensors of a replica. Running statistics of layers in training mode are not watched.
    :param tuple[torch.Tensor, ...] constants: what the iteration computed from the measurements.
    """

    def __init__(self, found: Iterable[Found], constants: tuple[Tensor, ...]):
        found = [f for f in found if not f.statistic]
        self._known = [(t, _mark(t), t.detach()) for t in (*(f.tensor for f in found), *constants)]
        self._own = {id(f.tensor) for f in found if f.root == 0 and not f.tensor.requires_grad}

    def evaluated(self) -> None:
        r"""Take in an evaluation: forget the tensors without gradient that it changed."""
        self._known = [each for each in self._known if id(each[0]) not in self._own or each[1] == _mark(each[0])]

    def check(self) -> None:
        r"""Compare the tensors with those of the forward pass.

        :raises RuntimeError: if a tensor was changed in place.
        """
        for t, known, before in self._known:
            if known != _mark(t) and not _moved(t, known, before):
                raise RuntimeError(IN_PLACE.format(which=f" of shape {tuple(t.shape)}"))


def _mark(t: Tensor) -> tuple[Any, ...]:
    r"""What tells that a tensor was changed: its version, and its memory and type, which ``t.data = ...`` changes."""
    address = None
    if t.layout is torch.strided:
        # tensors inside of torch.func have no address
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
            address = t.data_ptr()
    return version(t), t.dtype, address


def _moved(t: Tensor, known: tuple[Any, ...], before: Tensor) -> bool:
    r"""Whether only the memory of a tensor is another, as after ``t.data = t.data.clamp(...)``, and its values are the same."""
    return (
        known[:2] == _mark(t)[:2]
        and t.shape == before.shape
        and t.device == before.device
        and torch.equal(t.detach(), before)
    )


def changed(copy: Tensor, known: int | None, of: Tensor) -> bool:
    r"""Whether a copy was written to, also through ``copy.data`` or NumPy, which its version does not tell.

    :param torch.Tensor copy: the copy.
    :param int, None known: its version when it was made.
    :param torch.Tensor of: what it is a copy of; if it is the tensor itself, only its version tells.
    """
    if copy is of:
        return version(copy) != known
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (copy.detach(), of.detach()))
    return version(copy) != known or not (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


class OwnInput:
    r"""Forward pre-hook: a network that writes to its input in place gets a copy.

    The first evaluation always gets one, and tells whether later evaluations need one.
    """

    def __init__(self) -> None:
        self.writes: bool | None = None
        self._given: list[tuple[Tensor, int | None, Tensor]] = []

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.settle()
        if self.writes is False:
            return None
        given = [*args, *kwargs.values()]
        copies = [a.clone() if isinstance(a, Tensor) else a for a in given]
        if self.writes is None:
            pairs = zip(copies, given, strict=True)
            self._given = [(copy, version(copy), a) for copy, a in pairs if isinstance(a, Tensor)]
        return tuple(copies[: len(args)]), dict(zip(kwargs, copies[len(args) :], strict=True))

    def settle(self) -> None:
        r"""Conclude from the first evaluation."""
        if self.writes is None and self._given:
            # an inference tensor does not tell: copies are always safe
            self.writes = any(known is None or changed(t, known, of) for t, known, of in self._given)
            self._given = []


def refuse_zero(stepsize: Any) -> None:
    r"""Refuse a learned stepsize that has become zero. NaN is left to the solver, which reports it.

    :param torch.Tensor, Any stepsize: the stepsize; what is no tensor is not learned.
    :raises ValueError: if it is zero.
    """
    if isinstance(stepsize, Tensor) and bool((stepsize.detach() == 0).any()):
        raise ValueError(
            f"The stepsize has become {stepsize.detach().tolist()}: it must not be zero. Set it to a positive number, and give "
            "it a smaller learning rate."
        )


def refuse_other_dimension(stepsize: Tensor, x: Tensor) -> None:
    r"""Refuse a stepsize per channel that would broadcast over another dimension of the state, such as the depth of a volume.

    :param torch.Tensor stepsize: the stepsize.
    :param torch.Tensor x: a state.
    :raises ValueError: if its numbers are not those of the channels.
    """
    if stepsize.numel() == 1:
        return
    shape = (x.shape[1], *[1] * (x.ndim - 2)) if x.ndim > 1 else ()
    if tuple(stepsize.shape) not in (shape, (1, *shape)):
        raise ValueError(
            f"The stepsize has the shape {tuple(stepsize.shape)}, which is not one number per channel of a state of shape "
            f"{tuple(x.shape)}: give one number, or one per channel with shape {(1, *shape)}."
        )


def positive(name: str, value: Any, for_all: str = "") -> Tensor:
    r"""A setting as a tensor: one number, or one number per channel of shape ``(C, 1, ...)``.

    :param str for_all: name of the class, if it needs one number for all channels.
    :raises ValueError: if it is not positive, or has another shape.
    """
    t = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    t = t if t.is_floating_point() else t.to(torch.get_default_dtype())  # integers have no gradient
    if not t.is_meta and not bool((t > 0).all()):
        raise ValueError(f"{name} must be positive, got {value}.")
    per_channel = (t.ndim == 3 and t.shape[1:].numel() == 1) or (t.ndim > 2 and t.numel() == t.shape[1])
    if t.numel() != 1 and not per_channel:
        raise ValueError(
            f"{name} must be one number, or one per channel with shape (C, 1, 1) for images or (1, C, 1, ...), got shape {tuple(t.shape)}."
        )
    if for_all and t.numel() > 1:
        raise ValueError(f"{for_all} needs one {name} for all channels, got shape {tuple(t.shape)}.")
    return t


def refuse_partial_gradients(denoiser: nn.Module) -> None:
    r"""Refuse to train a distributed denoiser that is not synchronised.

    :raises TypeError: if its gradients are each process' own part.
    """
    processing = compat.distributed_framework()[0]
    distributed = processing is not None and isinstance(denoiser, processing) and denoiser.ctx.world_size > 1
    if torch.is_grad_enabled() and distributed:
        raise TypeError(
            "The gradients of a distributed denoiser are each process' own part. To train, wrap it in "
            "deepinv_deq.training.distributed.SynchronisedDenoiser; to reconstruct, use torch.no_grad()."
        )


def unsuitable_layer(denoiser: nn.Module) -> str:
    r"""The sentence of the warning about a layer in training mode for which the fixed point is not well defined, or ``""``."""
    norms, dropouts = compat.layers_that_change()
    for name, module in denoiser.named_modules():
        batch_norm = isinstance(module, norms) and module.training
        dropout = isinstance(module, dropouts) and module.training and module.p > 0
        if batch_norm or dropout:
            effect = "couples the samples of a batch" if batch_norm else "changes from one evaluation to the next"
            return (
                f"{type(module).__name__} '{name}' of the denoiser is in training mode and {effect}, so the fixed "
                "point is not well defined. Use group norm (EquilibriumUNet) or put the layer in eval mode."
            )
    return ""


def warn_if_unsuitable(denoiser: nn.Module) -> bool:
    r"""Warn about a layer for which the fixed point is not well defined.

    :return: whether there was one.
    """
    message = unsuitable_layer(denoiser)
    if message:
        warnings.warn(message, stacklevel=4)
    return bool(message)
