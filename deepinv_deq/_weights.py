r"""Files of weights: those that ship with the package by name, all others by path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_SHIPPED = Path(__file__).parent / "weights"


def read_weights(name: str | os.PathLike[str], folder: str = "") -> dict[str, Any]:
    r"""Read a file without running any code in it.

    :param str, os.PathLike name: a name of the files that ship in ``folder``, or a path.
    :param str folder: subfolder of the shipped weights.
    :return: its dictionary.
    :raises FileNotFoundError: if there is none.
    :raises ValueError: if the file is broken.
    """
    shipped = {path.stem: path for path in (_SHIPPED / folder).glob("*.pt")}
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        known = f" or one of {', '.join(sorted(shipped))}" if shipped else ""
        raise FileNotFoundError(f"No weights {str(name)!r}: give a file{known}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in as many ways as there are bytes in it
        raise ValueError(f"{path} holds no weights, or was cut off ({type(error).__name__}: {error}).") from error
