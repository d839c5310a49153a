r"""SparseLinearPhysics: cache files and limits of the size."""

from __future__ import annotations

import deepinv as dinv
import pytest
import torch

from deepinv_deq.files import digests
from deepinv_deq.physics import SparseLinearPhysics
from tests.operators import OPERATORS, SIZE
from tests.problems import MatrixPhysics


def test_cache(tmp_path):
    file, physics = tmp_path / "deep" / "matrix.pt", OPERATORS["parallel"]()
    first = SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    second = SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    x = torch.rand(1, *SIZE)
    assert torch.equal(first.A(x), second.A(x)) and [f.name for f in file.parent.iterdir()] == ["matrix.pt"]
    for other in (dinv.physics.Tomography(8, 16, normalize=True), OPERATORS["unnormalised"]()):
        with pytest.raises(ValueError, match="matrix of another operator"):
            SparseLinearPhysics.from_physics(other, SIZE, cache=file)


# Size -------------------------------------------------------------------------------------------------------------------


def test_matrices_that_are_too_large_are_refused_before_they_are_built(monkeypatch):
    import deepinv_deq._sparse_matrices as module

    physics, built = dinv.physics.Tomography(64, 32, normalize=False), []
    view = module._view
    monkeypatch.setattr(module, "_view", lambda *args: built.append(args) or view(*args))
    whole = SparseLinearPhysics.from_physics(physics, (1, 32, 32))
    assert len(built) == 64 + 8
    built.clear()
    with pytest.raises(ValueError, match=r"matrix of Tomography has at least [\d,]+ entries.*max_bytes = 0.0 GiB. Use"):
        SparseLinearPhysics.from_physics(physics, (1, 32, 32), max_bytes=2**20)
    assert len(built) == 8
    with pytest.raises(ValueError, match="matrix of MatrixPhysics has at least"):
        SparseLinearPhysics.from_physics(MatrixPhysics(torch.randn(300, 256), 16), SIZE, max_bytes=2**20)
    needed = whole.matrix._nnz() * 48
    SparseLinearPhysics.from_physics(physics, (1, 32, 32), max_bytes=int(1.1 * needed))


def test_512_pixels_and_180_views_are_refused_at_the_default_size():
    physics = dinv.physics.Tomography(4, 512, normalize=False, adjoint_via_backprop=True)
    from deepinv_deq import _sparse_matrices as module

    per_view = sum(module._view(physics, i)[1].numel() for i in range(4)) / 4
    with pytest.raises(ValueError, match="to build it takes [45]\\.. GiB, more than max_bytes = 2.0 GiB"):
        module.check_memory(physics, (180 * 725, 512**2), int(180 * per_view), torch.float32, 2 * 2**30)


# Caches -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    physics, file = OPERATORS["parallel"](), tmp_path / "matrix.pt"
    SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    return physics, file


def test_a_cache_with_one_weight_altered_is_refused(cached):
    physics, file = cached
    content = torch.load(file, weights_only=True)
    content["values"][37] *= 1 + 1e-6  # no measurement of an image shows it
    torch.save(content, file)
    with pytest.raises(ValueError, match="matrix.pt cannot be trusted.*digest of 'values' is wrong"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    content["_digest"] = digests({k: v for k, v in content.items() if k != "_digest"})
    content["values"][content["values"].argmax()] *= (
        1.5  # a forger may compute the digest, too: then the operator itself is asked
    )
    content["_digest"] = digests({k: v for k, v in content.items() if k != "_digest"})
    torch.save(content, file)
    with pytest.raises(ValueError, match="matrix of another operator"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)


def forge(**changes):
    def apply(content):
        content = {k: v for k, v in content.items() if k != "_digest"} | changes
        return content | {"_digest": digests(content)}

    return apply


FORGED = {
    "of an older version": lambda c: torch.sparse_csr_tensor(c["rows"], c["columns"], c["values"], c["size"]),
    "without a digest": lambda c: {k: v for k, v in c.items() if k != "_digest"},
    "of a denoiser": forge(values={"a": 1}),
    "of no size": forge(size="large"),
    "of complex values": lambda c: forge(values=c["values"] + 0j)(c),
    "with columns outside": lambda c: forge(columns=c["columns"] + 10**6)(c),
    "with negative columns": lambda c: forge(columns=-c["columns"])(c),
    "with rows outside": lambda c: forge(rows=c["rows"] * 3)(c),
    "with rows of floats": lambda c: forge(rows=c["rows"].float())(c),
    "of a huge size": forge(size=(2**40, 2**40)),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_caches_name_the_file(cached, kind):
    physics, file = cached
    torch.save(FORGED[kind](torch.load(file, weights_only=True)), file)
    with pytest.raises(ValueError, match="matrix.pt"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    file.write_bytes(b"not a matrix")
    with pytest.raises(ValueError, match="matrix.pt cannot be trusted"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file)
    with pytest.raises(ValueError, match="not a regular file"):
        SparseLinearPhysics.from_physics(physics, SIZE, cache=file.parent)


def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_matrix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="The matrix is not cached: .*file"):
        sparse = SparseLinearPhysics.from_physics(OPERATORS["parallel"](), SIZE, cache=tmp_path / "file" / "matrix.pt")
    assert sparse.A(torch.rand(1, *SIZE)).shape[1:] == sparse.measurement_size
