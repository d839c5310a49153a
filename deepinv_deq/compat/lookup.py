r"""Find a name that may be gone."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def find(path: str) -> Any:
    r"""The object of a dotted path, such as ``"torch._functorch.config"``.

    :param str path: module and attributes.
    :return: the object, or ``None`` where this version has none.
    """
    module, *names = path.split(".")
    found: Any = sys.modules.get(module)
    if found is None:
        return None
    for name in names:
        module = f"{module}.{name}"
        value = sys.modules.get(module)  # first: a function may hide the module of its name (spectral_norm)
        value = getattr(found, name, None) if value is None else value
        if value is None:
            try:
                value = importlib.import_module(module)
            except (ImportError, AttributeError):
                return None
        found = value
    return found
