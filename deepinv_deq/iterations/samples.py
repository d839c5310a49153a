r"""Which tensors of a physics belong to the samples of a batch.

This is known for deepinv's own physics. A tensor of another physics is never taken apart: either it is certain that all samples
share it, which :mod:`deepinv_deq.iterations.separability` has to prove, or the batch is evaluated as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepinv import physics as dinv
from torch import Tensor, nn

from deepinv_deq.compat import stored
from deepinv_deq.iterations.adjoints import OwnAdjoint
from deepinv_deq.iterations.replica import Found, Replica
from deepinv_deq.physics import SparseLinearPhysics

# A number k: dimension 0 of the tensor is the batch where the tensor has k dimensions more than the state. With fewer, it is
# broadcast over the batch. None: never, of a tensor or of everything inside a submodule.
Rules = dict[str, int | None]
_MASK: Rules = {"mask": 0}
_SCALING: Rules = {"filter": 0, "Fh": 0, "Fhc": 0, "Fh2": 0}
_KNOWN: dict[type, Rules] = {  # exact types: a subclass may use its tensors in another way
    dinv.Denoising: _MASK,
    dinv.Inpainting: _MASK,
    dinv.Demosaicing: _MASK,
    dinv.MRI: _MASK,
    dinv.MultiCoilMRI: {"mask": 0, "coil_maps": 0},
    dinv.Blur: {"filter": 0},
    dinv.BlurFFT: {"filter": 0, "angle": 0, "mask": 1},
    dinv.Downsampling: _SCALING,
    dinv.Tomography: {"angles": None, "operator_norm": None, "radon": None, "iradon": None, "filter": None},
    dinv.CompressedSensing: {"_A": None, "_A_dagger": None, "_A_adjoint": None, "initial_random_state": None},
    SparseLinearPhysics: {f"_{m}_{p}": None for m in ("forward", "adjoint") for p in ("rows", "columns", "values")},
}
_STACKED = (dinv.StackedPhysics, dinv.StackedLinearPhysics)
_COMPOSED = (dinv.ComposedPhysics, dinv.ComposedLinearPhysics)
_OTHER_SHAPES = (dinv.MultiCoilMRI, dinv.CompressedSensing, SparseLinearPhysics)  # measurements of another rank
# not used by A and its adjoint, or no tensors
_NUMBERS = (int, float, bool, str, type(None), torch.dtype, torch.device)
_MODELS = ("noise_model", "sensor_model")
_UNUSED = {
    *_MODELS,
    "_device_holder",
    "rng",
    "gen",
    "physics_list",
    "_original",
    "fbp",
    "samples",
    "_origin",
    "_inverse",
}
_UNUSED |= {"_auto_grad_adjoint_fn", "_auto_grad_adjoint_input_shape"}


@dataclass
class Samples:
    r"""What is known of the tensors of a physics.

    :param list rows: tensors with one row per sample.
    :param list shared: tensors of physics that are not in the table: shared by all samples, or the physics cannot be restricted.
    """

    rows: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)


def sample_tensors(physics: nn.Module, batch: int, ndim: int) -> Samples | None:
    r"""Which tensors of a physics belong to samples.

    :param torch.nn.Module physics: forward operator.
    :param int batch: number of samples.
    :param int ndim: number of dimensions of a state, the batch included.
    :return: what is known; ``None`` where the physics may have something of each sample in an unknown way.
    """
    samples = Samples()
    return samples if _collect(physics, batch, ndim, samples) else None


def _collect(physics: nn.Module, batch: int, ndim: int, samples: Samples) -> bool:
    kind = type(physics)
    if kind not in _STACKED and kind not in _COMPOSED:
        return (
            _by_table(physics, _KNOWN[kind], batch, ndim, samples) if kind in _KNOWN else _own(physics, batch, samples)
        )
    parts: Any = list(physics.physics_list)  # type: ignore[arg-type]
    if kind in _COMPOSED and any(type(p) in _OTHER_SHAPES for p in parts[:-1]):
        return False
    return _by_table(physics, {}, batch, ndim, samples) and all(_collect(p, batch, ndim, samples) for p in parts)


def _by_table(physics: nn.Module, rules: Rules, batch: int, ndim: int, samples: Samples) -> bool:
    for name, value in stored(physics):
        if name in _UNUSED:
            continue
        if isinstance(value, Tensor):
            rule = rules.get(name, -1)
            extra = value.ndim - ndim - (rule or 0)
            if rule == -1 or (rule is not None and (extra > 0 or (extra == 0 and len(value) not in (1, batch)))):
                return False
            if rule is not None and extra == 0 and len(value) == batch > 1:
                samples.rows.append(value)
        elif not _is_plain(value, type(physics), name):
            return False
    modules = {name: m for name, m in physics.named_children() if name not in _UNUSED}
    return all(rules.get(name, -1) is None and _of_deepinv(type(m)) for name, m in modules.items())


def _own(module: nn.Module, batch: int, samples: Samples) -> bool:
    r"""Whether everything that a module of a user keeps is a number, a tensor of numbers, or a module of that kind."""
    for name, value in stored(module):
        if name in (*_MODELS, "_origin", "img_size"):
            continue
        if isinstance(value, Tensor):
            if not (value.is_floating_point() or value.is_complex()) and batch in value.shape:
                return False  # indices, which cannot be tried with random values
            samples.shared.append(value)
        elif isinstance(value, (list, tuple, dict, set)) and (not value or len(value) % batch):
            if not _is_plain(value, type(module), name):
                return False
        elif not isinstance(value, (*_NUMBERS, torch.Size)) and not (
            callable(value) and _is_plain(value, type(module), name)
        ):
            return False
    return all(_own(child, batch, samples) for name, child in module.named_children() if name not in _MODELS)


def _of_deepinv(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith(("deepinv.", "builtins"))


def _is_plain(value: Any, kind: type, name: str) -> bool:
    r"""Whether an attribute of a physics has no tensors and no code of a user in it."""
    if isinstance(value, (dict, list, tuple, set)):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        return all(_is_plain(item, kind, "") for item in items)
    if isinstance(value, (nn.Module, Tensor)):
        return False
    if isinstance(value, OwnAdjoint):  # by the operator, which is looked at itself
        return True
    if callable(value) and not isinstance(value, type):
        return _of_deepinv(value) and not hasattr(kind, name)
    return True


def read_by_maps(replica: Replica, physics: Any) -> list[Found]:
    r"""The tensors of the iteration and the physics, without those of noise and sensor models of deepinv's physics, whose operators do
    not read them.

    :param Replica replica: the replica of both.
    :param deepinv.physics.Physics physics: the physics in it.
    """
    ours = type(physics).__module__.startswith("deepinv.")
    models = [getattr(physics, name, None) for name in _MODELS] if ours else []
    modules = [model for model in models if isinstance(model, nn.Module)]
    of_noise = {id(t) for m in modules for t in (*m.parameters(), *m.buffers(), *vars(m).values())}
    return [f for key, f in replica.found.items() if key not in of_noise or f.roots != {1}]
