r"""SparseLinearPhysics: data types, precisions and devices."""

from __future__ import annotations

import copy
import gc
import weakref

import deepinv as dinv
import pytest
import torch

from deepinv_deq.physics import SparseLinearPhysics
from tests.operators import OPERATORS, SIZE
from tests.problems import MatrixPhysics, relative_error


def test_an_operator_in_double_precision_gives_a_matrix_in_double_precision():
    physics = dinv.physics.Tomography(
        torch.arange(9, dtype=torch.float64) * 20, 16, normalize=False, adjoint_via_backprop=True, dtype=torch.float64
    )
    x = torch.rand(2, *SIZE, dtype=torch.float64)
    for operator in (physics, MatrixPhysics(torch.rand(30, 256, dtype=torch.float64), 16)):
        sparse = SparseLinearPhysics.from_physics(operator, SIZE)
        y = operator.A(x)
        assert sparse.A(x).dtype == torch.float64 and relative_error(sparse.A(x), y) <= 1e-13
        assert relative_error(sparse.A_adjoint(y), operator.A_adjoint(y)) <= 1e-13


def test_autocast_leaves_the_products_alone():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.rand(2, *SIZE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse.A(x)
        (g,) = torch.autograd.grad(sparse.A_adjoint(y).sum(), x)
    assert y.dtype == g.dtype == torch.float32
    torch.testing.assert_close(y, sparse.A(x), rtol=0, atol=0)


# Types, devices ---------------------------------------------------------------------------------------------------------


def test_integers_are_converted_to_the_type_of_the_matrix():
    sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.randint(0, 256, (2, *SIZE), generator=torch.Generator().manual_seed(0))
    y = sparse.A(x.float())
    counts = (1000 * y).round()
    for dtype in (torch.uint8, torch.int16, torch.int64):
        assert torch.equal(sparse.A(x.to(dtype)), y)
    assert torch.equal(sparse.A(x > 128), sparse.A((x > 128).float()))
    for method in (sparse.A_adjoint, sparse.fbp, sparse.A_dagger, lambda y: sparse.prox_l2(0.0, y, 1.0)):
        assert torch.equal(method(counts.int()), method(counts)) and method(counts.int()).dtype == torch.float32
    assert torch.equal(sparse.prox_l2(x, counts.int(), 1.0), sparse.prox_l2(x.float(), counts, 1.0))


def test_complex_images_are_multiplied_part_by_part():
    dense = torch.randn(7, 9, dtype=torch.float64)
    sparse = SparseLinearPhysics.from_physics(MatrixPhysics(dense, 3), (1, 3, 3)).double()
    x = torch.randn(2, 1, 3, 3, dtype=torch.complex128, requires_grad=True)
    y = sparse.A(x)
    torch.testing.assert_close(y, x.flatten(1) @ dense.T.to(x.dtype))
    torch.testing.assert_close(sparse.A_adjoint(y).flatten(1), y @ dense.to(x.dtype))
    assert torch.autograd.gradcheck(sparse.A, x)
    tomograph = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
    x = torch.randn(2, *SIZE, dtype=torch.complex64)
    y = tomograph.A(x)
    torch.testing.assert_close(tomograph.fbp(y), torch.complex(tomograph.fbp(y.real), tomograph.fbp(y.imag)))
    prox = tomograph.prox_l2(x, y, 2.0, max_iter=200, tol=1e-7)
    normal = prox - x + 2.0 * tomograph.A_adjoint(tomograph.A(prox) - y)
    assert normal.abs().max() <= 1e-5 and relative_error(prox, x) <= 1e-5  # y = Ax: x is its own proximal point


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-13)])
def test_other_precisions_lose_no_more_than_they_must(dtype, bound):
    dense = torch.rand(30, 256, dtype=torch.float64)
    for made in (dense, dense.float()):
        sparse = SparseLinearPhysics.from_physics(MatrixPhysics(made, 16), SIZE)
        x = torch.rand(2, *SIZE, dtype=torch.float64)
        y = x.flatten(1) @ made.double().T
        for operator in (sparse, copy.deepcopy(sparse).to(dtype)):
            found = operator.A(x.to(dtype))
            assert found.dtype == dtype
            held = operator.matrix.dtype  # no input is rounded to the type of the matrix
            assert relative_error(found.double(), y) <= max(
                bound, 5e-3 if held == torch.float16 else 0, 3e-2 * (held == torch.bfloat16)
            )


