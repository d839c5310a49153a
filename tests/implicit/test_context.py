r"""The circumstances of a backward pass: threads, inference mode, compiled graphs."""

from __future__ import annotations

import contextvars
import importlib

from tests.implicit.common import sup_loss
from tests.problems import (
    imaging,
)


def test_context_of_the_thread_does_not_grow():
    importlib.import_module("torch._dynamo")  # the optimisers of PyTorch import it
    model, physics, _, y = imaging()
    sup_loss(model, y, physics).backward()
    size = len(contextvars.copy_context())
    for _ in range(3):
        sup_loss(model, y, physics).backward()
    assert len(contextvars.copy_context()) == size
