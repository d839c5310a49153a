r"""The sparse matrices of linear operators: assembled from the grids of a tomograph, or measured column by column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor

from deepinv_deq import compat

_COLUMNS = 128  # columns that are measured at once
_PROBES = 8  # views that are assembled first, to estimate the memory of all


def from_tomography(physics: Tomography, m: int, max_bytes: int) -> Tensor:
    r"""The matrix of a :class:`deepinv.physics.Tomography`: bilinear weights of its rotated grids, summed along rays.

    :param deepinv.physics.Tomography physics: the operator.
    :param int m: number of measurements.
    :param int max_bytes: memory that may be used.
    :return: sparse CSR matrix of shape ``(m, n)`` on the CPU, whatever the device of the operator.
    :raises ValueError: if more memory is needed.
    :raises AttributeError: if this deepinv has no such grids (0.5 has).
    """
    views, n = len(physics.radon.theta), physics.img_width**2
    if views > 2 * _PROBES:
        probed = range(0, views, views // _PROBES)
        numbers = sum(_view(physics, i)[1].numel() for i in probed) * views // len(probed)
        check_memory(physics, (m, n), numbers, physics.dtype, max_bytes)
    parts = [_view(physics, i) for i in range(views)]
    counts = torch.stack([count for count, *_ in parts], 1)  # (detectors, views), the order of Radon's measurements
    rows = _starts(counts.flatten())
    columns = torch.empty(int(rows[-1]), dtype=torch.int32)
    values = torch.empty(int(rows[-1]), dtype=physics.dtype)
    starts = rows[:-1].reshape(counts.shape)
    for i in range(views):
        count, column, value = parts[i]
        where = torch.repeat_interleave(starts[:, i] - (count.cumsum(0) - count), count) + torch.arange(len(column))
        columns[where], values[where] = column, value
        parts[i] = (count, column[:0], value[:0])  # frees the memory
    return csr(rows, columns, values, (m, n))


def by_columns(physics: LinearPhysics, img_size: Sequence[int], m: int, max_bytes: int) -> Tensor:
    r"""The matrix of any operator: its columns are the measurements of unit images.

    :param deepinv.physics.LinearPhysics physics: the operator.
    :param Sequence[int] img_size: shape of one image.
    :param int m: number of measurements.
    :param int max_bytes: memory that may be used.
    :return: sparse CSR matrix of shape ``(m, n)`` on the CPU.
    :raises ValueError: if more memory is needed.
    """
    n, like, total = torch.Size(img_size).numel(), scalar_like(physics), 0
    counts, columns, values = [], [], []
    chunk = max(1, min(_COLUMNS, max_bytes // (8 * (n + m) * like.element_size())))
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        unit = like.new_zeros(count, n)
        unit[:, start : start + count].fill_diagonal_(1.0)
        with torch.no_grad():
            block = physics.A(unit.reshape(-1, *img_size)).reshape(-1, m).cpu()
        where = block.nonzero()
        counts.append(torch.bincount(where[:, 0], minlength=count))
        columns.append(where[:, 1].int())
        values.append(block[where[:, 0], where[:, 1]])
        total += len(where)
        check_memory(physics, (m, n), total, block.dtype, max_bytes)
    return transpose(csr(_starts(torch.cat(counts)), torch.cat(columns), torch.cat(values), (n, m)))


def transpose(matrix: Tensor) -> Tensor:
    r"""The transpose of a sparse CSR matrix, as a sparse CSR matrix.

    :param torch.Tensor matrix: sparse CSR matrix of shape ``(m, n)``.
    :return: sparse CSR matrix of shape ``(n, m)``, with 32-bit indices where they are enough.
    """
    rows, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    m, n = matrix.shape
    order = torch.argsort(columns, stable=True)
    numbers = torch.repeat_interleave(torch.arange(m, dtype=torch.int32, device=rows.device), rows.diff().long())
    starts = _starts(torch.bincount(columns.int(), minlength=n))
    return csr(starts, numbers[order], values[order], (n, m))


def csr(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int], check: bool = False) -> Tensor:
    r"""A sparse CSR matrix. 32-bit indices halve what a product reads; they are enough for 2³¹ numbers.

    :param torch.Tensor rows: where each row starts, of shape ``(m + 1,)``.
    :param torch.Tensor columns: column indices.
    :param torch.Tensor values: values.
    :param tuple size: ``(m, n)``.
    :param bool check: whether to verify the indices, which takes one pass over them.
    :return: the matrix.
    """
    index = torch.int32 if max(len(columns), *size) < 2**31 else torch.int64
    return torch.sparse_csr_tensor(rows.to(index), columns.to(index), values, size=size, check_invariants=check)


def check_memory(physics: LinearPhysics, size: tuple[int, int], numbers: int, dtype: torch.dtype, limit: int) -> None:
    r"""Refuse matrices that are too large.

    :param deepinv.physics.LinearPhysics physics: the operator, for the message.
    :param tuple size: shape of the matrix.
    :param int numbers: number of its entries that are not zero.
    :param torch.dtype dtype: type of the entries.
    :param int limit: memory that may be used, in bytes.
    :raises ValueError: if more is needed.
    """
    # both matrices, the order in which the second one is sorted, and what sorting takes
    needed = numbers * (2 * (4 + dtype.itemsize) + 32) + 16 * sum(size)
    if needed > limit:
        raise ValueError(
            f"The {size[0]} x {size[1]} matrix of {type(physics).__name__} has at least {numbers:,} entries: to build it takes "
            f"{needed / 2**30:.1f} GiB, more than max_bytes = {limit / 2**30:.1f} GiB. Use {type(physics).__name__} itself, "
            "fewer views or pixels, or a larger max_bytes."
        )


def scalar_like(physics: LinearPhysics) -> Tensor:
    r"""A scalar with the operator's device and widest dtype.

    :param deepinv.physics.LinearPhysics physics: the operator.
    :return: zero, as a tensor of no dimension.
    """
    like = torch.zeros(())
    for t in (*physics.parameters(), *physics.buffers()):
        if t.is_floating_point():
            like = torch.zeros((), device=t.device, dtype=torch.promote_types(like.dtype, t.dtype))
    return like


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _view(physics: Tomography, i: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of one view: the number of pixels that each detector sees, the indices of these, and their weights."""
    radon, side = physics.radon, physics.img_width
    grid = compat.rotated_grid(radon, i)
    # the same padding as in deepinv's Radon.forward; from_physics checks the matrix against the operator
    padded, before = side, 0
    if not radon.circle:
        padded = side + int((torch.tensor(2.0).sqrt() * side - side).ceil())
        before = padded // 2 - side // 2
    position = (grid[0].detach().cpu().double() + 1) / 2 * (padded - 1) - before  # align_corners=True
    column, row = position[..., 0], position[..., 1]
    detector = torch.arange(grid.shape[2]).expand(grid.shape[1], -1)
    keys, weights = [], []
    for dr in (0, 1):
        for dc in (0, 1):
            r, c = row.floor() + dr, column.floor() + dc
            weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
            if radon.circle:
                weight = weight * (((2 * r / (side - 1) - 1) ** 2 + (2 * c / (side - 1) - 1) ** 2) <= 1)
            inside = (r >= 0) & (r < side) & (c >= 0) & (c < side) & (weight > 0)
            keys.append(detector[inside] * side**2 + (r * side + c)[inside].long())
            weights.append(weight[inside])
    length = grid.shape[2] * side**2
    summed = torch.sparse_coo_tensor(
        torch.cat(keys)[None], torch.cat(weights), (length,), check_invariants=False
    ).coalesce()
    key, value = summed.indices()[0], summed.values()
    if physics.normalize:
        value = value / physics.operator_norm.cpu().double()
    count = torch.bincount(key // side**2, minlength=grid.shape[2])
    return count, (key % side**2).int(), value.to(physics.dtype)
