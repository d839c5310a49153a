r"""The tables of ``docs/cost.md``, from the committed records of :mod:`tests.benchmarks.cost`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.limits import ADJOINT
from tests.benchmarks.names import AN_IMAGE_AT_A_TIME, NAMES, OURS, TARGETS
from tests.benchmarks.part_tables import TABLES, markdown
from tests.benchmarks.ratios import Kind, best_peer, goal, over_limit, stopped

RECORDS = Path(__file__).parent / "records"


def render(device: str = "cpu") -> str:
    r"""Everything that was measured on a device, as Markdown."""
    path = RECORDS / f"cost-{device}.json"
    if not path.exists():
        return "Not measured yet."
    parts = json.loads(path.read_text())["parts"]
    blocks = [_machine(parts), dropdown("Targets", _targets(parts)), dropdown("Records", _records(parts))]
    for part, entry in parts.items():
        title, table = TABLES[part.split(",")[0]]
        if part.startswith("inference") and _compared_at(entry["rows"]) == "residual":
            title = "Reconstruction at equal true residual (1e-4)"
        name = next((NAMES[n] for n in NAMES if part.endswith(f", {n}")), "")
        blocks.append(dropdown(f"{title}{f': {name}' if name else ''}", table(entry["rows"])))
    return "\n\n".join(blocks)


def render_gpu() -> str:
    r"""Everything that was measured on a GPU, as Markdown."""
    return render("cuda")


def dropdown(title: str, text: str) -> str:
    r"""A table that opens on a click."""
    return f"````{{dropdown}} {title}\n\n{text}\n\n````"


def compare(device: str = "cpu") -> str:
    r"""What an EI step needs, method by method, in short: for the README."""
    parts = json.loads((RECORDS / f"cost-{device}.json").read_text())["parts"]
    measured = [p for p in parts if p.startswith(("equal error", "inference"))]
    rows = {part: {row["method"]: row for row in parts[part]["rows"]} for part in measured}
    peaks = {(row["task"], row["method"]): row["MB"] for row in parts["memory"]["rows"]}

    def times(part: str, method: str, measures: list[str]) -> str:
        cells = [rows[f"{part}, {task}"][method] for task in NAMES]
        return ", ".join(
            f"{'≥ ' * stopped(cell)}{cell['ratio']:.1f}×"
            + ("" if cell["exact enough"] else f" ({cell[measure]:.1g}, missed)")
            for cell, measure in zip(cells, measures, strict=True)
        )

    body = []
    errors = [_compared_at(parts[f"inference, {task}"]["rows"]) for task in NAMES]
    for method in (m for task, m in peaks if task == "ct" and not m.startswith(f"{OURS},")):
        memory = ", ".join(f"{peaks[task, method] / peaks[task, OURS]:.1f}×" for task in NAMES)
        body.append(
            [method, memory, times("equal error", method, ["gradient error"] * 2), times("inference", method, errors)]
        )
    goals = {"error": "within 1e-3 of the fixed point", "residual": "to a residual of 1e-4"}
    reached = ", ".join(dict.fromkeys(goals[error] for error in errors))
    return markdown(
        ["CT, MRI; ours = 1", "peak memory", f"EI step to a gradient within {_goals(parts)}", f"inference {reached}"],
        body,
    )


def _goals(parts: dict[str, Any]) -> str:
    goals = [goal(parts[f"equal error, {task}"]["rows"]) for task in NAMES]
    return ", ".join(f"{100 * each:.0f} %" for each in goals)


def _compared_at(rows: list[dict[str, Any]]) -> str:
    r"""What reconstructions have in common: the distance to the fixed point, ``"error"``; in older records the ``"residual"``."""
    return "error" if all("error" in row for row in rows) else "residual"


def _machine(parts: dict[str, Any]) -> str:
    return "Measured on: " + " — ".join(dict.fromkeys(map(_line, parts.values()))) + "."


def _line(entry: dict[str, Any]) -> str:
    m = entry["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    images = "real images" if entry["data"] else "phantoms"
    return f"{_computer(entry)}; {versions}; {images}; {entry['date']}"


def _computer(entry: dict[str, Any]) -> str:
    m = entry["machine"]
    return m["gpu"] or f"{m['cpu']}, {m['threads']} thread{'s' * (m['threads'] != 1)}"


def _records(parts: dict[str, Any]) -> str:
    r"""Date, model and images of every part."""
    body = [
        [part, entry["date"], entry["model"], entry["images"], _computer(entry)]
        for part, entry in sorted(parts.items())
    ]
    return markdown(["part", "date", "model", "images", "machine"], body)


def _targets(parts: dict[str, Any]) -> str:
    r"""The targets of the issue, each with what was measured and whether it was met."""
    rows = {part: entry["rows"] for part, entry in parts.items()}
    body: list[list[str]] = []

    def add(what: str, target: str, values: list[float], met: bool | None, unit: str = "{:.2f}") -> None:
        if values:
            shown = [unit.format(v) if v < float("inf") else "not reached" for v in values]
            verdict = {True: "met", False: "**missed**", None: "undecided"}[met]
            body.append([what, target, "; ".join(shown), verdict])

    kinds = [_compared_at(rows.get(f"inference, {task}", [])) for task in NAMES]
    known = " or ".join(dict.fromkeys(kinds))
    cells = rows.get("memory", [])
    if cells:
        kinds_of_memory = {"MB": "peak memory"} | (
            {"tensor MB": "peak bytes of tensors"} if "tensor MB" in cells[0] else {}
        )
        for measure, name in kinds_of_memory.items():
            peaks = {(r["task"], r["method"]): r[measure] for r in cells}
            for chunks, how in ((OURS, ""), (AN_IMAGE_AT_A_TIME, " with `chunk_size=1`")):
                for peer, target, label in (("deepinv DEQ", 0.1, "0.1"), ("TorchDEQ ift, Anderson", 0.2, "0.2")):
                    values = [peaks[t, chunks] / peaks[t, peer] for t in NAMES]
                    add(f"{name}, ours{how} / {peer} (CT, MRI)", f"≤ {label}", values, max(values) <= target)
    cells = rows.get("growth of memory", [])
    if cells:
        for what, label in (("iterations", "30, 100 iterations / at 10"), ("passes", "2, 4 passes / at 1")):
            first, *more = (r["MB"] - r["loss MB"] for r in cells if r["what"] == what and not r.get("full"))
            values = [m / first for m in more]
            flat = all(0.95 <= v <= 1.05 for v in values)
            add(f"peak memory at {label}, beyond what the loss holds", "0.95 … 1.05", values, flat)
    for part, what in (
        ("equal error", "EI step to a gradient within {:.0f} %, best peer / ours"),
        ("equal iterations", "EI step at equal iterations, best peer / ours"),
        ("inference", f"inference at equal true {known}, best peer / ours"),
    ):
        for task, wanted in TARGETS[part].items():
            if cells := rows.get(f"{part}, {task}", []):
                best, kind = best_peer(cells)
                note = "" if kind is Kind.EXACT else "; no peer is exact enough"
                named = what.format(100 * goal(cells))
                # the time of a method that ended by itself, but missed the goal, is no bound
                met = None if kind is Kind.INEXACT else best >= wanted
                unit = "≥ {:.2f}" if kind is Kind.STOPPED else "{:.2f}"
                add(f"{named} ({NAMES[task]}{note})", f"≥ {wanted}", [best], met, unit)
    for task in NAMES:
        cells = rows.get(f"over the limit, {task}", [])
        # a solve that stopped far from the solution took no products that count
        near = [r.get("error", 0.0) <= ADJOINT for r in cells]
        methods = ["anderson" if "anderson" in r else "gmres" for r in cells]
        values = [over_limit(r, m) if n else float("inf") for r, m, n in zip(cells, methods, near, strict=True)]
        add(f"evaluations, VJPs over the limit ({NAMES[task]})", "≤ 1.3", values, max(values, default=9.0) <= 1.3)
    counted = rows.get("counts", [])
    taped = [r["taped per pass"] for r in counted if "passes" in r]
    add("evaluations of F with an autograd graph, per pass", "1", sorted(set(taped)), set(taped) == {1.0})
    beyond = [r["evaluation mode"] for r in counted if "evaluation mode" in r]
    add(
        "evaluations beyond the solver's in evaluation mode",
        "0",
        sorted({round(b, 6) for b in beyond}),
        max(beyond, default=1) < 1e-6,
    )
    shares = [r["share"] + r.get("replica", 0.0) for r in rows.get("overhead", [])]
    what = "algebra of the solvers" + " and replicas" * any("replica" in r for r in rows.get("overhead", []))
    add(f"{what}, share of a step (CT, MRI)", "≤ 0.05", shares, max(shares, default=1) <= 0.05, "{:.3f}")
    for step in dict.fromkeys(r["step"] for r in rows.get("penalty", [])):
        shares = [r["share"] for r in rows["penalty"] if r["step"] == step]
        add(
            f"one measurement of ContractionLoss / a training step, {step} (CT, MRI)",
            "≤ 0.25",
            shares,
            max(shares) <= 0.25,
        )
    exponents = [r["exponent"] for r in rows.get("scaling", [])]
    over = ", over ".join(r["over"] for r in rows.get("scaling", []))
    add(f"exponent of time over {over}", "≤ 1.1", exponents, max(exponents, default=9) <= 1.1)
    exponents = [r["exponent of bytes"] for r in rows.get("scaling", []) if "bytes" in r]
    if exponents:
        add(f"exponent of memory over {over}", "≤ 1.1", exponents, max(exponents) <= 1.1)
    shares = [r["overhead"] for r in rows.get("data parallel", [])]
    add("data parallel, overhead of a step (CT, MRI)", "≤ 0.1", shares, max(shares, default=1) <= 0.1)
    taken = [r["evaluations"] for r in rows.get("learned start", []) if r["start"] == "learned start"]
    add("evaluations from a learned start (CT)", "≤ 12", taken, max(taken, default=99) <= 12, "{:.1f}")
    ratios = [r["ratio"] for r in rows.get("sparse", [])]
    add("A + Aᵀ, Tomography / sparse", "≥ 10", ratios, min(ratios, default=0) >= 10)
    return markdown(["what", "target", "measured", ""], body)
