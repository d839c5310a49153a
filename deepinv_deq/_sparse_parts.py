r"""Parts of a sparse operator: what it keeps of the operator it stands for, and its cache."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor, nn

from deepinv_deq._sparse_matrices import csr
from deepinv_deq.compat import stored, without
from deepinv_deq.files import contents_of, load_intact, save_intact


def parts_of(x: Any) -> tuple[Any, Any]:
    r"""Real and imaginary part.

    :param torch.Tensor, float, None x: tensor of any type, or a number that stands for a constant image.
    :return: the two parts.
    """
    if isinstance(x, Tensor):
        return (x.real, x.imag) if x.is_complex() else (x, torch.zeros_like(x))
    return x, 0.0


def without_grids(original: LinearPhysics) -> LinearPhysics:
    r"""A copy of an operator to compute ``fbp`` with, without noise and, where the adjoint takes their place, grids.

    :param deepinv.physics.LinearPhysics original: the operator.
    :return: the copy, which shares no tensor with it.
    """
    light = without(original, ("noise_model", "sensor_model"))
    light.__dict__.update(noise_model=None, sensor_model=None, _auto_grad_adjoint_fn=None)
    if isinstance(original, Tomography) and (original.fan_beam or original.adjoint_via_backprop):
        for name, part in light.named_children():
            if name in ("radon", "iradon"):
                grids = [name for name, _ in part.named_buffers(recurse=False) if name.endswith(("grid", "grids"))]
                setattr(light, name, without(part, grids))
    return copy.deepcopy(light)  # moved to other devices and types with the sparse operator, and not with the original


def parameter_names(original: nn.Module) -> set[str]:
    r"""Names of the public attributes and tensors of an operator.

    :param torch.nn.Module original: the operator.
    :return: the names.
    """
    names = {name for name in vars(original) if not name.startswith("_")}
    names |= set(dir(type(original))) - set(dir(LinearPhysics))  # properties, such as old names of parameters
    return names | {name for name, _ in stored(original)}


def write_cache(path: Path, matrix: Tensor) -> None:
    r"""Write a matrix, or say in a warning why that failed.

    :param pathlib.Path path: file, whose folder is made.
    :param torch.Tensor matrix: sparse CSR matrix.
    """
    parts = {"rows": matrix.crow_indices(), "columns": matrix.col_indices(), "values": matrix.values()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_intact({"size": tuple(matrix.shape)} | {k: v.cpu() for k, v in parts.items()}, path)
    except OSError as error:  # after minutes of building: what was built can be used
        warnings.warn(f"The matrix is not cached: {error}", stacklevel=3)


def read_cache(path: Path) -> Tensor:
    r"""Read a matrix that :func:`write_cache` wrote.

    :param pathlib.Path path: file.
    :return: sparse CSR matrix on the CPU.
    :raises ValueError: if the file is broken, or of something else.
    """
    saved = load_intact(path, signed=True)
    with contents_of(path, "a matrix that SparseLinearPhysics wrote"):
        m, n = saved["size"]
        kinds = [saved[part].dtype for part in ("rows", "columns", "values")]
        if not kinds[2].is_floating_point or not {*kinds[:2]} <= {torch.int32, torch.int64}:
            raise ValueError(f"rows, columns and values of types {', '.join(map(str, kinds))}")
        return csr(saved["rows"], saved["columns"], saved["values"], (m, n), check=True)
