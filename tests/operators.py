r"""Operators that SparseLinearPhysics replaces, each with its sparse matrix."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch

from deepinv_deq.physics import SparseLinearPhysics

SIZE = (1, 16, 16)
OPERATORS = {
    "parallel": lambda: dinv.physics.Tomography(9, 16, normalize=True),
    "unnormalised": lambda: dinv.physics.Tomography(9, 16, normalize=False),
    "odd": lambda: dinv.physics.Tomography(9, 16, normalize=True, parallel_computation=False),
    "circle": lambda: dinv.physics.Tomography(9, 16, normalize=True, circle=True),
    "fan": lambda: dinv.physics.Tomography(
        9, 16, normalize=True, fan_beam=True, fan_parameters={"n_detector_pixels": 30}
    ),
    "unmatched": lambda: dinv.physics.Tomography(9, 16, normalize=True, adjoint_via_backprop=False),
    "boundary": lambda: dinv.physics.Tomography(9, 16, normalize=True, fbp_interpolate_boundary=True),
    "blur": lambda: dinv.physics.Blur(torch.rand(1, 1, 3, 3), padding="circular"),
    "inpainting": lambda: dinv.physics.Inpainting(SIZE, mask=0.5),
    "downsampling": lambda: dinv.physics.Downsampling(img_size=SIZE, factor=2),
}


@pytest.fixture(params=sorted(OPERATORS))
def pair(request):
    torch.manual_seed(0)
    physics = OPERATORS[request.param]()
    return physics, SparseLinearPhysics.from_physics(physics, SIZE), request.param
