r"""Save and load a whole model, and the models that ship."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deepinv_deq.denoiser_settings import settings_of_file
from deepinv_deq.denoisers import EquilibriumUNet
from deepinv_deq.files import contents_of, read_weights, save_intact
from deepinv_deq.implicit import ModularIDHook
from deepinv_deq.iterations import DEADMM, DEHQS, DEGrad, DEProx, FixedPointIteration
from deepinv_deq.solvers import Solver

if TYPE_CHECKING:
    from deepinv_deq.reconstructor import DEQReconstructor

#: The iterations that can be saved: one line each. Their settings are the arguments of their constructors.
ITERATIONS: dict[str, type[FixedPointIteration]] = {c.__name__: c for c in (DEGrad, DEProx, DEHQS, DEADMM)}

_KEYS = {"iteration", "denoiser", "solver", "hook", "state_dict"}
# arguments of an iteration that are kept elsewhere, or not at all: the noise level is for denoisers that want one, which
# EquilibriumUNet does not
_APART = {"self", "denoiser", "sigma"}


def save(model: DEQReconstructor, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
    r"""Save a model with all that is needed to build it again.

    :param DEQReconstructor model: the model.
    :param str, os.PathLike path: file to write, at once or not at all.
    :param dict about: plain values to keep with it.
    :raises TypeError: if the iteration is none of :data:`ITERATIONS`, or its denoiser no :class:`EquilibriumUNet`.
    """
    iteration = model.iteration
    kind, denoiser = type(iteration).__name__, iteration.denoiser
    if ITERATIONS.get(kind) is not type(iteration) or type(denoiser) is not EquilibriumUNet:
        raise TypeError(
            f"Only {', '.join(ITERATIONS)} of an EquilibriumUNet can be saved with their settings, not {kind} of "
            f"{type(denoiser).__name__}. Save model.state_dict(), and build the model before you load it."
        )
    saved = {
        "iteration": kind,
        "settings": settings_of(iteration),
        "denoiser": denoiser.settings,
        "solver": _of_solver(model.solver),
        "hook": {"solver": _of_solver(model.hook.solver), "mode": model.hook.mode},
        "state_dict": {k: t.cpu().contiguous() for k, t in model.state_dict().items() if k != "iteration.sigma"},
        "about": about,
    }
    save_intact(saved, path)


def load(cls: type[DEQReconstructor], name: str | os.PathLike[str], **settings: Any) -> DEQReconstructor:
    r"""Build a model from a file.

    :param type cls: class of the model.
    :param str, os.PathLike name: name of a model that ships, or a file that :func:`save` wrote.
    :param settings: arguments of ``cls`` in the place of the saved ones.
    :return: the model, on the CPU.
    :raises FileNotFoundError: if there is no such model.
    :raises ValueError: if the file is broken, of something else, or of a later version.
    """
    saved = read_weights(name, "models")
    if not saved.keys() >= _KEYS:
        raise ValueError(
            f"{str(name)!r} is no DEQReconstructor: weights of a denoiser are for EquilibriumUNet(pretrained=...)."
        )
    kind = ITERATIONS.get(saved["iteration"]) if isinstance(saved["iteration"], str) else None
    if kind is None:
        raise ValueError(
            f"{str(name)!r} has the iteration {saved['iteration']!r}, this version {', '.join(ITERATIONS)}."
        )
    # version 0.1 kept one setting only, under its own name
    of_iteration = saved.get("settings", {"learn_stepsize": saved.get("learn_stepsize", False)})
    if not isinstance(of_iteration, dict):
        raise ValueError(f"{str(name)!r} holds no settings of {kind.__name__}, but a {type(of_iteration).__name__}.")
    unknown = [key for key in of_iteration if key not in inspect.signature(kind.__init__).parameters]
    if unknown:
        raise ValueError(
            f"{str(name)!r} was saved by a later version: {kind.__name__} has no {', '.join(unknown)} here."
        )
    with contents_of(name, "a DEQReconstructor"):
        hook = ModularIDHook(Solver(**saved["hook"]["solver"]), mode=saved["hook"]["mode"])
        parts: dict[str, Any] = {"solver": Solver(**saved["solver"]), "hook": hook}
        denoiser = EquilibriumUNet(**settings_of_file(saved["denoiser"], saved["state_dict"]))
        iteration = kind(denoiser, **of_iteration)
    model = cls(iteration, **(parts | settings))  # outside: wrong settings are not the fault of the file
    with contents_of(name, "a DEQReconstructor"):
        _take_dtypes(model, saved["state_dict"])
        model.load_state_dict(saved["state_dict"])
    return model


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    r"""Give every tensor of a model the dtype that it has in a state dictionary, and leave its memory format."""
    for name, own in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            own.data = own.data.to(state[name].dtype)


def settings_of(iteration: FixedPointIteration) -> dict[str, Any]:
    r"""The arguments of an iteration's constructor that build it again, besides its denoiser.

    Every argument is read from the attribute of its name, so a new one needs no line here.

    :param FixedPointIteration iteration: the iteration.
    :return: plain values and tensors by name.
    :raises TypeError: if an argument is kept in no attribute of its name, or is neither a plain value nor a tensor.
    """
    settings: dict[str, Any] = {}
    for name in inspect.signature(type(iteration).__init__).parameters:
        if name in _APART:
            continue
        if name.startswith("learn_") and not hasattr(iteration, name):
            settings[name] = name.removeprefix("learn_") in dict(iteration.named_parameters(recurse=False))
            continue
        value = getattr(iteration, name, _APART)
        if isinstance(value, Tensor):
            value = value.detach().cpu().clone() if value.ndim else value.item()  # one stepsize per channel, or one
        if not isinstance(value, (bool, int, float, str, tuple, type(None), Tensor)):
            raise TypeError(
                f"The argument {name} of {type(iteration).__name__} must be an attribute of the same name with a plain value or "
                f"a tensor to be saved, got {'nothing' if value is _APART else type(value).__name__}."
            )
        settings[name] = value
    return settings


def _of_solver(solver: Solver) -> dict[str, Any]:
    return {f.name: getattr(solver, f.name) for f in fields(solver) if f.init} | {"options": dict(solver.options)}
