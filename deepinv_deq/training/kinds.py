r"""Kinds of random generators, and their states as tensors and plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.quasirandom import SobolEngine

_KINDS: dict[str, type | tuple[type, ...]] = {
    "torch": torch.Generator,
    "numpy": np.random.Generator,
    "numpy legacy": np.random.RandomState,
    "numpy bits": np.random.BitGenerator,
    "numpy seeds": np.random.SeedSequence,
    "python": random.Random,
    "sobol": SobolEngine,
}
_SPAWNED = "spawned"  # how many children a generator has, which is no part of its own state


def kind_of(value: Any) -> str | None:
    r"""The name of the kind of generator that an object is, or ``None``."""
    return next((name for name, kind in _KINDS.items() if isinstance(value, kind)), None)


def state_of(generator: Any) -> Any:
    r"""The state of a generator, as tensors and plain values.

    :param generator: one of those that :func:`find <deepinv_deq.training.generators.find>` returns.
    :return: its state, for :func:`set_state`.
    """
    kind = kind_of(generator)
    if kind == "torch":
        return generator.get_state()
    if kind == "python":
        return generator.getstate()
    if kind == "sobol":
        return {"quasi": generator.quasi.clone(), "num_generated": generator.num_generated}
    if kind == "numpy seeds":
        return {_SPAWNED: generator.n_children_spawned}
    if kind == "numpy legacy":
        return _encode(generator.get_state(legacy=False))
    bits = generator.bit_generator if kind == "numpy" else generator
    spawned = getattr(_seeds(bits), "n_children_spawned", None)
    return _encode(bits.state) | ({} if spawned is None else {_SPAWNED: spawned})


def set_state(generator: Any, state: Any, *, strict: bool = True) -> None:
    r"""Put a generator into a state.

    :param generator: a generator of the kind that the state is of.
    :param state: what :func:`state_of` returned.
    :param bool strict: whether a generator that has spawned more children than the state says is an error.
    :raises ValueError: if it is one.
    """
    kind = kind_of(generator)
    if kind == "torch":
        generator.set_state(state.cpu())
    elif kind == "python":
        version, internal, *rest = state
        generator.setstate((version, tuple(internal), *rest))
    elif kind == "sobol":
        generator.quasi, generator.num_generated = state["quasi"].clone(), int(state["num_generated"])
    elif kind == "numpy seeds":
        _spawn(generator, state[_SPAWNED], strict)
    elif kind == "numpy legacy":
        generator.set_state(_decode(state))
    else:
        bits = generator.bit_generator if kind == "numpy" else generator
        if _SPAWNED in state:  # checkpoints of earlier versions have no number of children
            _spawn(_seeds(bits), state[_SPAWNED], strict)
        bits.state = _decode({key: value for key, value in state.items() if key != _SPAWNED})


def _seeds(bits: Any) -> Any:
    return getattr(bits, "seed_seq", None) or getattr(bits, "_seed_seq", None)  # the latter before NumPy 1.25


def _spawn(seeds: Any, number: int, strict: bool) -> None:
    r"""Bring the number of children of a seed sequence up to that of a checkpoint: the next child depends on nothing else."""
    now = getattr(seeds, "n_children_spawned", number)
    if now > number and strict:
        raise ValueError(
            f"a generator of NumPy has spawned {now} children, and {number} in the checkpoint: build the run anew to resume it"
        )
    if now < number:
        seeds.spawn(number - now)


def global_states() -> dict[str, Any]:
    r"""The states of the global generators of PyTorch, NumPy and Python."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": _encode(np.random.get_state(legacy=False)),
        "python": random.getstate(),
    }


def set_global_states(states: Mapping[str, Any]) -> None:
    r"""Put the global generators into the states that :func:`global_states` returned.

    :param Mapping states: the states. Those of more CUDA devices than there are here are left out.
    """
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)
    np.random.set_state(_decode(states["numpy"]))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _encode(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _encode(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):  # as a list of numbers: not every PyTorch has unsigned tensors
        return {"dtype": str(state.dtype), "values": state.tolist()}
    return state.item() if isinstance(state, np.generic) else state


def _decode(state: Any) -> Any:
    if isinstance(state, dict) and state.keys() == {"dtype", "values"}:
        return np.array(state["values"], dtype=state["dtype"])
    return {key: _decode(value) for key, value in state.items()} if isinstance(state, dict) else state
