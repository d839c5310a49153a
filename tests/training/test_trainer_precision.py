r"""A deep equilibrium model in deepinv's Trainer: mixed precision, and gradients that are clipped."""

from __future__ import annotations

import importlib

import deepinv as dinv
import pytest
import torch

from deepinv_deq import ConvergenceWarning
from deepinv_deq.training import ResumableTrainer
from tests.problems import relative_error, weights
from tests.training.trainers import F32, deq, loader, make

pytestmark = pytest.mark.filterwarnings("ignore:Trainer running with AMP", "ignore:non_blocking_transfers")


# Mixed precision -------------------------------------------------------------------------------------------------------


def run_in(precision, **kwargs):
    model, _ = deq(tol=1e-2)
    trainer = make(model=model, mixed_precision=precision, sgd=True, lr=0.5, **kwargs)
    dtypes = {True: set(), False: set()}
    model.iteration.denoiser.conv.register_forward_hook(lambda m, i, out: dtypes[m.training].add(out.dtype))
    before = weights(model)
    trainer.train()
    return trainer, weights(model) - before, dtypes


@pytest.mark.parametrize("precision,dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_mixed_precision_steps_as_single_precision_does(precision, dtype):
    _, exact, dtypes = run_in(False)
    assert dtypes[True] == {F32}
    trainer, step, dtypes = run_in(
        precision, eval_dataloader=loader(deq()[1]), metrics=None, losses=dinv.loss.SupLoss()
    )
    # solves, and the evaluation that is taped outside of the Trainer's autocast, are in half precision; evaluation is not
    assert dtypes[True] == {dtype}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert relative_error(step, exact) < 0.1
    assert all(p.dtype == F32 and p.grad.dtype == F32 for p in trainer.model.parameters())


def test_evaluation_is_in_single_precision():
    _, _, dtypes = run_in("bf16", eval_dataloader=loader(deq()[1]), compute_train_metrics=False)
    assert dtypes == {True: {torch.bfloat16}, False: {F32}}


class Enlarged(dinv.loss.SupLoss):
    def forward(self, *args, **kwargs):
        return 3e4 * super().forward(*args, **kwargs)


def test_an_overflow_in_half_precision_skips_the_step_and_lowers_the_scale():
    with pytest.warns(ConvergenceWarning, match="the cotangent. is NaN or Inf"):
        trainer, step, _ = run_in("fp16", losses=Enlarged(), epochs=1)
    assert trainer.scaler.get_scale() == 2.0**14 and not step.any()  # two batches


@pytest.mark.filterwarnings("ignore::deepinv_deq.ConvergenceWarning")
def test_a_resumed_run_in_half_precision_keeps_its_scale(tmp_path, monkeypatch):
    names = iter("abc")  # deepinv names the folder of a run by the second
    monkeypatch.setattr(importlib.import_module("deepinv.training.trainer"), "get_timestamp", lambda: next(names))
    settings = {"kind": ResumableTrainer, "mixed_precision": "fp16", "losses": Enlarged()}
    whole = make(model=deq(tol=1e-2)[0], epochs=4, save_path=tmp_path / "whole", **settings)
    whole.train()
    make(model=deq(tol=1e-2)[0], epochs=3, save_path=tmp_path / "cut", **settings).train()
    resumed = make(model=deq(tol=1e-2)[0], epochs=4, save_path=tmp_path / "cut", resume=True, **settings)
    resumed.train()
    assert whole.scaler.get_scale() == resumed.scaler.get_scale() < 2.0**15
    assert torch.equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("precision", [False, "fp16"])
def test_gradients_are_clipped_after_they_are_unscaled(precision):
    model, _ = deq(tol=1e-2)
    trainer = make(
        model=model, mixed_precision=precision, sgd=True, lr=1.0, grad_clip=1e-3, check_grad=True, epochs=1,
        train_dataloader=loader(deq()[1], n=2), compute_train_metrics=False,
    )  # fmt: skip
    before = weights(model)
    trainer.train()
    assert (weights(model) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert trainer.check_grad_val.avg > 2e-3  # the norm before it was clipped


def test_clipping_needs_no_log_of_the_norm():
    trainer = make(ResumableTrainer, grad_clip=1e-3, epochs=1)  # deepinv 0.5.0's own fails here
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(before, weights(trainer.model))
