r"""What of a run is saved and restored: histories, random generators, and all or nothing of it."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from deepinv_deq.files import digest, plain
from deepinv_deq.training import generators, surroundings


def histories(run: Any) -> dict[str, dict[str, Any]]:
    r"""The histories of a run, under the names that deepinv saves them by.

    :param deepinv.Trainer run: the run.
    :return: the histories themselves, not copies.
    """
    return {
        "loss": run.loss_history,
        "train_metrics": run.train_metrics_history,
        "eval_loss": run.eval_loss_history,
        "eval_metrics": run.eval_metrics_history,
    }


def generators_of(run: Any) -> tuple[dict[str, Any], list[str]]:
    r"""The private generators of a run.

    :param deepinv.Trainer run: the run.
    :return: the generators by path, and descriptions of what has a state that cannot be saved.
    """
    found, lost = generators.find(run, streams=("train_dataloader", "eval_dataloader", "physics_generator"))
    for which in ("train_dataloader", "eval_dataloader"):
        for i, loader in enumerate(getattr(run, which) or ()):
            if getattr(loader, "persistent_workers", False):
                lost.append(
                    f"{which}[{i}] (persistent_workers=True: its worker processes keep generators of their own)"
                )
    return found, lost


def prepare_saving(run: Any) -> None:
    r"""Say before training what could not be saved after it.

    :param deepinv.Trainer run: the run.
    :raises TypeError: if there is more in the state of the run than tensors and plain values.
    """
    digest(plain(run.config, "config"), "config")
    for name in ("optimizer", "scheduler"):
        part = getattr(run, name)
        if part is not None:
            digest(part.state_dict(), f"{name}.state_dict()")
    _, lost = generators_of(run)
    lost += run._surroundings.missing(run)
    if lost:
        warnings.warn(
            f"The state of {'; '.join(lost)} cannot be saved: a run that is resumed from a checkpoint will not repeat "
            "an uninterrupted one bit for bit. Use torch.Generator, numpy.random.default_rng or random.Random.",
            stacklevel=4,
        )


def extra_of(run: Any) -> dict[str, Any]:
    r"""What a checkpoint holds besides what deepinv saves: random generators, settings, the state of the gradient scaler, of losses,
    metrics and physics.

    :param deepinv.Trainer run: the run. Histories with NumPy scalars, which some metrics return, become plain.
    :return: tensors and plain values.
    """
    for history in histories(run).values():
        history.update(plain(history))
    found, _ = generators_of(run)
    private = {
        name: {"kind": generators.kind_of(generator), "state": generators.state_of(generator)}
        for name, generator in found.items()
    }
    rng = generators.global_states() | {"generators": private}
    around = run._surroundings.changed(run)
    return {
        "rng": rng,
        "config": plain(run.config, "config"),
        "scaler": run.scaler.state_dict(),
        "surroundings": around,
    }


def restore(run: Any, content: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    r"""Put random generators, histories, losses, metrics and physics into the states of a checkpoint.

    :param deepinv.Trainer run: the run.
    :param Mapping content: the checkpoint.
    :param Mapping found: the generators of the run, by path.
    """
    around = content.get("surroundings", {})  # not in checkpoints of 0.1
    surroundings.check(run, around)
    generators.set_global_states(content["rng"])
    for name, generator in found.items():
        generators.set_state(generator, content["rng"]["generators"][name]["state"])
    for name, history in histories(run).items():
        history |= content[name]
    surroundings.put(run, around)


def check_resumable(path: str | os.PathLike[str], checkpoint: dict[str, Any], run: Any) -> dict[str, Any]:
    r"""Verify that a run can be resumed from a checkpoint.

    :param str, os.PathLike path: the checkpoint, for messages.
    :param dict checkpoint: its contents.
    :param deepinv.Trainer run: the run.
    :return: the generators of the run, by path.
    :raises ValueError: if the checkpoint lacks a part of the state, or is of a run with another ``config`` or generators.
    """
    needed = ("rng", "epoch", "optimizer", "scheduler", "scaler", *histories(run))
    lacking = [key for key in needed if key not in checkpoint]
    if lacking:
        raise ValueError(
            f"{path} was not saved by a ResumableTrainer: it has no {', '.join(lacking)} to resume from. "
            "Pass it as ckpt_pretrained, with another save_path."
        )
    saved, ours = checkpoint.get("config", {}), plain(run.config)
    differing = {k: (saved[k], v) for k, v in ours.items() if k in saved and not _same(saved[k], v)}
    if differing:
        listed = ", ".join(f"{k} was {old}, is {new}" for k, (old, new) in differing.items())
        raise ValueError(f"{path} is of another run ({listed}). Use the same settings or another save_path.")
    found, _ = generators_of(run)
    _check_generators(path, checkpoint["rng"], found)
    return found


def _check_generators(path: str | os.PathLike[str], saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    r"""Verify that a checkpoint has a state for each generator of a run, and no others."""
    states = saved.get("generators")
    if not isinstance(states, Mapping):
        raise ValueError(
            f"{path} has the states of random generators without their places in the run (deepinv-deq 0.1): the run cannot "
            "be resumed bit for bit. Pass the checkpoint as ckpt_pretrained, with another save_path."
        )
    kinds = {name: state["kind"] for name, state in states.items()}
    ours = {name: generators.kind_of(generator) for name, generator in found.items()}
    if kinds != ours:
        only = [sorted(a.keys() - b.keys()) for a, b in ((kinds, ours), (ours, kinds))]
        differing = [name for name in kinds.keys() & ours.keys() if kinds[name] != ours[name]]
        listed = [
            f"only in the {place}: {', '.join(names)}"
            for place, names in (("checkpoint", only[0]), ("run", only[1]), ("run of another kind", differing))
            if names
        ]
        raise ValueError(
            f"{path} has the states of {len(kinds)} random generators, and the run has {len(ours)} ({'; '.join(listed)}). "
            "Build the run from the same parts, or pass the checkpoint as ckpt_pretrained, with another save_path."
        )


@contextmanager
def all_or_nothing(path: str | os.PathLike[str], parts: Iterable[Any], found: Iterable[Any]) -> Iterator[None]:
    r"""Put parts of a run, its generators, and the global ones back into their states if the block fails.

    :param str, os.PathLike path: the checkpoint that is loaded in the block.
    :param Iterable parts: model, optimiser and scheduler; each may be ``None``.
    :param Iterable found: the generators of the run.
    :raises ValueError: if the block fails because the checkpoint does not fit; the message names it.
    """
    parts = [part for part in parts if part is not None]
    with torch.no_grad():
        before = [deepcopy(part.state_dict()) for part in parts]
    states = generators.global_states()
    private = [(generator, generators.state_of(generator)) for generator in found]
    try:
        yield
    except Exception as error:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
        generators.set_global_states(states)
        for generator, state in private:
            generators.set_state(generator, state, strict=False)
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} does not fit this run ({cause}). The run is as it was before. Build the model, the optimiser and the "
            "scheduler as they were when the checkpoint was saved."
        ) from error


def _same(a: Any, b: Any) -> bool:
    return digest(a) == digest(b) or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)


class Verified(io.BytesIO):
    r"""A checkpoint in memory that prints as the file that it was read from."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        return self._name
