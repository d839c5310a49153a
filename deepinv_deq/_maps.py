r"""Old name of :mod:`deepinv_deq.maps`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepinv_deq.maps import AffineMap as AffineMap
from deepinv_deq.maps import Map as SeparableMap  # noqa: F401
from deepinv_deq.maps import as_map
from deepinv_deq.states import State


def preconditioner(f: Any, x: State) -> Callable[[Any], Any] | None:
    r"""What a map offers as an approximate inverse of the identity minus its Jacobian, for states like ``x``."""
    return as_map(f).preconditioner(x)
