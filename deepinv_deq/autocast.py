r"""Autocast for maps only: the algebra around them stays in the precision of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])
#: A residual below this many roundings of the type of autocast shows that the map computes in a finer type.
FINER = 1e-3
Setting = list[tuple[str, bool, torch.dtype]]


def autocast_settings(device: str) -> Setting:
    r"""The autocast settings in force.

    :param str device: type of the device of the state.
    :return: for it and for the CPU: device type, whether autocast is enabled, its dtype.
    """
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted({"cpu", device})]


class Autocast:
    r"""The setting in force when this object is made, in this thread.

    Where autocast is not enabled, both methods do nothing.

    :param str device: type of the device of the state.
    """

    def __init__(self, device: str):
        self.setting = [part for part in autocast_settings(device) if part[1]]
        #: The type that operations on the device are cast to; ``None`` where they are not.
        self.dtype = next((dtype for d, _, dtype in self.setting if d == device), None)

    def off(self) -> AbstractContextManager[None]:
        r"""No autocast inside. PyTorch keeps its cache of cast weights until the outermost region ends."""
        return _inside([(d, False, dtype) for d, _, dtype in self.setting]) if self.setting else nullcontext()

    def around(self, function: _Function) -> _Function:
        r"""The same function, evaluated in the setting of this object.

        :param Callable function: any function.
        :return: a function; ``function`` itself where autocast is not enabled.
        """
        if not self.setting:
            return function
        setting = self.setting  # no reference to self: the function may be part of a reference cycle

        def cast(*args: object) -> object:
            with _inside(setting):
                return function(*args)

        return cast  # type: ignore[return-value]


@contextmanager
def _inside(setting: Setting) -> Iterator[None]:
    with ExitStack() as stack:
        for device, enabled, dtype in setting:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield
