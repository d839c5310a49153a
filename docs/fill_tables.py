"""Write the tables and plots of README.md and docs/ from the committed records: ``python docs/fill_tables.py [--check]``.

A block stands between ``<!-- NAME -->`` and ``<!-- end -->`` in Markdown, between ``.. NAME`` and ``.. end`` in reStructuredText.
A plot is drawn anew when its records or its script have changed: ``docs/_static/plots.json`` holds their digests.
"""

import hashlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "docs" / "_static"
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("cost.md", "faults.md", "results.md", "index.rst", "guide/fixed_points.rst", "guide/swap.md")
    ),
]
SOURCES = {  # block: the script and the function that render it
    "exactness": ("tests/benchmarks/exactness.py", "render"),
    "cost": ("tests/benchmarks/cost_tables.py", "render"),
    "cost gpu": ("tests/benchmarks/cost_tables.py", "render_gpu"),
    "compare": ("tests/benchmarks/cost_tables.py", "compare"),
    "faults": ("tests/benchmarks/fault_table.py", "render"),
    "findings": ("examples/paper/tables.py", "findings"),
    "results": ("examples/paper/tables.py", "render"),
    "shipped": ("examples/paper/shipped.py", "render"),
    "result plots": ("docs/result_plots.py", "render"),
    "swap": ("examples/swap/table.py", "render"),
    "table 1": ("examples/paper/tables.py", "summary"),
    "weights": ("examples/paper/weights_table.py", "render"),
    "facts": ("docs/facts.py", "render"),
}
PAPER = [
    f"examples/paper/{name}.py" for name in ("figures", "records", "paired", "losses", "models", "published", "data")
]
BENCHMARKS = [
    "tests/benchmarks/plots.py",
    "tests/benchmarks/records/cost-cpu.json",
    "tests/benchmarks/records/faults.json",
]
PLOTS = {  # group: the command that draws, and the files on which its plots depend
    "benchmarks": (["tests/benchmarks/plots.py", "docs/_static/benchmarks"], BENCHMARKS),
} | {
    f"results {scale}": (
        ["examples/paper/figures.py", "--plots", f"docs/_static/{scale}", "--scale", scale],
        [*PAPER, f"examples/paper/results/{scale}/*.json", "examples/paper/bound/*.json"],
    )
    for scale in ("small", "paper")
}


def filled(text: str) -> str:
    """A page with every marked block rendered again."""
    sys.path.insert(0, str(ROOT))
    for name, (source, function) in SOURCES.items():
        for pattern in (rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"(^\.\. {name}\n\n).*?(\n\.\. end$)"):
            if re.search(pattern, text, flags=re.S | re.M):
                table = runpy.run_path(str(ROOT / source))[function]()
                text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S | re.M)
    return text


def digests() -> dict[str, str]:
    """A digest of everything that each group of plots depends on. A scale without records has no plots."""
    found = {}
    for group, (_, patterns) in PLOTS.items():
        files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        if not group.startswith("results") or any("results" in path.parts for path in files):
            digest = hashlib.sha256()
            for path in files:
                digest.update(path.read_bytes())
            found[group] = digest.hexdigest()
    return found


def drawn() -> dict[str, str]:
    """The digests of the plots on hand."""
    path = STATIC / "plots.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    pages = {page: filled(page.read_text()) for page in PAGES}
    stale = [str(page.relative_to(ROOT)) for page, text in pages.items() if page.read_text() != text]
    now, before = digests(), drawn()
    redraw = [group for group in now if now[group] != before.get(group)]
    if "--check" in sys.argv:
        names = ", ".join(stale + [f"plots of {group}" for group in redraw])
        sys.exit(f"{names}: not what the records say. Run python docs/fill_tables.py." if names else 0)
    for page in stale:
        (ROOT / page).write_text(pages[ROOT / page])
    for group in redraw:
        subprocess.run([sys.executable, *PLOTS[group][0]], check=True, cwd=ROOT)
    if not any((ROOT / "examples" / "paper" / "bound").glob("*.json")):  # an empty plot
        for path in STATIC.glob("*/bound.png"):
            path.unlink()
    (STATIC / "plots.json").write_text(json.dumps(now, indent=1) + "\n")
