r"""Checkpoints of a run: the newest that can be loaded, and what is wrong with one that cannot."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from torch import Tensor

from deepinv_deq.files import load_intact

_NAME = re.compile(r"ckp_([0-9]+)\.pth\.tar")  # not ckp_best, written before the epoch's scheduler step


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    r"""Newest loadable checkpoint of the run that was started last; a warning names broken ones, which are skipped.

    :param str, os.PathLike folder: the ``save_path`` of the run.
    :return: path of the checkpoint with the largest epoch in the folder of the run that was started last. If all of its
        checkpoints are broken, that of the run before it, and so on. ``None`` if there is none.
    """
    for _, run in sorted(((_started(run), run) for run in _runs(folder)), reverse=True):
        files = [(int(match[1]), name) for name in _names(run) if (match := _NAME.fullmatch(name))]
        for _, name in sorted(files, reverse=True):
            path = os.path.join(run, name)
            try:
                read_checkpoint(path, "epoch")
                return path
            except FileNotFoundError:  # it vanished, or is a link to nothing
                warnings.warn(f"Passing over {path}, which is not there anymore.", stacklevel=2)
            except ValueError as error:
                warnings.warn(f"Passing over the broken checkpoint {path}: {error}", stacklevel=2)
    return None


def _runs(folder: str | os.PathLike[str]) -> list[str]:
    r"""Every folder under one, and itself."""
    return [path for path, *_ in os.walk(folder)]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # vanished, or not readable
        return []


def _started(run: str) -> float:
    r"""When a run was started: deepinv names its folder by the time. Other names: when its oldest checkpoint was written."""
    for separator in ":_":
        with suppress(ValueError):
            return datetime.strptime(os.path.basename(run), f"%y-%m-%d-%H{separator}%M{separator}%S").timestamp()
    written = []
    for name in _names(run):
        with suppress(OSError):
            if _NAME.fullmatch(name):
                written.append(os.stat(os.path.join(run, name)).st_mtime)
    return min(written, default=0.0)


def read_checkpoint(path: str | os.PathLike[str], *keys: str) -> dict[str, Any]:
    r"""Read a checkpoint, and verify that it is whole and has entries of the right types.

    :param str, os.PathLike path: file.
    :param str keys: entries that it must have, besides ``state_dict``.
    :return: the checkpoint, on the CPU.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is broken, or of something else.
    """
    try:
        checkpoint = load_intact(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{path} is no checkpoint that can be trusted: it was cut off or changed, or has more in it than tensors and "
            f"plain values ({cause}). Use an earlier one."
        ) from error
    lacking = [key for key in ("state_dict", *keys) if not isinstance(checkpoint, dict) or key not in checkpoint]
    if lacking:
        raise ValueError(f"{path} is no checkpoint of a Trainer: it has no {', '.join(lacking)}.")
    # what deepinv itself does not read may have another form in checkpoints of other versions
    checked = tuple(_TYPES) if "rng" in checkpoint else ("state_dict", "epoch", "optimizer", "scheduler")
    wrong = [key for key in checked if key in checkpoint and not _TYPES[key](checkpoint[key])]
    if wrong:
        raise ValueError(f"{path} is no checkpoint of a Trainer: {', '.join(wrong)} has values of a wrong type.")
    return checkpoint


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) for k in value)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "state_dict": lambda v: (
        _is_state(v) and all(isinstance(t, Tensor) or k.endswith("_extra_state") for k, t in v.items())
    ),
    "epoch": lambda v: type(v) is int and v >= 0,
    "optimizer": lambda v: v is None or _is_state(v),
    "scheduler": lambda v: v is None or _is_state(v),
    "scaler": _is_state,
    "config": lambda v: isinstance(v, dict),
    "rng": _is_state,
    **{
        key: lambda v: _is_state(v) and all(isinstance(values, list) for values in v.values())
        for key in ("loss", "train_metrics", "eval_loss", "eval_metrics")
    },
}
