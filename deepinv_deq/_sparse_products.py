r"""A pair of sparse matrices, transposes of each other, as the two maps of a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from deepinv_deq._sparse_matrices import csr, transpose


class SparseProducts(LinearPhysics):
    r"""Products with a sparse matrix and its transpose, for tensors of any type.

    :param torch.Tensor matrix: sparse CSR matrix of shape ``(m, n)``, real.
    :param Sequence[int] img_size: shape of one image without batch, with ``n`` elements.
    :param Sequence[int] measurement_size: shape of one measurement without batch, with ``m`` elements.
    :param settings: further arguments of :class:`deepinv.physics.LinearPhysics`.
    """

    _names: frozenset[str] = frozenset()  # of the parameters of the operator whose matrix this is

    def __init__(self, matrix: Tensor, img_size: Sequence[int], measurement_size: Sequence[int], **settings: Any):
        super().__init__(img_size=tuple(img_size), **settings)
        self.img_size, self.measurement_size = tuple(img_size), tuple(measurement_size)
        expected = (_numel(self.measurement_size), _numel(self.img_size))
        if tuple(matrix.shape) != expected:
            raise ValueError(f"The matrix has shape {tuple(matrix.shape)}, but the sizes ask for {expected}.")
        if not matrix.is_floating_point():
            raise ValueError(f"The matrix must be real, and has values of type {matrix.dtype}.")
        matrix = csr(matrix.crow_indices(), matrix.col_indices(), matrix.values(), expected)
        for name, m in (("forward", matrix), ("adjoint", transpose(matrix))):
            # plain buffers, because modules can move and copy those
            self.register_buffer(f"_{name}_rows", m.crow_indices(), persistent=False)
            self.register_buffer(f"_{name}_columns", m.col_indices(), persistent=False)
            self.register_buffer(f"_{name}_values", m.values(), persistent=False)

    @property
    def matrix(self) -> Tensor:
        r"""The matrix :math:`A`, sparse CSR of shape ``(m, n)``."""
        return self._csr("forward")()

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        r"""Measure.

        :param torch.Tensor x: images of shape ``(B, *img_size)``.
        :param kwargs: parameters, see :meth:`update_parameters`.
        :return: measurements of shape ``(B, *measurement_size)``.
        :raises ValueError: for images of another shape, or a parameter of the original operator.
        """
        self._refuse_parameters(kwargs)
        return self._by_parts(lambda part: self._multiply(part, "forward"), x, self.img_size)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        r"""Apply the exact adjoint.

        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :param kwargs: parameters, see :meth:`update_parameters`.
        :return: images of shape ``(B, *img_size)``.
        :raises ValueError: for measurements of another shape, or a parameter of the original operator.
        """
        self._refuse_parameters(kwargs)
        return self._by_parts(lambda part: self._multiply(part, "adjoint"), y, self.measurement_size)

    def update_parameters(self, **kwargs: Any) -> None:
        r"""Refuse new parameters of the operator: the matrix would be that of the old ones.

        :param kwargs: parameters; those that the original operator does not have are ignored, as deepinv does.
        :raises ValueError: if the original operator has such a parameter.
        """
        stale = [k for k, v in kwargs.items() if v is not None and k in self._names]
        if stale:
            raise ValueError(
                f"The matrix is that of fixed {', '.join(stale)}: call SparseLinearPhysics.from_physics again."
            )

    def _refuse_parameters(self, kwargs: dict[str, Any]) -> None:
        r"""Raise for parameters in a call that deepinv's operators would take: those that are tensors."""
        self.update_parameters(**{name: value for name, value in kwargs.items() if isinstance(value, Tensor)})

    def _csr(self, name: str) -> Callable[[], Tensor]:
        r"""A function that makes one of the matrices: inside of transforms of :mod:`torch.func`, none can be made."""
        size = (_numel(self.measurement_size), _numel(self.img_size))
        rows, columns, values = (getattr(self, f"_{name}_{part}") for part in ("rows", "columns", "values"))
        return lambda: csr(rows, columns, values, size if name == "forward" else size[::-1])

    def _floating(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() or x.is_complex() else x.to(self._forward_values.dtype)

    def _by_parts(self, linear: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[1:]) != size:
            raise ValueError(f"Expected shape (B, {', '.join(map(str, size))}), got {tuple(x.shape)}.")
        if not x.is_complex():
            return linear(self._floating(x))
        real, imaginary = linear(torch.cat([x.real, x.imag])).chunk(2)
        return torch.complex(real, imaginary)

    def _multiply(self, x: Tensor, name: str) -> Tensor:
        matrix, transposed = self._csr(name), self._csr("adjoint" if name == "forward" else "forward")
        size = self.measurement_size if name == "forward" else self.img_size
        return Product.apply(x.flatten(1), Pair(matrix, transposed)).reshape(-1, *size)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self._forward_values.dtype)


class Product(torch.autograd.Function):
    r"""``x Mᵀ`` for a constant sparse ``M`` with a known transpose, a :class:`Pair`; differentiable any number of times, also in
    forward mode and under ``vmap``."""

    @staticmethod
    def forward(x: Tensor, pair: Pair) -> Tensor:
        # no sparse products in half precision; nothing of double precision is lost
        matrix = pair.matrix()
        dtype = torch.promote_types(torch.promote_types(x.dtype, matrix.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return torch.mm(matrix.to(dtype), x.to(dtype).t()).t().to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Pair], output: Tensor) -> None:
        ctx.pair = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return Product.apply(g, Pair(ctx.pair.transpose, ctx.pair.matrix)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return Product.apply(tangent, ctx.pair)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, pair: Pair) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return Product.apply(x.flatten(0, 1), pair).reshape(*x.shape[:2], -1), 0


@dataclass(frozen=True)
class Pair:
    r"""Functions that make a sparse matrix and its transpose."""

    matrix: Callable[[], Tensor]
    transpose: Callable[[], Tensor]


def _numel(size: Sequence[int]) -> int:
    return torch.Size(size).numel()
