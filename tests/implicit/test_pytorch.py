r"""What PyTorch puts around a pass: checkpoints, saved-tensor hooks, inference mode, unfreezing, unused parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
from deepinv.physics import Denoising
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deepinv_deq import DEProx, ModularIDHook, Solver
from tests.implicit.common import ei_loss, gradients, sup_loss
from tests.problems import F64, TEMPLATES, SmallDenoiser, deq, imaging, relative_error, unrolled

LOSSES = [sup_loss, ei_loss]


def exact_gradients(loss, model, physics, y):
    return gradients(loss(lambda y, p: unrolled(model, y, p), y, physics), model, [y])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_model_has_the_exact_gradient(template, loss, reentrant):
    model, physics, _, y = imaging(template)
    y.requires_grad_()
    exact = exact_gradients(loss, model, physics, y)
    kept = lambda y, physics: checkpoint(model, y, physics, use_reentrant=reentrant)  # noqa: E731
    loss(kept, y, physics).backward()  # the reentrant kind knows no torch.autograd.grad
    assert relative_error([p.grad for p in (*model.parameters(), y)], exact) <= 1e-8


def test_checkpoint_of_a_whole_loss_with_a_callable_inside():
    model, physics, _, y = imaging()

    def bare(y, physics):
        f = model.iteration.bind(y, physics)
        return model.hook(lambda x: f(x), model.solver(f, model.iteration.init(y, physics))[0])

    exact = gradients(ei_loss(bare, y, physics), model, [])
    loss = checkpoint(lambda y: ei_loss(bare, y, physics), y, use_reentrant=False)
    assert relative_error(gradients(loss, model, []), exact) <= 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_tensors_may_be_offloaded(loss):
    model, physics, _, y = imaging()
    y.requires_grad_()
    exact = exact_gradients(loss, model, physics, y)
    with torch.autograd.graph.save_on_cpu():
        value = loss(model, y, physics)
    assert relative_error(gradients(value, model, [y]), exact) <= 1e-8


def test_tensors_may_be_packed_by_hooks():
    model, physics, _, y = imaging()
    expected = gradients(ei_loss(model, y, physics), model, [])
    packed = []

    def pack(t):
        packed.append(t.numel())
        return t.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        value = ei_loss(model, y, physics)
    count = len(packed)
    assert relative_error(gradients(value, model, []), expected) <= 1e-12
    assert len(packed) == count > 0  # the graph in the backward pass is not offloaded: it is used at once


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_backward_under_inference_mode_is_exact(bare, mode):
    model, physics, _, y = imaging(mode=mode)

    def loss():
        f = model.iteration.bind(y, physics)
        x_star, _ = model.solver(f, model.iteration.init(y, physics))
        return model.hook((lambda x: f(x)) if bare else f, x_star).sin().sum()

    expected = gradients(loss(), model, [])
    value = loss()
    with torch.inference_mode():
        found = torch.autograd.grad(value, list(model.parameters()))
    assert relative_error(found, expected) <= 1e-12
    model.zero_grad()
    value = loss()
    with torch.inference_mode():
        value.backward()
    assert relative_error([p.grad for p in model.parameters()], expected) <= 1e-12


@pytest.mark.parametrize("frozen", [True, False])
def test_unfreezing_between_forward_and_backward_is_right_or_loud(frozen):
    model, physics, _, y = imaging()
    weight, bias = model.iteration.denoiser.conv.weight, model.iteration.denoiser.conv.bias
    (expected,) = torch.autograd.grad(sup_loss(model, y, physics), bias)
    weight.requires_grad_(not frozen)
    loss = sup_loss(model, y, physics)
    weight.requires_grad_(True)
    try:
        loss.backward()
    except RuntimeError as error:
        assert frozen and "unfreeze it before the forward pass" in str(error)
        return
    assert relative_error(bias.grad, expected) <= 1e-10
    assert frozen == (weight.grad is None)  # the forward pass saw a constant


class Extra(SmallDenoiser):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_parameters_that_nothing_uses_get_no_gradient(create_graph, chunk_size):
    model, physics, _, y = imaging()
    model.iteration.denoiser = Extra().to(F64)
    model.hook.solver = Solver("gmres", max_iter=200, tol=1e-13, chunk_size=chunk_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
        model(y, physics).square().sum().backward(create_graph=create_graph)
    unused = model.iteration.denoiser.unused
    assert unused.grad is None and all(p.grad is not None for p in model.parameters() if p is not unused)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0).step()
    assert unused.tolist() == [1.0, 1.0]


def test_jfb_gives_no_gradient_to_parameters_that_nothing_uses_either():
    model, physics, _, y = imaging(mode="jfb")
    model.iteration.denoiser = Extra().to(F64)
    model(y, physics).square().sum().backward()
    assert model.iteration.denoiser.unused.grad is None


def test_lazy_layers_get_their_shapes_in_the_first_call():
    _, physics, _, y = imaging()

    def build(layer):
        torch.manual_seed(0)
        return deq(DEProx(nn.Sequential(layer, nn.Tanh()), stepsize=0.5))

    lazy = build(nn.LazyConv2d(1, 3, padding=1))
    lazy(y, physics)
    plain = build(nn.Conv2d(1, 1, 3, padding=1))
    plain.load_state_dict(lazy.state_dict())
    found, expected = (gradients(sup_loss(m, y, physics), m, []) for m in (lazy, plain))
    assert relative_error(found, expected) <= 1e-12


def test_hook_may_be_a_subclass():
    class Loud(ModularIDHook):
        def __call__(self, f, x_star, **kwargs):
            self.seen = True
            return super().__call__(f, x_star, **kwargs)

    model, physics, _, y = imaging()
    model.hook = Loud(model.hook.solver)
    model(y, physics).sum().backward()
    assert model.hook.seen and model.hook.stat.converged.all()


class Checkpointed(SmallDenoiser):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def test_reentrant_checkpoints_inside_of_the_iteration_are_named():
    model = deq(DEProx(Checkpointed().to(F64), stepsize=0.5))
    x_hat = model(torch.rand(1, 1, 6, 6, dtype=F64), Denoising())
    with pytest.raises(RuntimeError, match="use_reentrant=True.*Switch it off, or use use_reentrant=False"):
        x_hat.sum().backward()


class WithoutGraph(SmallDenoiser):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_a_network_without_a_graph_is_named(mode):
    model, physics, _, y = imaging(lambda denoiser, **settings: DEProx(WithoutGraph(), **settings), mode=mode)
    with pytest.raises(RuntimeError, match="builds no autograd graph.*torch.no_grad"):
        model(y, physics).sum().backward()
    with torch.no_grad():
        assert model(y, physics).isfinite().all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_operations_of_a_step_can_be_counted(template):
    model, physics, _, y = imaging(template)
    with FlopCounterMode(display=False) as counter:
        model(y, physics).sum().backward()
    assert counter.get_total_flops() > 0
