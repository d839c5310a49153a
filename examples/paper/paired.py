r"""
Paired differences with standard errors
=======================================
"""

import math
import statistics
from dataclasses import dataclass

from data import TWINS
from records import Cell, Records


@dataclass(frozen=True)
class Difference:
    r"""Mean difference of two cells over test images, in dB.

    - ``error``: its standard error: that over images, and where a cell has several seeds, also that over seeds.
    - ``images``, ``seeds``: how many there were, of the first and of the second cell.
    """

    mean: float
    error: float
    images: int
    seeds: tuple[int, int]

    def verdict(self, threshold: float = 0.0) -> str:
        r"""Whether the difference is above a threshold, by two standard errors: ``"holds"``, ``"fails"`` or ``"undecided"``."""
        above = self.mean - threshold
        if abs(above) <= 2 * self.error or math.isnan(above):
            return "undecided"
        return "holds" if above > 0 else "fails"

    @property
    def caution(self) -> str:
        r"""What the verdict leaves out, as an addition to it: a cell of one seed says nothing about other seeds."""
        return ", on one seed" if min(self.seeds) == 1 else ""


def difference(records: Records, first: Cell, second: Cell, what: str = "psnr") -> Difference | None:
    r"""The difference of two cells; ``None`` if one of them has no valid record.

    :raises ValueError: if the two were tested on different numbers of images.
    """
    a, b = (records.images(*cell, what) for cell in (first, second))
    if not a or not b:
        return None
    a, b = ([independent(cell[0], seed) for seed in seeds] for cell, seeds in ((first, a), (second, b)))
    counts = {len(seed) for seed in (*a, *b)}
    if len(counts) > 1:
        raise ValueError(f"{first} and {second} were tested on {sorted(counts)} images: run them again.")
    gaps = [
        statistics.mean(p) - statistics.mean(q) for p, q in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]
    error = statistics.variance(gaps) / len(gaps) if len(gaps) > 1 else math.inf
    for seeds in (a, b):
        if len(seeds) > 1:
            error += statistics.variance([statistics.mean(seed) for seed in seeds]) / len(seeds)
    return Difference(statistics.mean(gaps), math.sqrt(error), len(gaps), (len(a), len(b)))


def independent(task: str, values: list[float]) -> list[float]:
    r"""Values of test images, of which two that are one image count once. The test images are the last tenth of a hundred."""
    first = 100 - len(values)
    drop = {twin - first for twin in TWINS.get(task, ())[1:]} if len(values) == 10 else set()
    return [v for i, v in enumerate(values) if i not in drop]
