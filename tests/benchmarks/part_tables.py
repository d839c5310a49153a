r"""One table for every part of :mod:`tests.benchmarks.cost`, as Markdown."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.limits import ADJOINT, MOST
from tests.benchmarks.names import NAMES, OURS
from tests.benchmarks.others import MOST as MOST_OF_OTHERS
from tests.benchmarks.ratios import over_limit, ratio

Row = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _methods(rows: list[Row]) -> str:
    def settings(row: Row) -> str:
        tolerances = row.get("tolerances", [row["tolerance"]] if "tolerance" in row else [])
        return ", ".join(f"{t:.1e}".replace(".0e", "e") for t in tolerances)

    exactness = next((name for name in ("gradient error", "error", "residual") if name in rows[0]), None)
    header = ["method", "tolerances", "evaluations", "VJPs", *([exactness] if exactness else []), "seconds", "/ ours"]
    body = []
    for row in rows:
        error = [f"{row[exactness]:.1e}" + ("" if row.get("exact enough", True) else " (missed)")] if exactness else []
        products = f"{row['vjps']:.1f}" if "vjps" in row else "–"
        numbers = [f"{row['evaluations']:.1f}", products, *error, f"{row['seconds']:.2f}", ratio(row)]
        body.append([row["method"], settings(row) or "–", *numbers])
    return markdown(header, body)


def _memory(rows: list[Row]) -> str:
    own = {r["task"]: r for r in rows if r["method"] == OURS}
    measures = {"MB": "peak MB"} | ({"tensor MB": "peak MB of tensors"} if "tensor MB" in rows[0] else {})
    header = ["task", "method"] + [column for label in measures.values() for column in (label, "ours / method")]
    body = [
        [NAMES[r["task"]], r["method"]]
        + [cell for m in measures for cell in (f"{r[m]:.0f}", f"{own[r['task']][m] / r[m]:.2f}")]
        for r in rows
    ]
    return markdown(header, body)


def _memory_growth(rows: list[Row]) -> str:
    body = [
        [str(r["iterations"]) + (", full GMRES" if r.get("full") else ""), str(r["passes"])]
        + [f"{r['MB']:.0f}", f"{r['loss MB']:.0f}"]
        for r in rows
    ]
    body = [row for k, row in enumerate(body) if row not in body[:k]]  # 10 iterations of 1 pass are in both series
    return markdown(["iterations", "passes", "MB", "MB held by the loss"], body)


def _limit(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count:.0f}" if count < float("inf") else f"> {MOST}"


def _over_the_limit(rows: list[Row]) -> str:
    header = ["what", "image", "full GMRES, plain", "full GMRES, preconditioned", "solver", "taken", "/ limit"]
    body = []
    for r in rows:
        limits = [_limit(r["variants"].get(kind)) for kind in ("plain", "preconditioned")]
        for method in (m for m in r if m.partition(",")[0] in ("anderson", "broyden", "gmres")):
            missed = r.get("error", 0.0) > ADJOINT
            over = f"missed: error {r['error']:.1e}" if missed else f"{over_limit(r, method):.2f}"
            taken = [_limit(r[method]), over.replace("inf", "–")]
            body.append([r["what"], str(r["image"] + 1), *limits, method, *taken])
    return markdown(header, body)


def _other_solvers(rows: list[Row]) -> str:
    body = []
    for r in rows:
        failed = r.get("failed") or ("" if r["reached"] else f"not reached: {r['error']:.1e}")
        numbers = [f"{r['evaluations']:.0f}", str(r["products"]), failed]
        body.append([r["method"], "ours" if r["preconditioned"] else "none", *numbers])
    notes = [
        f"One image. Solvers of other libraries have their default settings and are stopped after {MOST_OF_OTHERS} evaluations and Jacobian products."
    ]
    for method, products in {
        r["method"]: r["products"] for r in rows if r["evaluations"] <= 1 and not r["reached"]
    }.items():
        notes.append(f"{method}: the {products} Jacobian products end before the first Newton step.")
    return (
        markdown(["solver", "preconditioner", "evaluations", "Jacobian products", ""], body) + "\n\n" + " ".join(notes)
    )


def _counts(rows: list[Row]) -> str:
    body = [
        [NAMES[r["task"]], str(r.get("passes", "–")), f"{r.get('taped per pass', r.get('evaluation mode')):.2f}"]
        + [
            "evaluations with an autograd graph, per pass"
            if "passes" in r
            else "evaluations beyond the solver's, evaluation mode"
        ]
        for r in rows
    ]
    return markdown(["task", "passes", "measured", "what"], body)


def _overhead(rows: list[Row]) -> str:
    body = [
        [NAMES[r["task"]], f"{100 * r['share']:.1f} %", f"{100 * r['replica']:.1f} %" if "replica" in r else "–"]
        for r in rows
    ]
    return markdown(["task", "algebra of the solvers, share of a step", "replicas"], body)


def _penalty(rows: list[Row]) -> str:
    body = [[NAMES[r["task"]], r["step"], f"{r['seconds']:.2f}", f"{100 * r['share']:.0f} %"] for r in rows]
    return markdown(["task", "training step", "seconds of the step", "one measurement of ContractionLoss"], body)


def _scaling(rows: list[Row]) -> str:
    body = [[r["over"], ", ".join(map(str, r["sizes"])), *_growth(r)] for r in rows]
    header = ["over", "sizes (side or batch)", "seconds", "fitted exponent"]
    return markdown([*header, "peak MB of tensors", "fitted exponent of the memory"], body)


def _growth(r: Row) -> list[str]:
    cells = [", ".join(f"{s:.2f}" for s in r["seconds"]), f"{r['exponent']:.2f}"]
    if "bytes" not in r:
        return [*cells, "–", "–"]
    return [*cells, ", ".join(f"{b / 1e6:.0f}" for b in r["bytes"]), f"{r['exponent of bytes']:.2f}"]


def _threads(rows: list[Row]) -> str:
    body = [[NAMES[r["task"]], r["variant"], f"{r['seconds']:.2f}", f"{r['ratio']:.2f}"] for r in rows]
    return markdown(["task", "variant", "seconds", "/ one thread"], body)


def _data_parallel(rows: list[Row]) -> str:
    body = [
        [NAMES[r["task"]].split()[0], f"{r['alone']:.2f}", f"{r['together']:.2f}", f"{100 * r['overhead']:.1f} %"]
        for r in rows
    ]
    return markdown(
        ["task (128×128, batch 2 in each)", "seconds, one model each", "seconds, one shared model", "overhead"], body
    )


def _learned_start(rows: list[Row]) -> str:
    body = [[r["start"], str(r["images"]), f"{r['error']:.1e}", f"{r['evaluations']:.1f}"] for r in rows]
    return markdown(["start", "images", "its relative error", "evaluations to 1e-3 of the fixed point, mean"], body)


def _sparse(rows: list[Row]) -> str:
    r = rows[0]
    body = [[name, f"{1e3 * s:.1f}"] for name, s in r["seconds"].items()]
    note = f"Built in {r['build seconds']:.1f} s; largest relative error of A and Aᵀ {r['error']:.0e}."
    return markdown(["operator", "ms for A + Aᵀ"], body) + "\n\n" + note


def _options(rows: list[Row]) -> str:
    body = []
    for r in rows:
        if "failed" in r:
            body.append([NAMES[r["task"]], r["option"], "–", "–", "–", r["failed"].split("\n")[0]])
            continue
        numbers = [f"{r['evaluations']:.1f}", f"{r['vjps']:.1f}", f"{r['gradient error']:.1e}", f"{r['ratio']:.2f}"]
        body.append([NAMES[r["task"]], r["option"], *numbers])
    return markdown(["task", "variant", "evaluations", "VJPs", "gradient error", "seconds / default"], body)


def _warm(rows: list[Row]) -> str:
    body = [
        [
            r["task"].upper(),
            str(r["warm starts"]),
            *(", ".join(f"{w:.1f}" for w in r[key]) for key in ("work", "both passes")),
        ]
        + [f"{r['seconds']:.0f}", f"{r['psnr']:.2f}"]
        for r in rows
    ]
    header = ["task (64×64)", "`warm_starts`", "evaluations of the first pass, by epoch", "of both passes"]
    return markdown([*header, "seconds", "PSNR on unseen images"], body)


def _accelerator(rows: list[Row]) -> str:
    body = []
    for r in rows:
        if r["what"] == "graph":
            body += [[NAMES[r["task"]], *line] for line in _of_graph(r)]
        elif r["what"] == "checks":
            what = f"a solve to 1e-4, checked every {r['sync_every']} evaluations"
            body.append([NAMES[r["task"]], what, f"{r['seconds']:.3f} s, {r['evaluations']:.0f} evaluations"])
        else:
            what = "convolutions in TF32" if r["tf32"] else "convolutions in float32"
            body.append(
                [NAMES[r["task"]], f"residual after {r['evaluations']:.0f} evaluations, {what}", f"{r['residual']:.1e}"]
            )
    return markdown(["task", "what", "measured"], body)


def _of_graph(r: Row) -> list[list[str]]:
    lines = [["one evaluation", f"{r['eager ms']:.2f} ms"]]
    if "refused" in r:
        return [*lines, ["one evaluation, as a CUDA graph", f"not possible: {r['refused']}"]]
    lines += [
        ["one evaluation, as a CUDA graph", f"{r['graph ms']:.2f} ms"],
        ["building the graph", f"{1e3 * r['build']:.0f} ms"],
    ]
    return [
        *lines,
        ["a solve to 1e-4", f"{r['eager solve']:.3f} s"],
        ["a solve to 1e-4, evaluations as a CUDA graph", f"{r['graph solve']:.3f} s"],
        ["a solve to 1e-4 with `cuda_graphs=True`, which builds the graph", f"{r['option solve']:.3f} s"],
    ]


def _operations(rows: list[Row]) -> str:
    return markdown(
        ["task", "method", "operations"], [[NAMES[r["task"]], r["method"], f"{r['operations']:,}"] for r in rows]
    )


TABLES = {
    "sparse": ("A sparse matrix in the place of Tomography (batch 4, 128×128, 50 views)", _sparse),
    "counts": ("Evaluations that are not the solver's", _counts),
    "memory": ("Peak memory over two EI steps, batch 4", _memory),
    "growth of memory": ("Bytes of tensors at their peak: ours on MRI, one step of two images", _memory_growth),
    "equal error": ("An EI step at equal gradient error, against float64", _methods),
    "equal iterations": ("An EI step with 5 iterations in every solve", _methods),
    "inference": ("Reconstruction at equal true error (1e-3 of the fixed point in float64)", _methods),
    "over the limit": ("Evaluations and VJPs over the limit, per image", _over_the_limit),
    "other solvers": (
        f"Solvers of other libraries, one image, default restarts, at most {MOST_OF_OTHERS} evaluations and Jacobian products",
        _other_solvers,
    ),
    "overhead": ("Algebra of the solvers, and replicas", _overhead),
    "penalty": ("ContractionLoss in units of a training step, one image", _penalty),
    "scaling": ("Growth of the time and of the memory of a step", _scaling),
    "threads": ("Threads against chunks: an EI step, wall time", _threads),
    "data parallel": (
        "An EI step of two processes that train one model, and of two that train one each",
        _data_parallel,
    ),
    "learned start": ("A start that a network predicts: CT 128×128", _learned_start),
    "options": ("What each saving is worth, and what can be added", _options),
    "operations": ("Operations of an EI step with 5 iterations in every solve, one image", _operations),
    "accelerator": ("Evaluations, checks and TF32, one image", _accelerator),
    "warm starts": ("Remembering the fixed points of 24 training images", _warm),
}
