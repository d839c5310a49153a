r"""The factors of a decomposable physics: deepinv builds the adjoints that are not given."""

from __future__ import annotations

import pytest
import torch
from deepinv.physics import DecomposablePhysics

from deepinv_deq import DEHQS, DEGrad, DEProx
from tests.problems import F64, SmallDenoiser, deq


@pytest.mark.parametrize("kind", [DEProx, DEGrad, DEHQS])
def test_factors_are_trained(kind):
    found = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        left, right = torch.linalg.qr(torch.rand(2, 6, 6, dtype=F64))[0].unbind()
        left, right = left.requires_grad_(), right.requires_grad_()
        given = {"V": lambda x, r=right: x @ r.T, "U_adjoint": lambda x, q=left: x @ q.T} if by_hand else {}
        physics = DecomposablePhysics(
            U=lambda x, q=left: x @ q,
            V_adjoint=lambda x, r=right: x @ r,
            mask=torch.linspace(0.1, 1, 6, dtype=F64),
            img_size=(1, 6, 6),
            **given,
        )
        y = torch.rand(2, 1, 6, 6, dtype=F64)
        x_hat = deq(kind(SmallDenoiser().to(F64), stepsize=0.3))(y, physics)
        found.append((x_hat, *torch.autograd.grad(x_hat.sin().sum(), [left, right])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
