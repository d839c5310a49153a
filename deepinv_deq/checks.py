r"""What a user hands to a :class:`DEQReconstructor`: measurements, starting points, classes of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from deepinv.physics import Physics
from torch import Tensor

from deepinv_deq.iterations import BoundIteration, FixedPointIteration
from deepinv_deq.states import State, as_tuple

Init = Tensor | tuple[Tensor, ...] | dict[str, Any] | Callable[[Any, Any], Any]


def check_types(owner: Any, **kinds: type) -> None:
    r"""Raise if an attribute is of another class than it must be.

    :param object owner: has the attributes.
    :param type kinds: a class for each attribute.
    :raises TypeError: with both classes.
    """
    for name, kind in kinds.items():
        if not isinstance(getattr(owner, name), kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(owner, name)).__name__}.")


def check_finite(y: Any) -> None:
    r"""Raise if measurements have a NaN or Inf.

    :param torch.Tensor, Sequence[torch.Tensor] y: measurements.
    :raises ValueError: with the number of such values.
    """
    for i, part in enumerate([y] if isinstance(y, Tensor) else list(y)):
        if not bool(torch.isfinite(part).all()):
            count = int((~torch.isfinite(part)).sum())
            raise ValueError(
                f"The measurements have {count} NaN or Inf values of {part.numel()}"
                f"{'' if isinstance(y, Tensor) else f' in part {i}'}. Repair or mask them before reconstructing."
            )


def check_ground_truth(x_gt: Tensor | None, x: Tensor) -> None:
    r"""Raise if a ground truth does not belong to a reconstruction.

    :param torch.Tensor, None x_gt: ground truth, if there is one.
    :param torch.Tensor x: the reconstruction.
    :raises ValueError: with both shapes.
    """
    if x_gt is not None and x_gt.shape != x.shape:
        raise ValueError(f"x_gt must have the shape of the reconstruction, {tuple(x.shape)}, got {tuple(x_gt.shape)}.")


def own_start(f: Any, iteration: FixedPointIteration, y: Any, physics: Physics) -> State:
    r"""The iteration's own starting point. A bound map computes it with replicas: nothing is cached on the user's physics.

    :param Map f: what ``iteration.bind(y, physics)`` returned.
    :param FixedPointIteration iteration: the iteration.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: forward operator.
    :return: a state.
    """
    return f.init(y) if isinstance(f, BoundIteration) else iteration.init(y, physics)


def starting_point(init: Init, f: Any, iteration: FixedPointIteration, y: Any, physics: Physics) -> State:
    r"""The starting point that a user gave, if it fits.

    :param torch.Tensor, tuple[torch.Tensor, ...], dict, Callable init: a state, or ``{"est": ...}`` as deepinv's optimisers keep one,
        or a function of ``y`` and ``physics`` that returns one.
    :param Map f: the bound map.
    :param FixedPointIteration iteration: whose own starting point has the shapes that are expected.
    :param torch.Tensor y: measurements.
    :param deepinv.physics.Physics physics: forward operator.
    :return: a copy, in the precision of ``iteration.init(y, physics)``.
    :raises TypeError: if it is no state of the iteration.
    :raises ValueError: if its shapes, dtypes or devices do not fit.
    """
    name, given = "init", cast(Any, init)
    with torch.no_grad():
        if callable(given) and not isinstance(given, Tensor):
            name, given = "init(y, physics)", given(y, physics)
        expected = _own_start_or_none(f, iteration, y, physics)
    given = _estimate(given, expected)
    tensors = as_tuple(given) if isinstance(given, (Tensor, tuple)) else ()
    like = tensors if expected is None else as_tuple(expected)
    one = isinstance(given if expected is None else expected, Tensor)
    if not (tensors and all(isinstance(t, Tensor) for t in tensors)) or (isinstance(given, Tensor), len(tensors)) != (
        one,
        len(like),
    ):
        what = type(given).__name__
        if isinstance(given, tuple):
            what = f"a tuple of {', '.join(type(t).__name__ for t in given) or 'nothing'}"
        wanted = "a tensor" if one or not like else f"a tuple of {len(like)} tensors"
        wanted += "" if expected is None else f" of shape {_shapes(like)}"
        raise TypeError(f"{name} must be {wanted} for {type(iteration).__name__}, got {what}.")
    if [t.shape for t in tensors] != [t.shape for t in like]:
        raise ValueError(
            f"{name} has shape {_shapes(tensors)}, but the iterates of {type(iteration).__name__} have shape {_shapes(like)} "
            f"for these measurements and {type(physics).__name__}: batch, channels and image size must agree."
        )
    for t, e in zip(tensors, like, strict=True):
        if t.device != e.device:
            raise ValueError(f"{name} is on {t.device}, but the iterates are on {e.device}: move it there.")
        if t.is_complex() != e.is_complex() or not (t.is_floating_point() or t.is_complex()):
            raise ValueError(f"{name} has dtype {t.dtype}, but the iterates have {e.dtype}: convert it.")
    # a copy: a denoiser that writes into its input must not change the user's tensor
    known = [
        e.dtype if e.is_floating_point() or e.is_complex() else t.dtype for t, e in zip(tensors, like, strict=True)
    ]
    ours = tuple(t.detach().to(dtype, copy=True) for t, dtype in zip(tensors, known, strict=True))
    return ours[0] if one else ours


def _estimate(given: Any, expected: State | None) -> Any:
    r"""A list as a tuple, and the state in a dictionary of deepinv's optimisers, which may keep more variables."""
    if isinstance(given, dict) and isinstance(given.get("est"), (tuple, list)) and given["est"]:
        single = len(given["est"]) == 1 if expected is None else isinstance(expected, Tensor)
        given = given["est"][0] if single else given["est"]
    return tuple(given) if isinstance(given, list) else given


def _own_start_or_none(f: Any, iteration: FixedPointIteration, y: Any, physics: Physics) -> State | None:
    r"""The iteration's own starting point; ``None`` where it has none, and there is nothing to compare a given one with."""
    try:
        return own_start(f, iteration, y, physics)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:
        return None


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
