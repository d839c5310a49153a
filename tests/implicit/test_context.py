r"""The circumstances of a backward pass: threads, inference mode, compiled graphs."""

from __future__ import annotations

import contextvars
import importlib

import pytest
import torch

from deepinv_deq import ConvergenceWarning, Solver
from tests.implicit.common import ei_loss, gradients, sup_loss
from tests.problems import imaging, relative_error, small_deq, unrolled


def test_context_of_the_thread_does_not_grow():
    importlib.import_module("torch._dynamo")  # the optimisers of PyTorch import it
    model, physics, _, y = imaging()
    sup_loss(model, y, physics).backward()
    size = len(contextvars.copy_context())
    for _ in range(3):
        sup_loss(model, y, physics).backward()
    assert len(contextvars.copy_context()) == size


def step(model, physics, y):
    x_hat = model(y, physics)
    return torch.autograd.grad(x_hat.float().square().sum(), list(model.parameters()))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_iteration_gives_the_same_gradient(whole):
    model, physics, y = small_deq()
    exact = step(model, physics, y)
    torch._dynamo.reset()
    # the graph is captured and differentiated ahead of time, without a C++ compiler, which a machine may lack
    (model.iteration if whole else model.iteration.denoiser).compile(backend="aot_eager")
    assert relative_error(step(model, physics, y), exact) <= 1e-4
    torch._dynamo.reset()


def test_compiled_graphs_of_backward_are_for_many_products_and_one_batch_size():
    compiler, dynamo = torch._functorch.config, torch._dynamo.config
    if not hasattr(compiler, "donated_buffer"):
        pytest.skip("this PyTorch gives no buffers away")
    model, physics, y = small_deq()
    seen = set()
    model.iteration.denoiser.register_forward_pre_hook(
        lambda *_: seen.add((torch.is_grad_enabled(), compiler.donated_buffer, dynamo.automatic_dynamic_shapes))
    )
    before = compiler.donated_buffer, dynamo.automatic_dynamic_shapes
    step(model, physics, y)
    assert seen == {(False, *before), (True, False, False)}
    assert (compiler.donated_buffer, dynamo.automatic_dynamic_shapes) == before


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_gives_nearly_the_same_gradient(dtype, tolerance):
    model, physics, y = small_deq()
    exact = step(model, physics, y)
    model.solver = Solver("anderson", max_iter=30, tol=1e-2)
    model.hook.solver = Solver("gmres", tol=1e-5)
    with torch.autocast("cpu", dtype=dtype):
        x_hat = model(y, physics)
    with pytest.warns(ConvergenceWarning, match=f"products in {str(dtype)[6:]} cannot reach 1.0e-05"):
        torch.autograd.grad(x_hat.float().square().sum(), list(model.parameters()), retain_graph=True)
    model.hook.solver = Solver("gmres", tol=1e-2)
    rough = torch.autograd.grad(x_hat.float().square().sum(), list(model.parameters()))
    assert relative_error(rough, exact) <= tolerance


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="PyTorch 2.4 compiles replicas anew in every pass")
def test_compiled_graphs_survive_the_pass():
    model, physics, y = small_deq()
    compiled = []
    model.iteration.denoiser.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    for _ in range(4):
        step(model, physics, y)
        compiled.append(None)
    after_first = compiled[compiled.index(None) :]
    assert not any(graph is not None for graph in after_first)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole_loss", [False, True])
def test_compiled_model_has_the_gradient_of_an_eager_one(backend, whole_loss):
    model, physics, _, y = imaging()
    exact = gradients(ei_loss(lambda y, p: unrolled(model, y, p), y.requires_grad_(), physics), model, [y])
    torch._dynamo.reset()
    if whole_loss:
        value = torch.compile(lambda y: ei_loss(model, y, physics), backend=backend)(y)
    else:
        value = ei_loss(torch.compile(model, backend=backend), y, physics)
    assert relative_error(gradients(value, model, [y]), exact) <= 1e-8
    torch._dynamo.reset()
