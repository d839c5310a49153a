"""Write the tables of README.md and docs/ from the committed records: ``python docs/fill_tables.py [--check]``.

A block stands between ``<!-- NAME -->`` and ``<!-- end -->`` in Markdown, between ``.. NAME`` and ``.. end`` in reStructuredText.
"""

import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("cost.md", "faults.md", "results.md", "guide/swap.md", "index.rst")),
]
SOURCES = {  # block: the script and the function that render it
    "exactness": ("tests/benchmarks/exactness.py", "render"),
    "cost": ("tests/benchmarks/cost_tables.py", "render"),
    "compare": ("tests/benchmarks/cost_tables.py", "compare"),
    "ct": ("examples/ct/records.py", "render"),
    "faults": ("tests/benchmarks/fault_table.py", "render"),
    "findings": ("examples/paper/tables.py", "findings"),
    "results": ("examples/paper/tables.py", "render"),
    "swap": ("examples/swap/table.py", "render"),
    "table 1": ("examples/paper/tables.py", "summary"),
    "facts": ("docs/facts.py", "render"),
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


if __name__ == "__main__":
    pages = {page: filled(page.read_text()) for page in PAGES}
    stale = [page for page, text in pages.items() if page.read_text() != text]
    if "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"{names}: not what the records say. Run python docs/fill_tables.py." if stale else 0)
    for page in stale:
        page.write_text(pages[page])
