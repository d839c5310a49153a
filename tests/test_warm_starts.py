r"""Fixed points remembered by sample: found again, bounded, forgotten by copies, never in the way."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import deepinv as dinv
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinv_deq import DEQReconstructor, Solver
from deepinv_deq.warm_starts import _SEEN, WarmStarts, digests
from tests.problems import imaging


def remembering(capacity=4):
    model, physics, x, y = imaging()
    return DEQReconstructor(model.iteration, solver=model.solver, hook=model.hook, warm_starts=capacity), physics, x, y


def test_the_third_epoch_starts_at_the_fixed_point():
    model, physics, _, y = remembering()
    work, results = [], []
    for _ in range(3):
        results.append(model(y, physics))
        work.append(model.forward_stat.work)
    assert work[0] == work[1] and work[2] < work[0] / 3
    torch.testing.assert_close(results[2], results[0])


def test_samples_are_found_in_any_order_and_company():
    model, physics, _, y = remembering()
    for _ in range(2):
        model(y, physics)
    cold = model.forward_stat["nstep"]
    new = torch.randn_like(y[:1])
    model(torch.cat([y[1:], new, y[:1]]), physics)
    steps = model.forward_stat["nstep"]
    assert steps[0] < cold[1] / 3 and steps[2] < cold[0] / 3 and steps[1] > 3 * steps[0]


def test_the_gradient_is_that_of_a_cold_start():
    model, physics, x, y = remembering()
    grads = []
    for _ in range(3):
        loss = (model(y, physics) - x).square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for cold, warm in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(warm, cold, rtol=1e-6, atol=1e-9)


def test_only_training_without_an_init_remembers():
    model, physics, x, y = remembering()
    model.eval()
    for _ in range(3):
        model(y, physics)
    model.train()
    for _ in range(3):
        model(y, physics, init=torch.zeros_like(x))
    assert len(model._warm_starts) == 0
    plain = imaging()[0]
    for _ in range(3):
        plain(y, physics)
    assert len(plain._warm_starts) == 0


def test_measurements_that_never_come_again_take_no_place():
    model, physics, _, y = remembering(capacity=2)
    for _ in range(10):
        model(y, physics)
        model(torch.randn_like(y), physics)
    assert len(model._warm_starts) == 2 and len(model._warm_starts._seen) <= 2 * _SEEN
    model(y, physics)
    assert model.forward_stat.evaluations <= 2


def test_copies_and_files_are_empty():
    model, physics, _, y = remembering()
    for _ in range(2):
        model(y, physics)
    assert len(model._warm_starts) == 2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other._warm_starts) == 0 and other._warm_starts.capacity == 4
    assert model.state_dict().keys() == imaging()[0].state_dict().keys()


def test_other_weights_still_converge_from_what_was_kept():
    model, physics, _, y = remembering()
    for _ in range(2):
        model(y, physics)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    warm = model(y, physics)
    assert model.forward_stat.converged.all()
    torch.testing.assert_close(warm, copy.deepcopy(model)(y, physics))


def test_another_shape_of_state_is_no_start():
    known = WarmStarts(4)
    keys, good = [b"a", b"b"], torch.tensor([0.1, 0.2])
    for _ in range(2):
        known.keep(keys, torch.ones(2, 3), good)
    cold = torch.zeros(2, 4)
    torch.testing.assert_close(known.start(keys, cold), cold)
    torch.testing.assert_close(known.start(keys, torch.zeros(2, 3, dtype=torch.float64)), torch.ones(2, 3).double())
    torch.testing.assert_close(known.start([b"b", b"c"], torch.zeros(2, 3)), torch.tensor([[1.0] * 3, [0.0] * 3]))


def test_an_empty_batch_starts_and_ends_empty():
    known, empty = WarmStarts(4), torch.zeros(0, 3)
    assert known.start(known.keys(empty), empty).shape == (0, 3)
    known.keep([], empty, torch.zeros(0))
    assert len(known) == 0


def test_states_of_several_tensors():
    known = WarmStarts(2)
    state = torch.ones(2, 3), torch.full((2, 1), 2.0)
    for _ in range(2):
        known.keep([b"a", b"b"], state, torch.tensor([0.1, torch.inf]))
    first, second = known.start([b"a", b"b"], (torch.zeros(2, 3), torch.zeros(2, 1)))
    assert first[:, 0].tolist() == [1, 0] and second[:, 0].tolist() == [2, 0]


@pytest.mark.parametrize("capacity", [-1, 1.5, True, "all"])
def test_a_capacity_is_a_number_of_samples(capacity):
    with pytest.raises(ValueError, match=f"warm_starts.*{capacity!r}"):
        DEQReconstructor(imaging()[0].iteration, warm_starts=capacity)


def test_threads_may_share_it():
    before, known = sys.getswitchinterval(), WarmStarts(2)
    x, residual = torch.rand(4, 1, 2, 2), torch.zeros(4)

    def run(i):
        keys = [bytes([i % 3, j]) for j in range(4)]
        for _ in range(500):
            known.keep(keys, x, residual)
            known.start(keys, x)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(run, range(6)))  # raises what a thread raised
    finally:
        sys.setswitchinterval(before)
    assert len(known) == 2 and len(known._seen) <= 2 * _SEEN


def test_views_have_the_digests_of_their_values():
    z = torch.fft.fft2(torch.rand(2, 1, 4, 4))
    for view in (z.conj(), z.conj().imag):
        assert (view.is_conj() or view.is_neg()) and digests(view) == digests(view.resolve_conj().resolve_neg())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.uint8, torch.bool]),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.integers(0, 3),
)
def test_digests_tell_samples_apart_and_nothing_else(dtype, shape, batch):
    y = torch.arange(batch).view(-1, *[1] * len(shape)).expand(batch, *shape).to(dtype)
    a, b = digests(y), digests(y.clone().flip(0))
    assert len(a) == batch and a == b[::-1]
    assert len(set(a)) == len(set(y.flatten(1)[:, 0].tolist() if shape else y.tolist()))
    parts = digests(dinv.utils.TensorList([y, y + 1 if dtype != torch.bool else ~y]))
    assert len(parts) == batch and not set(parts) & set(a)


def test_the_joint_solve_of_a_batch_is_remembered():
    model, physics, _, y = remembering()
    model.solver = Solver("anderson", tol=1e-12, max_iter=300, batched=False)
    work = []
    for _ in range(3):
        model(y, physics)
        work.append(model.forward_stat.evaluations)
    assert work[0] == work[1] and work[2] < work[0] / 3


def test_transforms_of_torch_func_remember_nothing():
    model, physics, _, y = remembering()
    direction = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    cold = copy.deepcopy(model).eval()
    exact = torch.func.jvp(lambda y: cold(y, physics), (y,), (direction,))
    for _ in range(3):
        image, tangent = torch.func.jvp(lambda y: model(y, physics), (y,), (direction,))
        torch.testing.assert_close((image, tangent), exact, rtol=1e-9, atol=1e-9)
    assert not len(model._warm_starts)
