r"""Starts: whether they are states, and those for physics that are not linear."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from deepinv.physics import PhaseRetrieval, Physics
from torch import Tensor

from deepinv_deq.states import State, as_tuple, times

_SEEDED = threading.RLock()  # held while the global generators are seeded


def checked_start(state: Any, iteration: Any) -> State:
    r"""What an iteration starts from, if it is a state.

    :raises TypeError: with what was found.
    """
    tensors = (state,) if isinstance(state, Tensor) else tuple(state) if isinstance(state, Iterable) else ()
    if tensors and all(isinstance(t, Tensor) for t in tensors):
        if whole := [t.dtype for t in tensors if not (t.is_floating_point() or t.is_complex())]:
            raise TypeError(
                f"{type(iteration).__name__}.init(y, physics) returned {whole[0]}, and iterates need floating-point or complex numbers: "
                "convert the measurements, for example y.float()."
            )
        return state
    found = ", ".join(type(t).__name__ for t in tensors) or type(state).__name__
    raise TypeError(
        f"{type(iteration).__name__}.init(y, physics) must return a tensor or a tuple of tensors, got {found}."
    )


def start_of_non_linear(y: Any, physics: Physics) -> Tensor | None:
    r"""The inverse that a non-linear physics computes itself, such as the spectral method of phase retrieval; ``None`` if it has an
    adjoint only."""
    if type(physics).A_dagger is not Physics.A_dagger:
        start = _own_inverse(y, physics)
        if isinstance(start, Tensor):
            return start
    if hasattr(physics, "A_adjoint"):
        return None
    raise TypeError(
        f"{type(physics).__name__} has no adjoint and no A_dagger that returns one image, so there is no start: give "
        "custom_init=lambda y, physics: ... to the algorithm, or init= in the call of the model."
    )


def _own_inverse(y: Any, physics: Physics) -> Any:
    r"""``physics.A_dagger(y)``, the same for every call. The global random generators are left as they were.

    The spectral method gets its random start from a private generator. Another physics may draw numbers itself: meanwhile the global
    generators of the CPU and of the device of ``y`` are seeded, so other threads should not draw from them.
    """
    if isinstance(physics, PhaseRetrieval) and type(physics).A_dagger is PhaseRetrieval.A_dagger:
        image = physics.A_adjoint(y)
        drawn = torch.randn(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(0))
        return physics.A_dagger(y, x=drawn.to(image.device))
    device = next((t.device for t in as_tuple(y) if t.is_cuda), None)
    with _SEEDED, torch.random.fork_rng([] if device is None else [device]):
        torch.default_generator.manual_seed(0)
        if device is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        return physics.A_dagger(y)


def noise_like(x: Tensor, rng: torch.Generator) -> Tensor:
    r"""Uniform noise between zero and the largest modulus of each sample.

    :param torch.Tensor x: images of shape ``(B, C, H, W)``, real or complex.
    :param torch.Generator rng: random numbers, on the CPU.
    :return: images of the same shape.
    """
    drawn = torch.rand((*x.shape, 2) if x.is_complex() else x.shape, generator=rng)
    drawn = torch.view_as_complex(drawn) if x.is_complex() else drawn
    return times(x.abs().flatten(1).amax(dim=1), drawn.to(x))


def state_of(image: Tensor, start: State) -> State:
    r"""A state to start from an image.

    Further variables get the image, too: some iterations ignore the first. Those of another shape, or zero at the start, stay.

    :param torch.Tensor image: image of shape ``(B, C, H, W)``.
    :param torch.Tensor, tuple[torch.Tensor, ...] start: where the iteration starts by itself.
    :return: a state of the shapes of ``start``.
    """
    if isinstance(start, Tensor):
        return image
    own = [(t != 0).flatten(1).any(dim=1) for t in start[1:]]  # of each sample, whether it starts at something
    return image, *(times(some, image) if t.shape == image.shape else t for some, t in zip(own, start[1:], strict=True))
