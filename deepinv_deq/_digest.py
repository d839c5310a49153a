r"""One digest for tensors and plain values, whatever file or device they are in."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepinv_deq import compat


def digest(value: Any, name: str = "value") -> str:
    r"""SHA-256 of tensors and plain values: equal for equal contents, whatever file or device they are in.

    :param value: tensors, numbers, strings, ``None`` and such, in dictionaries, lists, tuples and sets.
    :param str name: what to call it in an error.
    :return: hexadecimal digits.
    :raises TypeError: for anything else.
    """
    state = hashlib.sha256()
    _feed(state, value, name)
    return state.hexdigest()


def _feed(state: Any, value: Any, name: str) -> None:
    def put(kind: str, content: Any = b"") -> None:
        state.update(f"{kind}:{len(content)}:".encode())
        state.update(content)

    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            compressed = value.layout in (torch.sparse_csr, torch.sparse_bsr)
            pieces = (
                compat.sparse_pieces(value)  # of a tensor that is not coalesced, too
                if value.layout is torch.sparse_coo
                else (value.crow_indices(), value.col_indices(), value.values())
                if compressed
                else (value.ccol_indices(), value.row_indices(), value.values())
            )
            put(f"sparse {value.layout} {tuple(value.shape)}")
            for piece in pieces:
                _feed(state, piece, name)
            return
        if value.is_quantized or value.device.type == "meta":
            raise TypeError(f"{name} is a tensor without plain values ({value.dtype}, {value.device}).")
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        put(f"tensor {value.dtype} {tuple(value.shape)}", flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        put(f"dict {len(value)}")
        for key, item in value.items():
            _feed(state, key, f"a key of {name}")
            _feed(state, item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        put(f"{kind} {len(value)}")
        for i, item in enumerate(value):
            _feed(state, item, f"{name}[{i}]")
    elif isinstance(value, set | frozenset):
        put("set", "".join(sorted(digest(item, name) for item in value)).encode())
    elif type(value) is float:
        put("float", struct.pack("<d", value))
    elif type(value) is complex:
        put("complex", struct.pack("<2d", value.real, value.imag))
    elif isinstance(value, bytes | bytearray):
        put("bytes", value)
    elif isinstance(value, str):
        put("str", value.encode("utf-8", "surrogatepass"))
    elif value is None or type(value) in (bool, int) or isinstance(value, torch.dtype | torch.device):
        put(type(value).__name__, str(value).encode())
    else:
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}: only tensors and plain values can be saved "
            "and read back without running code."
        )


def plain(value: Any, name: str = "value") -> Any:
    r"""The same values without NumPy: arrays become tensors, scalars numbers.

    :param value: plain values, NumPy arrays and scalars, in dictionaries, lists and tuples.
    :param str name: what to call it in an error.
    :return: a copy of the containers that hold any NumPy value; everything else as it is.
    :raises TypeError: for arrays of objects, strings or dates.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise TypeError(f"{name} is an array of {value.dtype}, which no tensor can hold.") from error
    if type(value) is dict:
        return {plain(k, name): plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(v, f"{name}[{i}]") for i, v in enumerate(value))
    return value
