r"""Files of weights: those that ship with the package by name, all others by path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

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
        return load_intact(path)
    except Exception as error:  # a broken file fails in as many ways as there are bytes in it
        raise ValueError(f"{path} holds no weights, or was cut off ({type(error).__name__}: {error}).") from error


def load_intact(path: str | os.PathLike[str]) -> Any:
    r"""Load what ``torch.save`` wrote, without running any code in it, if no byte of it was lost or changed.

    :param str, os.PathLike path: file.
    :return: its content, on the CPU.
    :raises Exception: of any kind, for any other file.
    """
    if is_zipfile(path):  # PyTorch itself does not look at the checksums that it wrote
        with ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise BadZipFile(f"the checksum of {broken} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)
