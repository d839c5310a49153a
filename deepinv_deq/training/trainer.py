r"""A deepinv trainer whose runs can be killed at any time and resumed as if nothing had happened."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from deepinv import Trainer

from deepinv_deq.files import contents_of, digest, load_intact, plain, save_intact, temporary
from deepinv_deq.training.checkpoints import latest_checkpoint, read_checkpoint
from deepinv_deq.training.state import (
    Verified,
    all_or_nothing,
    check_resumable,
    extra_of,
    prepare_saving,
    restore,
)
from deepinv_deq.training.step_guard import StepGuard, check_divergence
from deepinv_deq.training.surroundings import Surroundings


@dataclass
class ResumableTrainer(Trainer):
    r"""ResumableTrainer(model, physics, optimizer, train_dataloader, ..., resume=False, config={})
    :class:`deepinv.Trainer` with atomic checkpoints that hold the state of every random generator.

    A run resumed from its last checkpoint equals the uninterrupted one, bit for bit on CPU. Numbers and tensors that training
    changed in public attributes of losses, metrics and physics are saved, too. Generators of PyTorch, NumPy and Python are found in
    everything that the Trainer holds and in global variables that functions of user code name. A warning names those whose state
    cannot be saved. A checkpoint is written under a temporary name first, so an interrupted run never leaves a broken one.

    All parameters are those of :class:`deepinv.Trainer`, and four more:

    :param bool resume: continue from the newest checkpoint under ``save_path``, if there is one.
    :param dict config: plain values that identify the run; a checkpoint with others is refused.
    :param str on_divergence: what becomes of an optimiser step after a solve of a :class:`deepinv_deq.DEQReconstructor`
        that diverged, forward or backward, or with a gradient that is NaN or Inf. ``"ignore"``, the default: the step is made, as in
        deepinv. ``"skip"``: no step is made, with a warning. Training continues with unchanged weights. ``"raise"``: training
        ends with a :class:`deepinv_deq.ConvergenceError` and unchanged weights. Solvers need ``on_failure="warn"`` or
        ``"ignore"``: those that raise do so before there is a step to skip.
    :param float diverged_above: relative residual above which a solve that missed its tolerance counts as diverged.

    The attribute ``skipped_steps`` counts the steps that were not made.

    :raises ValueError: for an unknown ``on_divergence`` or a ``diverged_above`` that is not positive. In ``train``, if the checkpoint is of a run with another
        ``config`` or other generators, is broken, does not fit, or has more in it than tensors and plain values.
    :raises TypeError: in ``train``, if ``config``, the optimiser or the scheduler hold more than tensors and plain values.
    :raises OSError: in ``train``, if a checkpoint cannot be written. Earlier ones stay as they were.
    :raises ConvergenceError: in ``train``, if ``on_divergence`` is not ``"ignore"`` and weights are NaN or Inf.
    """

    resume: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    on_divergence: Literal["ignore", "skip", "raise"] = "ignore"
    diverged_above: float = 0.5
    _resumed_from: str | Path | None = field(default=None, init=False, repr=False)
    _scaling: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _guard: StepGuard | None = field(default=None, init=False, repr=False)
    _surroundings: Surroundings = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_divergence(self.on_divergence, self.diverged_above)
        super().__post_init__()
        self._surroundings = Surroundings(self)

    @property
    def skipped_steps(self) -> int:
        r"""Number of optimiser steps that were not made since training was set up."""
        return 0 if self._guard is None else self._guard.skipped

    def setup_train(self, train: bool = True, **kwargs: Any) -> None:
        r"""Set up as deepinv does, after choosing the checkpoint to resume from.

        :param bool train: whether the model is about to be trained.
        """
        given = getattr(self, "ckpt_pretrained", None)
        self._resumed_from, self._scaling = None, {}
        if train and self.resume and self.save_path and given is None:
            self.ckpt_pretrained = self._resumed_from = latest_checkpoint(self.save_path)
        super().setup_train(train=train, **kwargs)
        if train and self.save_path:
            prepare_saving(self)
        if train and self.on_divergence != "ignore":
            self.scaler = self._guard = StepGuard(
                self.model,
                self.diverged_above,
                self.on_divergence == "raise",
                device=self.device.type,
                enabled=self.mixed_precision == torch.float16,
            )
        if self._scaling:
            with contents_of(self._resumed_from or "", "the state of a gradient scaler"):
                self.scaler.load_state_dict(self._scaling)

    def compute_loss(self, physics: Any, x: Any, y: Any, train: bool = True, **kwargs: Any) -> Any:
        r"""Compute the loss and its gradient as deepinv does, and watch the solves where a divergence matters.

        :param deepinv.physics.Physics physics: current physics operator.
        :param torch.Tensor x: ground truth.
        :param torch.Tensor y: measurement.
        :param bool train: whether the model is trained, or evaluated.
        :param kwargs: handed on.
        :return: what deepinv returns.
        """
        with self._guard.watching() if train and self._guard else nullcontext():
            return super().compute_loss(physics, x, y, train=train, **kwargs)

    def check_clip_grad(self) -> Any:
        r"""Clip gradients as deepinv does.

        :return: norm of the gradient, if it is to be logged: deepinv 0.5.0 would log it without ``check_grad`` too, where it
            keeps none, and fail.
        """
        norm = super().check_clip_grad()
        return norm if self.check_grad else None

    def save_model(self, filename: str | Path, epoch: int, state: dict[str, Any] | None = None) -> None:
        r"""Save a checkpoint with the random generators and a digest of all contents: the whole file, or none.

        :param str filename: checkpoint filename.
        :param int epoch: current epoch.
        :param dict state: custom tensors and plain values to save with the model.
        :raises OSError: if the file cannot be written, such as on a full disk. Earlier checkpoints, and the model and
            optimiser in memory, are as they were, so that the run can be resumed, or the model saved again.
        :raises TypeError: if there is more in the checkpoint than tensors and plain values.
        """
        if not self.save_path:
            return
        custom = plain(state or {}, "state")
        digest(custom, "state")
        extra = extra_of(self)
        path = Path(self.save_path) / filename
        with temporary(path.absolute()) as partial:  # deepinv writes what it wants to, and then a digest is added
            super().save_model(partial, epoch, custom | extra)
            try:
                content = load_intact(partial)
            except ValueError as error:
                raise TypeError(f"{path} cannot be saved so that it can be resumed from: {error.__cause__}.") from error
        save_intact(content, path)

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> dict[str, Any] | None:
        r"""Load a checkpoint; where a run is resumed from it, its random generators and histories too.

        :param str, None ckpt_pretrained: checkpoint; default the one given to the constructor or found by ``resume``.
        :param bool strict: whether the weights must match exactly.
        :return: the checkpoint, or ``None`` if there was none to load.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if the checkpoint is of a run with another ``config`` or other random generators, is broken, does
            not fit the model, or has more in it than tensors and plain values; nothing is loaded then.
        """
        path = ckpt_pretrained or self.ckpt_pretrained
        if path is None:
            return super().load_model(None, strict)
        content = read_checkpoint(path)
        resumed = path == self._resumed_from
        found = check_resumable(path, content, self) if resumed else {}
        file = Verified(str(path))
        torch.save(content, file)  # what deepinv loads is what was verified, not the file once more
        file.seek(0)
        epoch = self.__dict__.get("epoch_start", 0)
        with all_or_nothing(path, (self.model, self.optimizer, self.scheduler), found.values()):
            try:
                checkpoint = super().load_model(file, strict)
                if resumed:
                    restore(self, content, found)
                    self._scaling = content.get("scaler", {})  # the scaler is made after the model is loaded
            except Exception:
                self.epoch_start = epoch
                raise
        if ckpt_pretrained is None:
            self.ckpt_pretrained = None  # as deepinv does, so that it is loaded once
        return checkpoint
