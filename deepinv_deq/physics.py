r"""Sparse-matrix form of linear physics: on CPU, the projections of a CT operator otherwise dominate a training step."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor

_TOLERANCE = 1e-5  # relative; of a probe in single precision, whose own rounding is a few 1e-7


class SparseLinearPhysics(LinearPhysics):
    r"""Any linear physics with :math:`A` and :math:`A^\top` as sparse matrices (CSR).

    The two matrices are exact transposes of each other, so the adjoint is exact whatever the original's was. The noise
    model, the sensor model and the fast inverse ``fbp`` are the original's. Use :meth:`from_physics` to make one.

    :param torch.Tensor matrix: sparse CSR matrix of shape ``(m, n)``.
    :param Sequence[int] img_size: shape of one image without batch, ``(C, H, W)``, with ``n`` elements.
    :param Sequence[int] measurement_size: shape of one measurement without batch, with ``m`` elements.
    :param deepinv.physics.LinearPhysics, None original: the operator it stands for.

    :raises ValueError: if the sizes do not fit the matrix.
    """

    def __init__(
        self,
        matrix: Tensor,
        img_size: Sequence[int],
        measurement_size: Sequence[int],
        original: LinearPhysics | None = None,
    ):
        kwargs = (
            {} if original is None else {"noise_model": original.noise_model, "sensor_model": original.sensor_model}
        )
        super().__init__(img_size=tuple(img_size), **kwargs)
        self.img_size, self.measurement_size = tuple(img_size), tuple(measurement_size)
        expected = (_numel(self.measurement_size), _numel(self.img_size))
        if tuple(matrix.shape) != expected:
            raise ValueError(f"The matrix has shape {tuple(matrix.shape)}, but the sizes ask for {expected}.")
        for name, m in (("forward", matrix), ("adjoint", matrix.to_sparse_coo().t().coalesce().to_sparse_csr())):
            # plain buffers, because modules can move and copy those; 32-bit indices halve what a product reads
            self.register_buffer(f"_{name}_rows", m.crow_indices().int(), persistent=False)
            self.register_buffer(f"_{name}_columns", m.col_indices().int(), persistent=False)
            self.register_buffer(f"_{name}_values", m.values(), persistent=False)
        self._original = [] if original is None else [original]  # in a list: its tensors are not those of this operator
        if hasattr(original, "fbp"):
            self.fbp = self._fbp

    @classmethod
    def from_physics(
        cls, physics: LinearPhysics, img_size: Sequence[int], *, cache: str | os.PathLike[str] | None = None
    ) -> SparseLinearPhysics:
        r"""Measure the matrix of an operator.

        :class:`deepinv.physics.Tomography` is assembled from its interpolation grids, anything else from its columns.
        Either way the result is checked against the operator on a random image.

        :param deepinv.physics.LinearPhysics physics: the operator.
        :param Sequence[int] img_size: shape of one image, ``(C, H, W)``.
        :param str, None cache: file for the matrix: read if there, else written. A file of another operator is refused.
        :return: the sparse operator, on the device of ``physics``.
        :raises ValueError: if the operator is not linear with real images, or the cache belongs to another operator.
        """
        img_size = tuple(img_size)
        probe = torch.rand(1, *img_size, generator=torch.Generator().manual_seed(0)).to(_like(physics))
        with torch.no_grad():
            y = physics.A(probe)
        if not isinstance(y, Tensor) or y.is_complex():
            raise ValueError(f"{type(physics).__name__} does not map real images to one real tensor of measurements.")
        path = None if cache is None else Path(cache)
        if path is not None and path.exists():
            matrix = torch.load(path, weights_only=True).to(probe.device, probe.dtype)
            sparse = cls(matrix, img_size, y.shape[1:], physics) if matrix.shape == (y.numel(), probe.numel()) else None
            if sparse is None or not sparse._agrees(probe, y):
                raise ValueError(f"{path} holds the matrix of another operator. Delete it, or name another cache file.")
            return sparse
        candidates = [_tomography_matrix] if isinstance(physics, Tomography) else []
        for build in (*candidates, _matrix_by_columns):
            sparse = cls(build(physics, img_size, y.numel()), img_size, y.shape[1:], physics)
            if sparse._agrees(probe, y):
                break
        else:
            raise ValueError(f"{type(physics).__name__} does not act as a matrix on images of shape {img_size}.")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            torch.save(sparse.matrix.cpu(), partial)
            partial.replace(path)
        return sparse

    @property
    def matrix(self) -> Tensor:
        r"""The matrix :math:`A`, sparse CSR of shape ``(m, n)``."""
        return self._csr("forward", (_numel(self.measurement_size), _numel(self.img_size)))

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        r"""Measure.

        :param torch.Tensor x: images of shape ``(B, *img_size)``.
        :param kwargs: ignored.
        :return: measurements of shape ``(B, *measurement_size)``.
        :raises ValueError: for images of another shape.
        """
        return self._multiply(x, "forward", self.img_size, self.measurement_size)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        r"""Apply the exact adjoint.

        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :param kwargs: ignored.
        :return: images of shape ``(B, *img_size)``.
        :raises ValueError: for measurements of another shape.
        """
        return self._multiply(y, "adjoint", self.measurement_size, self.img_size)

    def update_parameters(self, **kwargs: Any) -> None:
        r"""Refuse new parameters of the operator: the matrix would be that of the old ones.

        :param kwargs: parameters; those that the original operator does not have are ignored, as deepinv does.
        :raises ValueError: if the original operator has such a parameter.
        """
        stale = [k for k, v in kwargs.items() if v is not None and any(hasattr(o, k) for o in self._original)]
        if stale:
            raise ValueError(
                f"The matrix is that of fixed {', '.join(stale)}: call SparseLinearPhysics.from_physics again."
            )

    def _fbp(self, y: Tensor, **kwargs: Any) -> Tensor:
        r"""Filtered back-projection by the original's formula, with this adjoint.

        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :return: images of shape ``(B, *img_size)``.
        """
        shadow = copy.copy(self._original[0])
        shadow.A_adjoint = self.A_adjoint
        return shadow.fbp(y, **kwargs)

    def _csr(self, name: str, shape: tuple[int, int]) -> Tensor:
        rows, columns, values = (getattr(self, f"_{name}_{part}") for part in ("rows", "columns", "values"))
        return torch.sparse_csr_tensor(rows, columns, values, size=shape, check_invariants=False)

    def _multiply(self, x: Tensor, name: str, size_in: tuple[int, ...], size_out: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[1:]) != size_in:
            raise ValueError(f"Expected shape (B, {', '.join(map(str, size_in))}), got {tuple(x.shape)}.")
        other = "adjoint" if name == "forward" else "forward"
        matrix = self._csr(name, (_numel(size_out), _numel(size_in)))
        transpose = self._csr(other, (_numel(size_in), _numel(size_out)))
        return _Product.apply(x.flatten(1), matrix, transpose).reshape(-1, *size_out)

    def _agrees(self, x: Tensor, y: Tensor) -> bool:
        with torch.no_grad():
            return bool(torch.linalg.vector_norm(self.A(x) - y) <= _TOLERANCE * torch.linalg.vector_norm(y))


class _Product(torch.autograd.Function):
    r"""``x Mᵀ`` for a constant sparse ``M`` with a known transpose; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        ctx.matrix, ctx.transpose = matrix, transpose
        with torch.autocast(x.device.type, enabled=False):  # which has no sparse products in half precision
            return torch.mm(matrix, x.to(matrix.dtype).t()).t().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(g, ctx.transpose, ctx.matrix), None, None


