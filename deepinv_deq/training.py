r"""A deepinv trainer whose runs can be killed at any time and resumed as if nothing had happened."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from deepinv import Trainer

from deepinv_deq._divergence import StepGuard
from deepinv_deq._weights import load_intact

_ON_DIVERGENCE = ("ignore", "skip", "raise")


@dataclass
class ResumableTrainer(Trainer):
    r"""ResumableTrainer(model, physics, optimizer, train_dataloader, ..., resume=False, config={})
    :class:`deepinv.Trainer` with atomic checkpoints that hold the state of every random generator.

    A run resumed from its last checkpoint equals the uninterrupted one, bit for bit on CPU. A checkpoint is written to
    a temporary file first, so an interrupted run never leaves a broken one.

    All parameters are those of :class:`deepinv.Trainer`, and four more:

    :param bool resume: continue from the newest checkpoint under ``save_path``, if there is one.
    :param dict config: plain values that identify the run; a checkpoint with others is refused.
    :param str on_divergence: what becomes of an optimiser step after a solve of a :class:`deepinv_deq.DEQReconstructor`
        that diverged, forward or backward, or with a gradient that is NaN or Inf: ``"skip"`` makes none, warns, and goes on
        with the weights as they were; ``"raise"`` ends the training with a :class:`deepinv_deq.ConvergenceError`, and the
        weights as they were; ``"ignore"``, the default, steps as deepinv does. Solvers need ``on_failure="warn"`` or
        ``"ignore"``: those that raise do so before there is a step to skip.
    :param float diverged_above: relative residual above which a solve that missed its tolerance counts as diverged.

    The attribute ``skipped_steps`` counts the steps that were not made.

    :raises ValueError: if ``on_divergence`` is none of the three; in ``train``, if the checkpoint is of a run with another
        ``config``, is broken, or has more in it than tensors and plain values.
    :raises ConvergenceError: in ``train``, if ``on_divergence`` is not ``"ignore"`` and weights are NaN or Inf.
    """

    resume: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    on_divergence: Literal["ignore", "skip", "raise"] = "ignore"
    diverged_above: float = 0.5
    _resumed_from: str | Path | None = field(default=None, init=False, repr=False)
    _scaling: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _guard: StepGuard | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.on_divergence not in _ON_DIVERGENCE:
            raise ValueError(f"on_divergence must be one of {', '.join(_ON_DIVERGENCE)}, got {self.on_divergence!r}.")
        super().__post_init__()

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
        if train and self.on_divergence != "ignore":
            self.scaler = self._guard = StepGuard(
                self.model,
                self.diverged_above,
                self.on_divergence == "raise",
                device=self.device.type,
                enabled=self.mixed_precision == torch.float16,
            )
        if self._scaling:
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
        r"""Save a checkpoint, atomically, with the random generators.

        :param str filename: checkpoint filename.
        :param int epoch: current epoch.
        :param dict state: custom objects to save with the model.
        """
        if not self.save_path:
            return
        extra = {"rng": self._rng_state(), "config": dict(self.config), "scaler": self.scaler.state_dict()}
        super().save_model(f"{filename}.part", epoch, (state or {}) | extra)
        os.replace(Path(self.save_path) / f"{filename}.part", Path(self.save_path) / filename)

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> dict[str, Any] | None:
        r"""Load a checkpoint; where a run is resumed from it, its random generators and histories too.

        :param str, None ckpt_pretrained: checkpoint; default the one given to the constructor or found by ``resume``.
        :param bool strict: whether the weights must match exactly.
        :return: the checkpoint, or ``None`` if there was none to load.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if the checkpoint is of a run with another ``config``, is broken, or has more in it than tensors
            and plain values; nothing is loaded then.
        """
        path = ckpt_pretrained or self.ckpt_pretrained
        resumed = path is not None and path == self._resumed_from
        if path is not None:
            self._check(path, _read(path), resumed)
        checkpoint = super().load_model(ckpt_pretrained, strict)
        if resumed and checkpoint is not None:
            self._set_rng_state(checkpoint["rng"])
            self._scaling = checkpoint.get("scaler", {})  # the scaler is made after the model is loaded
            self.loss_history |= checkpoint["loss"]
            self.train_metrics_history |= checkpoint["train_metrics"]
            self.eval_loss_history |= checkpoint["eval_loss"]
            self.eval_metrics_history |= checkpoint["eval_metrics"]
        return checkpoint

    def _check(self, path: str | Path, checkpoint: dict[str, Any], resumed: bool) -> None:
        if resumed and "rng" not in checkpoint:
            raise ValueError(
                f"{path} was not saved by a ResumableTrainer: it has no state of the random generators to resume from. "
                "Pass it as ckpt_pretrained, with another save_path."
            )
        found = checkpoint.get("config", {}) if resumed else {}
        differing = {k: (found[k], v) for k, v in self.config.items() if k in found and found[k] != v}
        if differing:
            listed = ", ".join(f"{k} was {old}, is {new}" for k, (old, new) in differing.items())
            raise ValueError(f"{path} is of another run ({listed}). Use the same settings or another save_path.")

    def _generators(self) -> Iterator[torch.Generator]:
        r"""Every private generator of the run, in an order that depends on its structure only."""
        owners: list[Any] = []
        for root in (*self.losses, *self.physics, *(self.physics_generator or ()), self.model):
            owners += list(root.modules()) if isinstance(root, torch.nn.Module) else [root]
        for loader in self.train_dataloader:
            owners += [loader, getattr(loader, "sampler", None)]
        seen: set[int] = set()
        for owner in owners:
            for value in getattr(owner, "__dict__", {}).values():
                if isinstance(value, torch.Generator) and id(value) not in seen:
                    seen.add(id(value))
                    yield value

    def _rng_state(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "python": random.getstate(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _set_rng_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved.cpu())


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    r"""Newest loadable checkpoint of a training run; broken ones are named in a warning and passed over.

    :param str, os.PathLike folder: the ``save_path`` of the run.
    :return: path of the checkpoint with the largest epoch, or ``None``.
    """
    # not ckp_best, written before the epoch's scheduler step; newest first, so that one file is read, not all of them
    paths = Path(folder).rglob("ckp_[0-9]*.pth.tar")
    for path in sorted(paths, key=lambda p: (int(p.name.split(".")[0].removeprefix("ckp_")), p.stat().st_mtime))[::-1]:
        try:
            _read(path, "epoch")
            return str(path)
        except ValueError as error:
            warnings.warn(f"Passing over the broken checkpoint {path}: {error}", stacklevel=2)
    return None


def _read(path: str | Path, *keys: str) -> dict[str, Any]:
    r"""A checkpoint that is whole, with these keys in it."""
    try:
        checkpoint = load_intact(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken file fails in as many ways as there are bytes in it
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"{path} is no checkpoint that can be trusted: it was cut off or changed, or has more in it than tensors and "
            f"plain values ({cause}). Use an earlier one."
        ) from error
    lacking = [key for key in ("state_dict", *keys) if not isinstance(checkpoint, dict) or key not in checkpoint]
    if lacking:
        raise ValueError(f"{path} is no checkpoint of a Trainer: it has no {', '.join(lacking)}.")
    return checkpoint
