r"""The circumstances of a backward pass: autocast, inference mode and ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deepinv_deq import compat
from deepinv_deq.autocast import Setting


@contextmanager
def as_in_forward(settings: Setting) -> Iterator[None]:
    r"""Evaluate a map in a backward pass as in the forward pass.

    A Trainer runs the backward pass outside of its autocast region. Under ``torch.inference_mode`` no graph can be built, so
    that every gradient would be zero: the mode is left here.

    :param list settings: of :func:`autocast_settings`, in the forward pass.
    """
    create_graph = torch.is_grad_enabled()
    with ExitStack() as stack:
        for device, enabled, dtype in settings:
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        stack.enter_context(compat.compiled_for_many_products())
        stack.enter_context(outside_of_inference_mode())
        stack.enter_context(torch.set_grad_enabled(create_graph))
        yield


class outside_of_inference_mode:
    r"""Leave ``torch.inference_mode``, and enable gradients where it was on. It may be entered again and again, as
    ``torch.utils.checkpoint`` does."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        mode.__enter__()
        self._entered.append(mode)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def usable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    r"""Tensors that a graph may save: those made under ``torch.inference_mode`` are copied.

    :param tuple[torch.Tensor, ...] tensors: cotangents.
    :return: the same values.
    """
    return tuple(t.clone() if t.is_inference() else t for t in tensors)
