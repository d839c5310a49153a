r"""
Hyperparameters of a cell: defaults, and what the search found
==============================================================

A cell without a search trains with defaults only with ``--defaults``. Where its own search is not on record, it
takes the settings of the nearest search, in the order of :func:`sources`; its record says which, under ``settings_from``.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from data import HERE, SCALES, TASKS
from losses import LOSSES
from models import METHODS

SETTINGS = HERE / "settings.json"
_BOTH = {
    "alpha": 1.0,
    "n_trans": 1,
    "lr": 3e-4,
    "max_iter": 80,
    "grad_clip": 1.0,
    "backward_tol": 3e-2,
    "context": True,
}
# Tolerances are relative errors in units of the image (while training, and in tests), and of the cotangent. "bound" is the largest norm of
# the contractive part without a penalty, chosen on validation images (bound/, search/): their solves must agree to 0.05 dB from all starts.
# "contraction_weight" is the weight of that penalty, and "context" whether the network of a DEQ sees the linear reconstruction; for
# "saturation" see EquilibriumUNet. Gradients are clipped to "grad_clip"; at 1e-6 all have the same norm.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ct": _BOTH
    | {"alpha": 100.0, "stepsize": 1 / 51, "data_weight": 50.0}
    | {"forward_tol": 1e-4, "test_tol": 3e-6, "bound": 0.9, "contraction_weight": 0.05, "saturation": 3.0},
    "mri": _BOTH
    | {"stepsize": 1.0, "data_weight": 1.0}
    | {"forward_tol": 1e-3, "test_tol": 3e-5, "bound": 0.8, "contraction_weight": 0.7, "saturation": None},
}
# a few steps must get somewhere, and deepinv trains the stepsize
OWN: dict[str, dict[str, Any]] = {
    "unrolled": {"stepsize": 1.0, "data_weight": 1.0},
    "modl": {"stepsize": 1.0},
    "varnet": {"stepsize": 1.0},
    "denoiser": {"iterations": 30},
}
# whose search is the nearest, where there is none
RELATED_METHODS = {"deq-jfb": ("deq-id",), "modl": ("unrolled",), "lpd": ("unrolled",), "varnet": ("unrolled",)}
RELATED_LOSSES = {
    "ei-turned": ("ei-fixed", "ei"),
    "ei-fixed": ("ei",),
    "ei-sure": ("ei",),
    "moi": ("ei-turned", "ei"),
    "es": ("split", "ei-fixed", "ei"),
    "selfdeq": ("split", "ei-fixed", "ei"),
    "split": ("ei",),
}
_OF_DEQS = (
    "max_iter",
    "backward_tol",
    "forward_tol",
    "test_tol",
    "bound",
    "contraction_weight",
    "context",
    "saturation",
)
# what the settings of another method or loss say about this one, and what those of the same method say besides
_SHARED, _SAME_METHOD = ("lr", "grad_clip"), ("contraction_weight", "data_weight", "stepsize")
_RELATED_SCALES = {"paper": ("small",)}


class NotSearched(ValueError):
    r"""There are no settings for a cell, nor for one near it."""


def default_settings(task: str, method: str, loss: str, scale: str) -> dict[str, Any]:
    r"""What the search starts from, with the sizes of the scale."""
    kind = METHODS[method]
    s = dict(SCALES[scale][task]) | DEFAULTS[task] | LOSSES[loss].defaults | OWN.get(kind.family, {})
    s["epochs"] = s["epochs"].get(kind.epochs, 0)
    return s


def settings_of(
    task: str, method: str, loss: str, scale: str, found: dict[str, Any], *, defaults: bool = False
) -> dict[str, Any]:
    r"""Hyperparameters of a cell.

    :param dict found: what :func:`found_settings` read.
    :param bool defaults: use the defaults where nothing was searched.
    :return: the settings; ``settings_from`` names the search they come from.
    :raises NotSearched: if there is no search of this cell, nor of one near it.
    """
    s = default_settings(task, method, loss, scale)
    family = METHODS[method].family
    for at, who, what in sources(scale, family, loss):
        known = found.get(at, {}).get(task, {}).get(who, {}).get(what)
        if known is not None:
            same = (who, what) == (family, loss)
            shared = _SHARED + _SAME_METHOD * (who == family)
            kept = known if same else {k: v for k, v in known.items() if k in shared}
            return s | kept | {"settings_from": f"{at}/{task}/{who}/{what}"}
    if defaults:
        return s | {"settings_from": "defaults"}
    raise NotSearched(
        f"No hyperparameters were searched for {task} {family} {loss}: run search.py --task {task} --method {method} "
        f"--loss {loss} --scale {scale}, or pass --defaults."
    )


def sources(scale: str, family: str, loss: str) -> Iterator[tuple[str, str, str]]:
    r"""Scale, family and loss of the searches that may settle a cell, the nearest first: any of the same family before others."""
    for who in (family, *RELATED_METHODS.get(family, ())):
        for what in dict.fromkeys((loss, *RELATED_LOSSES.get(loss, ()), "sup")):
            for at in (scale, *_RELATED_SCALES.get(scale, ())):
                yield at, who, what


def found_settings() -> dict[str, Any]:
    r"""What ``search.py`` found on validation images."""
    return json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}


def outdated_settings(config: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    r"""What a record was made with that today's settings have otherwise: its own value and today's, by name.

    :param dict config: the ``config`` of a record.
    :param dict found: what :func:`found_settings` read.
    """
    method = METHODS[config["method"]]
    today = settings_of(config["task"], config["method"], config["loss"], config["scale"], found, defaults=True)
    ignored = {"settings_from", *(() if method.is_deq else _OF_DEQS)}
    pairs = {
        k: (config[k], list(v) if isinstance(v, tuple) else v) for k, v in today.items() if k in config.keys() - ignored
    }
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def has_older_settings(config: dict[str, Any]) -> bool:
    r"""Whether a record was made with other settings than today's."""
    return bool(outdated_settings(config, found_settings()))


def is_borrowed(config: dict[str, Any]) -> bool:
    r"""Whether the settings of a record come from the search of another method, loss or scale."""
    own = f"{config['scale']}/{config['task']}/{METHODS[config['method']].family}/{config['loss']}"
    return config.get("settings_from", own) != own


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    r"""Stop with the valid names where one is unknown."""
    if name not in valid:
        sys.exit(f"error: unknown {what} {name!r}: must be one of {', '.join(valid)}.")


def check(task: str, method: str, loss: str, scale: str) -> None:
    r"""Stop where a name is unknown, or a combination makes no sense."""
    check_name("task", task, TASKS)
    check_name("method", method, METHODS)
    check_name("loss", loss, LOSSES)
    check_name("scale", scale, SCALES)
    if reason := refusal(task, method, loss):
        sys.exit(f"error: {reason}.")


def refusal(task: str, method: str, loss: str) -> str | None:
    r"""Why a combination of known names makes no sense; ``None`` if it does."""
    if (METHODS[method].epochs is None) != (LOSSES[loss].build is None):
        return "--method denoiser is not trained and goes with --loss none, the other methods with any other loss"
    if task not in LOSSES[loss].tasks:
        return f"--loss {loss} is for {', '.join(LOSSES[loss].tasks)}, not for {task}"
    if task not in METHODS[method].tasks:
        return f"--method {method} is for {', '.join(METHODS[method].tasks)}, not for {task}"
    if method in LOSSES[loss].excludes:
        return f"--loss {loss} does not go with --method {method}: {LOSSES[loss].excludes[method]}"
    return None
