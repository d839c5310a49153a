r"""Callbacks of DEQReconstructor: every solve is reported."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from deepinv_deq import ConvergenceError, ModularIDHook, Solver
from tests.problems import imaging


def test_every_solve_is_told():
    model, physics, _, y = imaging()
    told = []
    handle = model.on_solve(lambda which, stat: told.append((which, stat)))
    other = model.on_solve(lambda which, stat: told.append(("other", stat)))
    x_hat = model(y, physics)
    assert told == [("forward", model.forward_stat), ("other", model.forward_stat)]
    other.remove()
    model(model.iteration.output(x_hat).flatten(1) @ physics.matrix.T, physics).sum().backward()
    assert [which for which, _ in told[2:]] == ["forward", "backward", "backward"]
    assert told[-1][1] is model.hook.stat and all(stat.converged.all() for _, stat in told)
    handle.remove()
    model(y, physics).sum().backward()
    assert len(told) == 5
    with pytest.raises(TypeError, match="on_solve needs a function"):
        model.on_solve("print")


@pytest.mark.parametrize("where", ["forward", "backward", "tangent"])
def test_solves_that_raise_are_told_first(where):
    model, physics, _, y = imaging()
    failing = {"max_iter": 2, "tol": 1e-12, "on_failure": "raise"}
    if where == "forward":
        model.solver = Solver("anderson", **failing)
    else:
        model.hook = ModularIDHook(Solver("gmres", **failing))
    told = []
    model.on_solve(lambda which, stat: told.append((which, bool(stat.converged.any()))))
    with pytest.raises(ConvergenceError):
        if where == "tangent":
            torch.func.jvp(lambda y: model(y, physics), (y,), (y,))
        model(y, physics).sum().backward()
    assert told[-1] == (where, False)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_begin_without_callbacks(copier):
    model, physics, _, y = imaging()
    told = []
    model.on_solve(lambda which, stat: told.append(which))  # which no pickle could hold
    twin = copier(model)
    twin(y, physics)
    assert told == []
    twin.on_solve(lambda *_: None)
    model(y, physics)
    assert told == ["forward"]


def test_callbacks_are_called_in_the_thread_of_their_solve():
    models = [imaging(seed=s) for s in (0, 1)]
    told = {0: set(), 1: set()}
    for k, (model, *_) in enumerate(models):
        model.on_solve(lambda which, stat, k=k: told[k].add(threading.current_thread().name))

    def train(k):
        model, physics, _, y = models[k]
        for _ in range(3):
            model(y, physics).sum().backward()

    threads = [threading.Thread(target=train, args=(k,), name=f"thread {k}") for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {0: {"thread 0"}, 1: {"thread 1"}}


def test_adjoint_solves_of_every_order_are_told():
    model, physics, _, y = imaging()
    told = []
    model.on_solve(lambda which, stat: told.append(which))
    (first,) = torch.autograd.grad(model(y.requires_grad_(), physics).sin().sum(), y, create_graph=True)
    assert told == ["forward", "backward"]
    first.square().sum().backward()
    assert told[2:] and set(told[2:]) == {"backward"}
