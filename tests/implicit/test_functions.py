r"""Passes and their graphs: repeatable, without state, of the physics of the forward pass (contracts 3, 5, 6 and 8)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from deepinv_deq import Solver
from tests.implicit.common import ei_loss, gradients, sup_loss
from tests.problems import (
    imaging,
    relative_error,
)


@pytest.mark.parametrize("mode", ["implicit", "jfb"])
def test_backward_twice_gives_the_same_gradient(mode):
    model, physics, _, y = imaging(mode=mode)
    loss = ei_loss(model, y, physics)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bare", [False, True])
def test_forward_passes_before_one_backward_are_independent(bare):
    model, physics, x, _ = imaging()
    ys = [physics.A(x * s) for s in (0.5, 1.0, 1.5)]

    def reconstruct(y):
        if not bare:
            return model(y, physics)
        f = lambda x, g=model.iteration.bind(y, physics): g(x)  # noqa: E731
        return model.hook(f, model.solver(f, model.iteration.init(y, physics))[0])

    together = torch.autograd.grad(sum(reconstruct(y).sin().sum() for y in ys), list(model.parameters()))
    apart = [torch.autograd.grad(reconstruct(y).sin().sum(), list(model.parameters())) for y in ys]
    assert relative_error(together, [sum(parts) for parts in zip(*apart, strict=True)]) <= 1e-12


def test_graph_of_the_iteration_lives_in_backward_only():
    model, physics, _, y = imaging()
    alive = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if torch.is_grad_enabled() or x.requires_grad:
                token = x.new_zeros(1)
                ctx.token = token
                alive.append(weakref.ref(token))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    inner = model.iteration.denoiser
    model.iteration.denoiser = nn.Sequential(inner)
    inner.register_forward_hook(lambda m, i, out: Probe.apply(out))
    loss = ei_loss(model, y, physics)
    gc.collect()
    assert not [r for r in alive if r() is not None]
    gc.disable()  # what backward taped must go at once, not when the garbage collector finds it
    try:
        loss.backward()
        left = [r for r in alive if r() is not None]
    finally:
        gc.enable()
    assert len(alive) == 2  # one taped evaluation for each of the two passes
    assert not left


def test_evaluation_mode_costs_the_solver_and_nothing_more():
    model, physics, _, y = imaging()
    calls = []
    model.iteration.denoiser.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(y, physics)
    assert len(calls) == model.forward_stat.evaluations


def test_state_dict_has_nothing_of_a_solve():
    model, physics, _, y = imaging()
    before = set(model.state_dict())
    ei_loss(model, y, physics).backward()
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_used_model_work(copier):
    model, physics, _, y = imaging()
    expected = gradients(ei_loss(model, y, physics), model, [])
    twin = copier(model)
    assert relative_error(gradients(ei_loss(twin, y, physics), twin, []), expected) <= 1e-12


def test_dtype_changes_and_reload():
    model, physics, _, y = imaging()
    expected = gradients(ei_loss(model, y, physics), model, [])
    model.float()
    model.solver = Solver("anderson", max_iter=300, tol=1e-6)
    model.hook.solver = Solver("gmres", max_iter=200, tol=1e-6)
    single = gradients(ei_loss(model, y.float(), copy.deepcopy(physics).float()), model, [])
    assert single[0].dtype == torch.float32 and relative_error(single, expected) <= 1e-3
    other, *_ = imaging(seed=5)
    other.load_state_dict(imaging()[0].state_dict())
    assert relative_error(gradients(ei_loss(other, y, physics), other, []), expected) <= 1e-12


def test_objects_do_not_survive_a_step():
    model, physics, _, y = imaging()

    def live_tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(5):
        model.zero_grad(set_to_none=True)
        ei_loss(model, y, physics).backward()
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1


def test_gradient_is_of_the_physics_at_forward_time():
    model, physics, _, y = imaging()
    expected = gradients(sup_loss(model, y, physics), model, [])
    loss = sup_loss(model, y, physics)
    other = torch.randn_like(physics.matrix)
    physics.update(matrix=other)
    assert torch.equal(physics.matrix, other)
    assert relative_error(gradients(loss, model, []), expected) <= 1e-12
    assert torch.equal(physics.matrix, other)  # and the user's physics is as they left it


@pytest.mark.parametrize("frozen", [False, True])
def test_weight_changed_in_place_is_an_error(frozen):
    model, physics, _, y = imaging()
    weight = model.iteration.denoiser.conv.weight.requires_grad_(not frozen)
    loss = sup_loss(model, y.requires_grad_(), physics)
    with torch.no_grad():
        weight.mul_(3)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        loss.backward()


def test_weight_frozen_after_the_forward_pass_changes_nothing():
    model, physics, _, y = imaging()
    weight, bias = model.iteration.denoiser.conv.weight, model.iteration.denoiser.conv.bias
    expected = torch.autograd.grad(sup_loss(model, y, physics), bias)
    loss = sup_loss(model, y, physics)
    weight.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(loss, bias), expected)


def test_map_bound_without_gradients_is_not_trained_in_silence():
    model, physics, _, y = imaging()
    with torch.no_grad():
        f = model.iteration.bind(y, physics)
        x_star, _ = model.solver(f, model.iteration.init(y, physics))
        assert model.hook(f, x_star) is x_star
    with pytest.raises(RuntimeError, match="bound under torch.no_grad"):
        model.hook(f, x_star)


def test_physics_changed_in_place_is_an_error():
    model, physics, _, y = imaging()
    loss = sup_loss(model, y, physics)
    physics.matrix.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()