def _tomography_matrix(physics: Tomography, img_size: tuple[int, ...], m: int) -> Tensor:
    r"""The matrix of a :class:`deepinv.physics.Tomography`: bilinear weights of its rotated grids, summed along rays."""
    radon, side = physics.radon, img_size[-1]
    if _numel(img_size) != side * side:
        return _matrix_by_columns(physics, img_size, m)
    views = len(radon.theta)
    grid = radon.all_grids if radon.parallel_computation else torch.cat(list(radon.all_grids), 2)
    rays, detectors = grid.shape[1], grid.shape[2] // views
    # the same padding as in deepinv's Radon.forward; whoever calls checks the matrix against the operator
    padded, before = side, 0
    if not radon.circle:
        padded = side + int((torch.tensor(2.0).sqrt() * side - side).ceil())
        before = padded // 2 - side // 2
    position = (grid[0].double() + 1) / 2 * (padded - 1) - before  # align_corners=True
    column, row = position[..., 0], position[..., 1]
    ray = torch.arange(views * detectors, device=grid.device)
    measurement = (ray % detectors) * views + ray // detectors  # Radon returns (detectors, views)
    measurement = measurement.expand(rays, -1)
    indices, values = [], []
    for dr in (0, 1):
        for dc in (0, 1):
            r, c = row.floor() + dr, column.floor() + dc
            weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
            if radon.circle:
                weight = weight * (((2 * r / (side - 1) - 1) ** 2 + (2 * c / (side - 1) - 1) ** 2) <= 1)
            inside = (r >= 0) & (r < side) & (c >= 0) & (c < side) & (weight > 0)
            indices.append(torch.stack([measurement[inside], (r * side + c)[inside].long()]))
            values.append(weight[inside])
    value = torch.cat(values)
    if physics.normalize:
        value = value / physics.operator_norm.double()
    matrix = torch.sparse_coo_tensor(torch.cat(indices, 1), value, (m, side * side), check_invariants=False).coalesce()
    return matrix.to(physics.dtype).to_sparse_csr()


def _matrix_by_columns(physics: LinearPhysics, img_size: tuple[int, ...], m: int, chunk: int = 128) -> Tensor:
    r"""The matrix of any operator: its columns are the measurements of unit images."""
    n, like, blocks = _numel(img_size), _like(physics), []
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        unit = like.new_zeros(count, n)
        unit[:, start : start + count].fill_diagonal_(1.0)
        with torch.no_grad():
            blocks.append(physics.A(unit.reshape(-1, *img_size)).reshape(-1, m).to_sparse_coo())
    return torch.cat(blocks).t().coalesce().to_sparse_csr()


def _like(physics: LinearPhysics) -> Tensor:
    r"""A number of the device of an operator, as precise as the most precise of its tensors."""
    like = torch.zeros(())
    for t in (*physics.parameters(), *physics.buffers()):
        if t.is_floating_point():
            like = torch.zeros((), device=t.device, dtype=torch.promote_types(like.dtype, t.dtype))
    return like


def _numel(size: Sequence[int]) -> int:
    return torch.Size(size).numel()
