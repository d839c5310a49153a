r"""Divergence of a solve, a gradient or a loss in the middle of a training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from deepinv_deq import (
    ConvergenceError,
    ConvergenceWarning,
)
from tests.faults.common import (
    DIVERGENCES,
    TRIED,
)
from tests.faults.runs import BAD_STEP, NaNLoss, TwoPasses, faulty_run, unique_folders
from tests.problems import weights as flat

FAULTS = ["expands", "nan", "nan gradient", "no adjoint", "loss"]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_after_a_divergence_is_skipped_and_training_goes_on(fault, together):
    trainer, weights = faulty_run(fault=fault, on_divergence="skip", optimizer_step_multi_dataset=together)
    cause = {"expands": "forward solve diverged", "nan": "forward solve", "no adjoint": "backward solve diverged"}
    with pytest.warns(ConvergenceWarning, match=cause.get(fault, "the gradient is NaN or Inf|backward solve")):
        trainer.train()
    assert trainer.skipped_steps == 1
    assert torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    moved = [not torch.equal(a, b) for a, b in pairwise([*weights[BAD_STEP:], flat(trainer.model)])]
    assert moved == [True] * 3
    reference, _ = faulty_run(skip=True, optimizer_step_multi_dataset=together)
    reference.train()
    assert torch.equal(flat(trainer.model), flat(reference.model))  # as if the batch had not been there
    TRIED[DIVERGENCES] += 1


def test_without_being_asked_a_trainer_steps_as_deepinvs_does():
    trainer, _ = faulty_run(fault="loss")
    trainer.train()
    assert not flat(trainer.model).isfinite().all() and trainer.skipped_steps == 0


def test_a_divergence_in_the_first_of_two_passes_is_seen():
    trainer, weights = faulty_run(fault="expands", losses=[TwoPasses()], on_divergence="skip")
    with pytest.warns(ConvergenceWarning, match="forward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    trainer, weights = faulty_run(fault="no adjoint", losses=[TwoPasses()], on_divergence="skip")
    model = trainer.model  # this fault is in the backward pass, when the denoiser is sound again: bring it back there
    model.register_forward_hook(lambda m, i, out: keep_fault(m, out) if out.requires_grad else None)
    with pytest.warns(ConvergenceWarning, match="backward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    TRIED[DIVERGENCES] += 2


def keep_fault(model, x_hat):
    denoiser, fault = model.iteration.denoiser, model.iteration.denoiser.fault
    x_hat.register_hook(lambda _: setattr(denoiser, "fault", fault))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_divergence_can_end_the_training_and_a_resumed_run_knows_nothing_of_it(fault, tmp_path, monkeypatch):
    unique_folders(monkeypatch)
    trainer, weights = faulty_run(tmp_path / "a", fault, on_divergence="raise", ckp_interval=1)
    with pytest.raises(ConvergenceError, match="No optimiser step: .*Lower the learning rate"):
        trainer.train()
    assert torch.equal(weights[BAD_STEP - 1], flat(trainer.model)) and len(weights) == BAD_STEP
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    TRIED[DIVERGENCES] += 1


def test_weights_that_are_broken_already_end_the_training():
    trainer, _ = faulty_run(on_divergence="skip")
    with torch.no_grad():
        trainer.model.iteration.denoiser.conv.bias.fill_(torch.nan)
    with pytest.raises(ConvergenceError, match="weights are NaN or Inf already"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:Trainer running with AMP")
@pytest.mark.parametrize("clip", [{}, {"grad_clip": 1.0}])
def test_the_scale_of_half_precision_is_not_touched_by_a_divergence(clip):
    trainer, weights = faulty_run(
        fault="expands", dtype=torch.float32, mixed_precision="fp16", on_divergence="skip", **clip
    )
    with pytest.warns(ConvergenceWarning, match="forward solve diverged"):
        trainer.train()
    assert trainer.skipped_steps == 1 and torch.equal(weights[BAD_STEP - 1], weights[BAD_STEP])
    assert not torch.equal(weights[BAD_STEP], flat(trainer.model))
    TRIED[DIVERGENCES] += 1


@pytest.mark.filterwarnings("ignore:Trainer running with AMP")
def test_an_overflow_of_the_scaled_loss_is_no_divergence():
    class Large(NaNLoss):
        def forward(self, *args, **kwargs):
            return 1e4 * super().forward(*args, **kwargs)

    trainer, weights = faulty_run(
        losses=[Large()], dtype=torch.float32, mixed_precision="fp16", on_divergence="raise", epochs=10
    )
    trainer.train()  # the scaler lowers its scale until it fits
    assert 1 < trainer.scaler.get_scale() < 2**16 and torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], flat(trainer.model)) and flat(trainer.model).isfinite().all()


def test_bad_settings():
    for limit in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="diverged_above must be positive, got"):
            faulty_run(diverged_above=limit)
    with pytest.raises(ValueError, match="on_divergence must be one of ignore, skip, raise, got 'stop'"):
        faulty_run(on_divergence="stop")
