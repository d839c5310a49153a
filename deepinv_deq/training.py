r"""A deepinv trainer whose runs can be killed at any time and resumed as if nothing had happened."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepinv import Trainer


@dataclass
class ResumableTrainer(Trainer):
    r"""ResumableTrainer(model, physics, optimizer, train_dataloader, ..., resume=False, config={})
    :class:`deepinv.Trainer` with atomic checkpoints that hold the state of every random generator.

    A run resumed from its last checkpoint equals the uninterrupted one, bit for bit on CPU. A checkpoint is written to
    a temporary file first, so an interrupted run never leaves a broken one.

    All parameters are those of :class:`deepinv.Trainer`, and two more:

    :param bool resume: continue from the newest checkpoint under ``save_path``, if there is one.
    :param dict config: plain values that identify the run; a checkpoint with others is refused.

    :raises ValueError: in ``train``, if the checkpoint is of a run with another ``config``.
    """

    resume: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def setup_train(self, train: bool = True, **kwargs: Any) -> None:
        r"""Set up as deepinv does, after choosing the checkpoint to resume from.

        :param bool train: whether the model is about to be trained.
        """
        given = getattr(self, "ckpt_pretrained", None)
        self._resumed_from: str | Path | None = None
        if train and self.resume and self.save_path and given is None:
            self.ckpt_pretrained = self._resumed_from = latest_checkpoint(self.save_path)
        super().setup_train(train=train, **kwargs)

    def save_model(self, filename: str | Path, epoch: int, state: dict[str, Any] | None = None) -> None:
        r"""Save a checkpoint, atomically, with the random generators.

        :param str filename: checkpoint filename.
        :param int epoch: current epoch.
        :param dict state: custom objects to save with the model.
        """
        if not self.save_path:
            return
        extra = {"rng": self._rng_state(), "config": dict(self.config)}
        super().save_model(f"{filename}.part", epoch, (state or {}) | extra)
        os.replace(Path(self.save_path) / f"{filename}.part", Path(self.save_path) / filename)

    def load_model(self, ckpt_pretrained: str | Path | None = None, strict: bool = True) -> dict[str, Any] | None:
        r"""Load a checkpoint; where a run is resumed from it, its random generators and histories too.

        :param str, None ckpt_pretrained: checkpoint; default the one given to the constructor or found by ``resume``.
        :param bool strict: whether the weights must match exactly.
        :return: the checkpoint, or ``None`` if there was none to load.
        :raises ValueError: if the checkpoint is of a run with another ``config``; nothing is loaded then.
        """
        path = ckpt_pretrained or self.ckpt_pretrained
        resumed = path == self._resumed_from
        if path is not None and resumed:
            found = torch.load(path, map_location="cpu", weights_only=False).get("config", {})
            differing = {k: (found[k], v) for k, v in self.config.items() if k in found and found[k] != v}
            if differing:
                listed = ", ".join(f"{k} was {old}, is {new}" for k, (old, new) in differing.items())
                raise ValueError(f"{path} is of another run ({listed}). Use the same settings or another save_path.")
        checkpoint = super().load_model(ckpt_pretrained, strict)
        if resumed and checkpoint is not None:
            self._set_rng_state(checkpoint["rng"])
            self.loss_history |= checkpoint["loss"]
            self.train_metrics_history |= checkpoint["train_metrics"]
            self.eval_loss_history |= checkpoint["eval_loss"]
            self.eval_metrics_history |= checkpoint["eval_metrics"]
        return checkpoint

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
            torch.load(path, map_location="cpu", weights_only=False)["epoch"]
            return str(path)
        except Exception as error:  # a broken file fails in as many ways as there are bytes in it
            warnings.warn(f"Passing over the broken checkpoint {path}: {error}", stacklevel=2)
    return None
