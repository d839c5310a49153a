r"""Private names of other libraries: without each of them, import and training go on."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from deepinv_deq import compat
from deepinv_deq.distributed import SynchronisedDenoiser
from deepinv_deq.solvers import available_methods
from tests.implicit.common import ei_loss, gradients
from tests.problems import imaging, relative_error, unrolled

NAMES = [
    "torch._functorch.config",
    "torch._dynamo.config",
    "torch.compiler.disable",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._remove_batch_dim",
    "torch._add_batch_dim",
    "torch._C._vmapmode_increment_nesting",
    "torch._C._vmapmode_decrement_nesting",
    "torch._dynamo.eval_frame.OptimizedModule",
    "torch._dynamo.eval_frame._TorchDynamoContext",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.nn.Module._replicate_for_data_parallel",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.utils.spectral_norm.SpectralNorm",
    "torch.nn.utils.weight_norm.WeightNorm",
    "torch.nn.utils.prune.BasePruningMethod",
    "torchdeq.solver._solvers",
    "deepinv.distributed.framework.DistributedProcessing",
    "deepinv.distributed.framework.DistributedReplicatedParameters",
    "deepinv.distributed.framework.distributed_utils.DistributedGradientSync",
]


def owner_of(path):
    owner, _, name = path.rpartition(".")
    return compat.find(owner), name


def forget(monkeypatch, path):
    owner, name = owner_of(path)
    assert hasattr(owner, name), f"{path} is gone: the test of its absence says nothing"
    monkeypatch.delattr(owner, name)
    if path in sys.modules:
        monkeypatch.setitem(sys.modules, path, None)


@pytest.mark.parametrize("path", NAMES)
def test_training_step_without_a_private_name(path, monkeypatch):
    model, physics, _, y = imaging()
    exact = gradients(ei_loss(lambda y, p: unrolled(model, y, p), y, physics), model, [])
    forget(monkeypatch, path)
    assert relative_error(gradients(ei_loss(model, y, physics), model, []), exact) <= 1e-8


def test_import_without_any_of_them():
    code = f"""
        import deepinv, importlib, torchdeq, torch, torch._dynamo, sys, warnings
        for path in {NAMES!r}:
            owner, _, name = path.rpartition(".")
            try:
                found = importlib.import_module(owner)
            except ImportError:  # a class
                outer, _, kind = owner.rpartition(".")
                found = getattr(importlib.import_module(outer), kind)
            delattr(found, name)
            if path in sys.modules:
                sys.modules[path] = None
        import deepinv_deq
        from deepinv.physics import Denoising
        from deepinv_deq import DEProx, DEQReconstructor, Solver, ModularIDHook
        model = DEQReconstructor(DEProx(torch.nn.Conv2d(1, 1, 3, padding=1), stepsize=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.rand(1, 1, 8, 8), Denoising()).square().mean().backward()
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        print("trained")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "trained", done.stderr


def test_forward_mode_without_its_switch_is_the_same(monkeypatch):
    model, physics, _, y = imaging()
    v = torch.randn_like(y)

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(y, v), physics)).tangent

    expected = tangent()
    monkeypatch.delattr(forward_ad, "_set_fwd_grad_enabled")
    assert relative_error(tangent(), expected) <= 1e-10


def test_forward_mode_is_seen_without_its_counter(monkeypatch):
    monkeypatch.setattr(compat, "forward_ad", types.SimpleNamespace(make_dual=forward_ad.make_dual))
    assert not compat.forward_mode()
    with forward_ad.dual_level():
        assert compat.forward_mode()


def test_compiled_models_are_the_feature_that_is_lost(monkeypatch):
    monkeypatch.delattr(torch.compiler, "disable")
    function = lambda: 3  # noqa: E731
    assert compat.outside_of_compiled_graphs(function) is function


def test_missing_names_are_found_to_be_missing():
    assert compat.find("torch.nn.nothing") is None and compat.find("no_such_package.name") is None
    assert compat.find("torch.nn.Linear") is torch.nn.Linear
    assert "anderson" in compat.registered_solvers() and None not in compat.distributed_framework()
    norms, drops = compat.layers_that_change()
    assert issubclass(torch.nn.BatchNorm2d, norms) and issubclass(torch.nn.Dropout, drops)


def test_fallbacks_are_the_public_classes(monkeypatch):
    for name in ("batchnorm._BatchNorm", "batchnorm._NormBase", "dropout._DropoutNd"):
        forget(monkeypatch, f"torch.nn.modules.{name}")
    norms, drops = compat.layers_that_change()
    assert issubclass(torch.nn.SyncBatchNorm, norms) and issubclass(torch.nn.Dropout3d, drops)
    statistics = compat.layers_with_statistics()
    assert issubclass(torch.nn.InstanceNorm2d, statistics) and issubclass(torch.nn.BatchNorm3d, statistics)
    forget(monkeypatch, "torchdeq.solver._solvers")
    assert "anderson" in available_methods()
    forget(monkeypatch, "deepinv.distributed.framework.DistributedProcessing")
    with pytest.raises(RuntimeError, match="version 0.5 has it"):
        SynchronisedDenoiser(torch.nn.Identity())


def test_pieces_of_sparse_tensors_and_versions_without_their_names():
    t = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse()
    hidden = types.SimpleNamespace(coalesce=t.coalesce, is_inference=lambda: False)
    for a, b in zip(compat.sparse_pieces(hidden), compat.sparse_pieces(t), strict=True):
        torch.testing.assert_close(a, b)
    assert compat.version(hidden) is None and compat.version(torch.zeros(1).add_(1)) == 1
