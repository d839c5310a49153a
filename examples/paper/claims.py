r"""
What the paper claims, and what the records say of it
=====================================================

Every claim is a difference of two cells that is above a threshold. It *holds*, *fails* or is *undecided* by two standard errors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import published
from losses import BEST, LOSSES
from models import METHODS
from paired import difference
from records import SPREAD_DB, Cell, Records, is_deq, is_fixed_point
from settings import has_older_settings, is_borrowed

BOTH = ("mri", "ct")


@dataclass(frozen=True)
class Claim:
    r"""That ``first`` exceeds ``second`` by more than ``threshold`` dB in the measure ``what``."""

    text: str
    first: Cell
    second: Cell
    threshold: float = 0.0
    what: str = "psnr"


def claims(records: Records) -> Iterator[Claim]:
    r"""All claims at one scale; the best rival is that with the highest mean."""
    cells = [(task, loss) for task in BOTH for loss in ("sup", "ei")]
    for t, s in cells:
        yield Claim("ID > JFB", (t, "deq-id", s), (t, "deq-jfb", s))
    for t, s in [*cells, *((t, BEST[t]) for t in BOTH)]:
        for rival in records.rivals(t, s)[:2] or ["modl"]:
            yield Claim("DEQ > rival", (t, "deq-id", s), (t, rival, "none" if rival == "denoiser" else s))
    for t in BOTH:
        yield Claim("supervised − EI < 1.3 dB", (t, "deq-id", "ei"), (t, "deq-id", "sup"), -1.3)
        yield Claim(
            "supervised − best without ground truth < 0.5 dB", (t, "deq-id", BEST[t]), (t, "deq-id", "sup"), -0.5
        )
    for t, better, worse in (
        ("mri", "ei-fixed", "ei"),
        ("ct", "ei-fixed", "ei"),
        ("ct", "ei-turned", "ei-fixed"),
        ("ct", "ei-turned", "moi"),
        ("ct", "split", "ei"),
        ("mri", "ei-sure", "ei"),
        *((t, BEST[t], other) for t in BOTH for other in ("es", "selfdeq")),
    ):
        yield Claim(f"{LOSSES[better].title} > {LOSSES[worse].title}", (t, "deq-id", better), (t, "deq-id", worse))
    for number, what in ((2, "pipeline_equivariance"), (3, "iteration_equivariance")):
        for t in BOTH:
            yield Claim(f"Table {number}: EI > supervised", (t, "deq-id", "ei"), (t, "deq-id", "sup"), what=what)


def rows(records: Records) -> tuple[list[list[str]], str]:
    r"""One line for each claim with records: the cells, the difference, the paper's, and the verdict; and how many claims lack a
    record, in a sentence that is empty if none does."""
    out, missing = [], 0
    for claim in claims(records):
        found = difference(records, claim.first, claim.second, claim.what)
        cells = f"{claim.first[0].upper()}: {name(claim.first)} − {name(claim.second)}"
        theirs = paper(claim)
        if found is None:
            missing += 1
            continue
        count = f"{found.images} images, {_seeds(*found.seeds)}"
        measured = f"{found.mean:+.2f} ± {found.error:.2f} dB ({count})"
        older = any(has_older_settings(r["config"]) for cell in (claim.first, claim.second) for r in records.of(*cell))
        verdict = found.verdict(claim.threshold) + found.caution + (", with *older settings*" if older else "")
        verdict += "" if _sound(records, claim.first, claim.second) else ", but **not a fixed point**"
        out.append([claim.text, cells, measured, theirs, _borrowed(records, claim), verdict])
    return out, f"{missing} claim{'s have' if missing != 1 else ' has'} no record yet." if missing else ""


def _sound(records: Records, *cells: Cell) -> bool:
    r"""Whether all DEQs of these cells reached their fixed points."""
    return all(is_fixed_point(r) for cell in cells for r in records.of(*cell) if is_deq(r))


def _borrowed(records: Records, claim: Claim) -> str:
    r"""Which of the two methods took the settings of another search."""
    borrowed = [any(is_borrowed(r["config"]) for r in records.of(*cell)) for cell in (claim.first, claim.second)]
    return "both" if all(borrowed) else ", ".join(t for t, b in zip(("first", "second"), borrowed, strict=True) if b)


def findings(records: Records) -> str:
    r"""Five sentences: both tasks against the best rival, both against supervised training, and the fixed points."""
    out = []
    for task in ("ct", "mri"):
        rivals = records.rivals(task, "sup", learned=True)
        if not rivals:
            out.append(f"{task.upper()}, supervised, the DEQ against its rivals: not measured yet.")
            continue
        pair = (task, "deq-id", "sup"), (task, rivals[0], "sup")
        about = (
            f"{task.upper()}, supervised, the DEQ against {METHODS[rivals[0]].title}, the best of {len(rivals)} rivals"
        )
        out.append(_sentence(records, about, pair, 0.0, "ahead by more than two standard errors"))
    for task in ("ct", "mri"):
        pair = (task, "deq-id", BEST[task]), (task, "deq-id", "sup")
        about = f"{task.upper()}, {LOSSES[BEST[task]].title} (no ground truth) against supervised training"
        out.append(_sentence(records, about, pair, -0.5, "within 0.5 dB"))
    deqs = [r for r in records.all if is_deq(r)]
    sound = sum(map(is_fixed_point, deqs))
    certified = sum(r["fixed_point"]["certified"] == r["images"] for r in deqs)
    out.append(
        f"In {sound} of {len(deqs)} trained DEQs, the PSNR from all starts agrees to {SPREAD_DB} dB on every test image. "
        f"The certificate is stricter: in {certified} of {len(deqs)} it holds for every image."
    )
    return "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(out, 1))


def _sentence(records: Records, about: str, pair: tuple[Cell, Cell], threshold: float, claim: str) -> str:
    found = difference(records, *pair)
    if found is None:
        return f"{about}: not measured yet."
    verdict = found.verdict(threshold).capitalize() + found.caution
    if found.caution and max(found.seeds) > 1:
        single = pair[found.seeds.index(1)][1]
        verdict += f" of {METHODS[single].title}"
    verdict += "" if _sound(records, *pair) else ". Not every training reached one fixed point on all images"
    return f"{about}: {found.mean:+.2f} ± {found.error:.2f} dB. Claim: {claim}. **{verdict}.**"


def _seeds(first: int, second: int) -> str:
    if first == second:
        return f"{first} seed{'s' * (first != 1)} each"
    return f"{first} and {second} seeds"


def name(cell: Cell) -> str:
    r"""A cell in words, without its task."""
    method = METHODS[cell[1]].title
    return method if cell[2] == "none" else f"{method} ({LOSSES[cell[2]].title})"


def paper(claim: Claim) -> str:
    r"""The same difference in the paper, if it has both cells."""
    known = published.TABLE_1
    if claim.what != "psnr" or claim.first not in known or claim.second not in known:
        return ""
    return f"*{known[claim.first] - known[claim.second]:+.2f}*"
