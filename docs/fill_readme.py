"""Write the tables of README.md from the committed records: ``python docs/fill_readme.py [--check]``."""

import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SOURCES = {"exactness": "tests/benchmarks/exactness.py", "ct": "examples/ct/records.py"}


def filled(text: str) -> str:
    """The README with every marked block rendered anew."""
    sys.path.insert(0, str(ROOT))
    for name, source in SOURCES.items():
        table = runpy.run_path(str(ROOT / source))["render"]()
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    before = README.read_text()
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit("README.md is not what the records say: run python docs/fill_readme.py" if after != before else 0)
    README.write_text(after)
