r"""Sparse-matrix form of linear physics: on CPU, the projections of a CT operator otherwise dominate a training step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor

from deepinv_deq._sparse_matrices import by_columns, check_memory, from_tomography, scalar_like
from deepinv_deq._sparse_parts import parameter_names, parts_of, read_cache, without_grids, write_cache
from deepinv_deq._sparse_products import SparseProducts
from deepinv_deq.states import powers_of_two, times

_TOLERANCE = 1e-5  # relative; of a probe in single precision, whose own rounding is a few 1e-7


class SparseLinearPhysics(SparseProducts):
    r"""Any linear physics with :math:`A` and :math:`A^\top` as sparse matrices (CSR).

    The two matrices are exact transposes of each other, so the adjoint is exact whatever the original's was. The noise
    model, the sensor model, the settings of least-squares solves and the fast inverse ``fbp`` are the original's. Use
    :meth:`from_physics` to make one.

    Images and measurements may be of any type. Integers are converted to the type of the matrix. Real and imaginary parts
    of complex ones are multiplied separately. Half precision is multiplied in single precision.

    :param torch.Tensor matrix: sparse CSR matrix of shape ``(m, n)``, real.
    :param Sequence[int] img_size: shape of one image without batch, ``(C, H, W)``, with ``n`` elements.
    :param Sequence[int] measurement_size: shape of one measurement without batch, with ``m`` elements.
    :param deepinv.physics.LinearPhysics, None original: the operator it stands for.

    :raises ValueError: if the sizes do not fit the matrix, or the matrix is not real.
    """

    _inverse: tuple[LinearPhysics, ...] = ()

    def __init__(
        self,
        matrix: Tensor,
        img_size: Sequence[int],
        measurement_size: Sequence[int],
        original: LinearPhysics | None = None,
    ):
        kept = "noise_model sensor_model max_iter tol solver implicit_backward_solver".split()
        settings = {name: getattr(original, name) for name in kept if hasattr(original, name)}
        super().__init__(matrix, img_size, measurement_size, **settings)
        self._names = frozenset() if original is None else frozenset(parameter_names(original))
        if hasattr(original, "fbp"):
            # in a tuple: its tensors are not those of this operator
            self._inverse = (without_grids(original),)

    @classmethod
    def from_physics(
        cls,
        physics: LinearPhysics,
        img_size: Sequence[int],
        *,
        cache: str | os.PathLike[str] | None = None,
        max_bytes: int = 2 * 2**30,
    ) -> SparseLinearPhysics:
        r"""Measure the matrix of an operator.

        :class:`deepinv.physics.Tomography` is assembled from its interpolation grids, anything else from its columns.
        Either way the result is checked against the operator on a random image.

        :param deepinv.physics.LinearPhysics physics: the operator.
        :param Sequence[int] img_size: shape of one image, ``(C, H, W)``.
        :param str, None cache: file for the matrix: read if there, else written. A file of another operator, or one that was
            changed, is refused. A file that cannot be written is named in a warning.
        :param int max_bytes: memory that building may take, 2 GiB by default.
        :return: the sparse operator, on the device of ``physics``.
        :raises ValueError: if the operator is not linear with real images, needs more memory, or the cache is broken or
            belongs to another operator.

        >>> from deepinv.physics import Tomography
        >>> from deepinv_deq.physics import SparseLinearPhysics
        >>> physics = SparseLinearPhysics.from_physics(Tomography(angles=10, img_width=16, normalize=True), (1, 16, 16))
        >>> physics.A(torch.rand(2, 1, 16, 16)).shape
        torch.Size([2, 1, 23, 10])
        """
        return _from_physics(cls, physics, tuple(img_size), None if cache is None else Path(cache), max_bytes)

    def A_dagger(self, y: Tensor, fbp: bool = False, **kwargs: Any) -> Tensor:
        r"""Solve a least-squares problem, as :class:`deepinv.physics.LinearPhysics` does.

        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :param bool fbp: whether to use the fast inverse of the original operator instead.
        :param kwargs: settings of the solver.
        :return: images of shape ``(B, *img_size)``.
        """
        if fbp:
            return self.fbp(y, **kwargs)
        solve, y = super().A_dagger, self._floating(y)
        unit = powers_of_two(y, usual=True)  # deepinv's solvers add 1e-8 to squared norms
        if isinstance(kwargs.get("init"), Tensor):
            kwargs["init"] = times(1 / unit, self._floating(kwargs["init"]))
        y = times(1 / unit, y)
        if y.is_complex():  # two problems with real unknowns
            return times(unit, torch.complex(solve(y.real, **kwargs), solve(y.imag, **kwargs)))
        return times(unit, solve(y, **kwargs))

    def prox_l2(self, z: Any, y: Tensor, gamma: Any, **kwargs: Any) -> Tensor:
        r"""Proximal operator of the squared error, as that of :class:`deepinv.physics.LinearPhysics`.

        :param torch.Tensor, float, None z: image of shape ``(B, *img_size)``.
        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :param float gamma: weight of the squared error.
        :param kwargs: settings of the solver.
        :return: images of shape ``(B, *img_size)``.
        """
        solve, y = super().prox_l2, self._floating(y)
        if not isinstance(z, Tensor):  # one number for all pixels
            z = torch.full((len(y), *self.img_size), float(z or 0.0), dtype=y.real.dtype, device=y.device)
        z = self._floating(z)
        unit = powers_of_two(y, z, usual=True)
        y, z = times(1 / unit, y), times(1 / unit, z)
        if y.is_complex() or z.is_complex():
            pairs = zip(parts_of(z), parts_of(y), strict=True)
            return times(unit, torch.complex(*(solve(*pair, gamma, **kwargs) for pair in pairs)))
        return times(unit, solve(z, y, gamma, **kwargs))

    def __getattr__(self, name: str) -> Any:
        # not stored as an attribute: a reference cycle would keep the matrix until the garbage collector runs
        return self._fbp if name == "fbp" and self._inverse else super().__getattr__(name)

    def _fbp(self, y: Tensor, **kwargs: Any) -> Tensor:
        r"""Filtered back-projection by the original's formula, with this adjoint.

        :param torch.Tensor y: measurements of shape ``(B, *measurement_size)``.
        :param kwargs: passed on to the original.
        :return: images of shape ``(B, *img_size)``.
        :raises ValueError: for a parameter of the original operator.
        """
        self._refuse_parameters(kwargs)
        shadow = copy.copy(self._inverse[0])
        shadow.A_adjoint = self.A_adjoint
        apply: Callable[[Tensor], Tensor] = lambda part: shadow.fbp(part.to(self._wide), **kwargs).to(part.dtype)  # noqa: E731
        return self._by_parts(apply, y, self.measurement_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinearPhysics:
        super()._apply(fn, recurse)
        self._inverse = copy.deepcopy(self._inverse)  # copies of this operator share it
        for inverse in self._inverse:  # at least in single precision: there is no Fourier transform in half precision
            inverse.to(device=self._forward_values.device, dtype=self._wide)
            for module in inverse.modules():  # deepinv's filters compute in the type that they were made with
                if isinstance(getattr(module, "dtype", None), torch.dtype):
                    module.dtype = self._wide
        return self

    def _agrees(self, x: Tensor, y: Tensor) -> bool:
        with torch.no_grad():
            error = self.A(x) - y
        largest = bool(error.abs().max() <= _TOLERANCE * y.abs().max()) if y.numel() else True
        return largest and bool(torch.linalg.vector_norm(error) <= _TOLERANCE * torch.linalg.vector_norm(y))


def _from_physics(
    cls: type[SparseLinearPhysics], physics: LinearPhysics, img_size: tuple[int, ...], path: Path | None, max_bytes: int
) -> SparseLinearPhysics:
    probe = torch.rand(1, *img_size, generator=torch.Generator().manual_seed(0)).to(scalar_like(physics))
    with torch.no_grad():
        y = physics.A(probe)
    if not isinstance(y, Tensor) or y.is_complex():
        raise ValueError(f"{type(physics).__name__} does not map real images to one real tensor of measurements.")
    m, n = y.numel(), probe.numel()

    def make(matrix: Tensor) -> SparseLinearPhysics | None:
        sparse = cls(matrix, img_size, y.shape[1:], physics).to(probe.device)
        return sparse if sparse._agrees(probe, y) else None

    if path is not None and path.exists():
        matrix = read_cache(path)
        sparse = None
        if tuple(matrix.shape) == (m, n):
            check_memory(physics, (m, n), matrix.values().numel(), matrix.dtype, max_bytes)
            sparse = make(matrix.to(probe.dtype))
        if sparse is None:
            raise ValueError(f"{path} holds the matrix of another operator. Delete it, or name another cache file.")
        return sparse
    sparse = None
    if isinstance(physics, Tomography) and n == physics.img_width**2:
        with suppress(AttributeError):  # a deepinv whose grids are elsewhere
            sparse = make(from_tomography(physics, m, max_bytes))
    sparse = sparse or make(by_columns(physics, img_size, m, max_bytes))
    if sparse is None:
        raise ValueError(f"{type(physics).__name__} does not act as a matrix on images of shape {img_size}.")
    if path is not None:
        write_cache(path, sparse.matrix)
    return sparse
