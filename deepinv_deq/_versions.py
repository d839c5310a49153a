r"""The version of deepinv is checked before anything is imported from it: an older one fails with names that say nothing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

NEEDED = (0, 5)


def require_deepinv() -> None:
    r"""Refuse a deepinv that is too old.

    :raises ImportError: if it is; the message has the version that was found.
    """
    try:
        found = version("deepinv")
    except PackageNotFoundError:  # not installed, or on the path as a folder: the imports will tell
        return
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < NEEDED:
        raise ImportError(
            f"deepinv-deq needs deepinv >= {'.'.join(map(str, NEEDED))}, and found deepinv {found}. "
            "Run: pip install --upgrade deepinv"
        )


require_deepinv()
