r"""
Where the records come from: machines, settings, searches and training times
============================================================================
"""

import json
import statistics
from typing import Any

from data import HERE
from losses import LOSSES
from models import METHODS
from records import Records, matrix
from settings import found_settings, is_borrowed, outdated_settings


def provenance(records: Records) -> str:
    r"""Devices, versions, dates and times of the records, and how many cells lack one."""
    wanted = set(matrix(records.scale))
    done = {(c["task"], c["method"], c["loss"], c["seed"]) for c in (r["config"] for r in records.all)}
    parts = [f"{len(done & wanted)} of {len(wanted)} cells at scale *{records.scale}* have a valid record"]
    if records.outdated:
        parts.append(f"{len(records.outdated)} more are *old*: DEQs from before fixed points were checked, left out")
    if records.all:
        devices = sorted({r["device"].replace(" 1 threads", " 1 thread") for r in records.all})
        versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records.all})
        seconds, dates = [r["seconds"] for r in records.all], sorted({r["date"] for r in records.all})
        parts.append(f"on {'; '.join(devices)}; {'; '.join(versions)}; {dates[0]} to {dates[-1]}")
        parts.append(f"{max(seconds):.0f} s for the longest cell, {sum(seconds) / 3600:.1f} hours in all")
    borrowed = sorted({r["config"]["settings_from"] for r in records.all if is_borrowed(r["config"])})
    parts += [f"settings taken from other searches: {', '.join(borrowed)}"] if borrowed else []
    found = found_settings()
    parts += [
        f"{_name(r['config'])} was made with other settings than today's: "
        + ", ".join(f"{name} {then} instead of {now}" for name, (then, now) in changed.items())
        for r in records.all
        if (changed := outdated_settings(r["config"], found))
    ]
    return ". ".join(p[0].upper() + p[1:] for p in parts) + "."


def _name(config: dict[str, Any]) -> str:
    return f"{config['task'].upper()} {METHODS[config['method']].title} ({LOSSES[config['loss']].title}), seed {config['seed']},"


def training_times(records: Records) -> tuple[list[str], list[list[str]]]:
    r"""Training time of every method divided by that of the DEQ with the same training, for cells of one device: header and rows."""
    methods = [m for m in METHODS if METHODS[m].epochs is not None and m != "deq-id"]
    cells: dict[tuple[str, str, str, str], list[float]] = {}
    for r in records.all:
        c = r["config"]
        cells.setdefault((c["task"], c["loss"], r["device"].split(",")[0], c["method"]), []).append(r["seconds"])
    body = []
    for task, loss, device in dict.fromkeys(key[:3] for key in cells if key[3] == "deq-id"):
        base = statistics.mean(cells[task, loss, device, "deq-id"])
        known = [cells.get((task, loss, device, m)) for m in methods]
        if any(known):
            ratios = ["" if times is None else f"{statistics.mean(times) / base:.2f}" for times in known]
            body.append([task.upper(), LOSSES[loss].title, device, f"{base:.0f}", *ratios])
    return ["task", "training", "device", "DEQ, ID, seconds", *(METHODS[m].title for m in methods)], body


def searches(scale: str) -> tuple[list[str], list[list[str]]]:
    r"""Number of trials of every search on validation images: header and rows."""
    body = []
    for path in sorted((HERE / "search" / scale).glob("*_*_*.json")):
        task, family, loss = path.stem.split("_")
        body.append([task.upper(), family, LOSSES[loss].title, str(len(json.loads(path.read_text())))])
    return ["task", "methods", "training", "trials"], body
