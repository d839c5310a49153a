r"""The cheapest pair of tolerances, forward and backward, at which the error of a gradient is small enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Trial:
    r"""One gradient at one pair of tolerances.

    :param float error: relative error of the gradient.
    :param float work: evaluations, and two for every product.
    :param bool stopped: whether the solves were ended by a limit of the work.
    :param float seconds: of the gradient.
    :param dict count: evaluations and products.
    """

    error: float
    work: float
    stopped: bool
    seconds: float
    count: dict[str, float]


def cheapest(run: Callable[[int, int], Trial], start: Pair, lengths: Pair, enough: float) -> tuple[Pair, Trial]:
    r"""Search two lists of tolerances, each from loose to tight, separately.

    Both are tightened from the start until the error is small enough. Then both are loosened, one after the other, as far as
    the error allows. From there one is tightened in exchange for the other, in both directions, while that saves work.

    :param Callable run: measures one pair of indices. Each pair is measured once at most.
    :param tuple start: pair of indices.
    :param tuple lengths: of the two lists.
    :param float enough: goal for the error.
    :return: the pair and its trial. Its error is larger than ``enough`` if no pair on the way was good enough.
    """
    tried: dict[Pair, Trial] = {}

    def at(pair: Pair) -> Trial:
        if pair not in tried:
            tried[pair] = run(*pair)
        return tried[pair]

    pair = start
    while at(pair).error > enough:
        tighter = min(pair[0] + 1, lengths[0] - 1), min(pair[1] + 1, lengths[1] - 1)
        if at(pair).stopped or tighter == pair:
            return pair, at(pair)
        pair = tighter
    ends = [_exchanged(at, pair, axis, lengths, enough) for axis in (0, 1)]
    best = min(ends, key=lambda end: at(end).work)
    return best, at(best)


def _moved(pair: Pair, axis: int, by: int) -> Pair:
    return (pair[0] + by, pair[1]) if axis == 0 else (pair[0], pair[1] + by)


def _loosened(at: Callable[[Pair], Trial], pair: Pair, axis: int, enough: float) -> Pair:
    while pair[axis] > 0 and at(_moved(pair, axis, -1)).error <= enough:
        pair = _moved(pair, axis, -1)
    return pair


def _exchanged(at: Callable[[Pair], Trial], pair: Pair, axis: int, lengths: Pair, enough: float) -> Pair:
    r"""Loosen the tolerance of ``axis``, then the other one. Then tighten the other in exchange for ``axis`` while that saves work."""
    pair = _loosened(at, _loosened(at, pair, axis, enough), 1 - axis, enough)
    while pair[1 - axis] + 1 < lengths[1 - axis] and pair[axis] > 0:
        other = _moved(_moved(pair, 1 - axis, 1), axis, -1)
        if at(other).error > enough:
            break
        other = _loosened(at, other, axis, enough)
        if at(other).work >= at(pair).work:
            break
        pair = other
    return pair