@pytest.mark.parametrize("name", ["parallel", "unnormalised", "odd", "circle", "fan", "boundary", "unmatched"])
def test_fbp_follows_moves_and_leaves_the_original_alone(name):
    physics = OPERATORS[name]()
    tensors = {k: (v.dtype, v.data_ptr()) for k, v in physics.named_buffers()}
    sparse = SparseLinearPhysics.from_physics(physics, SIZE)
    y = physics.A(torch.rand(2, *SIZE))
    expected = sparse.fbp(y)
    assert expected.dtype == torch.float32
    assert relative_error(sparse.half().fbp(y.half()).float(), expected) <= 2e-2
    sparse = SparseLinearPhysics.from_physics(physics, SIZE).double()
    found = sparse.fbp(y.double())
    assert found.dtype == torch.float64 and relative_error(found, expected.double()) <= 1e-5
    assert relative_error(copy.deepcopy(sparse).fbp(y.double()), found) == 0
    assert {k: (v.dtype, v.data_ptr()) for k, v in physics.named_buffers()} == tensors


def test_fbp_in_double_precision_is_that_of_an_operator_in_double_precision():
    angles = torch.arange(9) * 20.0
    made = {"normalize": False, "adjoint_via_backprop": True}
    exact = dinv.physics.Tomography(angles.double(), 16, dtype=torch.float64, **made)
    y = exact.A(torch.rand(2, *SIZE, dtype=torch.float64))
    sparse = SparseLinearPhysics.from_physics(exact, SIZE)
    assert relative_error(sparse.fbp(y), exact.fbp(y)) <= 1e-12
    moved = SparseLinearPhysics.from_physics(dinv.physics.Tomography(angles, 16, **made), SIZE).double()
    assert relative_error(moved.fbp(y), exact.fbp(y)) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_devices(made_on):
    physics = dinv.physics.Tomography(9, 16, normalize=True, device=made_on)
    sparse = SparseLinearPhysics.from_physics(physics, SIZE)
    assert sparse.matrix.device.type == made_on
    x = torch.rand(2, *SIZE)
    y = physics.A(x.to(made_on)).cpu()
    for device in ("cuda", "cpu", "cuda"):
        sparse = sparse.to(device)
        assert relative_error(sparse.A(x.to(device)).cpu(), y) <= 1e-5
        assert relative_error(sparse.fbp(y.to(device)).cpu(), physics.fbp(y.to(made_on)).cpu()) <= 1e-4
        assert sparse.A_dagger(y.to(device)).device.type == device
        assert sparse.A_adjoint(y.to(device)).device.type == device


def test_an_operator_is_freed_without_the_garbage_collector():
    # the replicas of each pass hold its tensors, and may hold copies of them
    gc.collect()
    gc.disable()
    try:
        sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE)
        sparse.fbp(sparse.A(torch.rand(1, *SIZE)))
        gone = weakref.ref(sparse)
        del sparse
        assert gone() is None
    finally:
        gc.enable()


def test_an_operator_has_fbp_where_the_original_has():
    sparse = SparseLinearPhysics.from_physics(MatrixPhysics(torch.rand(30, 256), 16), SIZE)
    with pytest.raises(AttributeError, match="no attribute 'fbp'"):
        sparse.fbp(sparse.A(torch.rand(1, *SIZE)))
    sparse.fbp = sparse.A_adjoint  # a user's own
    assert sparse.fbp == sparse.A_adjoint
    assert hasattr(SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE), "fbp")
