r"""Ratios of the records: times of the other methods over ours, and counts over their limits."""

from __future__ import annotations

from enum import Enum
from typing import Any

from tests.benchmarks.names import OURS

Row = dict[str, Any]


def goal(rows: list[Row]) -> float:
    r"""Error of the gradient at which EI steps are compared; it was the same in all records that do not name it."""
    return rows[0].get("goal", 1e-2)


class Kind(Enum):
    r"""What the time of the fastest method says: of one that is exact enough, all; if all were stopped before they were, a lower bound; if
    one ended by itself and missed the goal, nothing."""

    EXACT, STOPPED, INEXACT = range(3)


def best_peer(rows: list[Row]) -> tuple[float, Kind]:
    r"""Time of the fastest of the other methods that are exact enough, over ours; where none is, of the fastest."""
    others = [row for row in rows if not row["method"].startswith(OURS)]
    exact = [row for row in others if row.get("exact enough", True)]
    best = min(exact or others, key=lambda row: row["ratio"])["ratio"]
    if exact:
        return best, Kind.EXACT
    return best, Kind.STOPPED if all(stopped(row) for row in others) else Kind.INEXACT


def stopped(row: Row) -> bool:
    r"""Whether a method was ended by a limit before it was exact enough, so that its time is a lower bound."""
    return row.get("stopped", not row.get("exact enough", True))  # older records: a method that missed was ended


def ratio(row: Row) -> str:
    r"""Time over ours, as a table shows it."""
    shown = f"{row['ratio']:.2f}"
    products = f", {row['vjps']:.0f} VJPs" if "vjps" in row else ""
    return f"≥ {shown} (stopped after {row['evaluations']:.0f} evaluations{products})" if stopped(row) else shown


def over_limit(row: Row, method: str) -> float:
    r"""Taken over the limit; infinite where either was not reached."""
    taken = row[method] / row["optimum"]
    return taken if 0 < taken < float("inf") else float("inf")
