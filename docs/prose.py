"""List every page with its heading, words, mean words a sentence and longest sentence: ``python docs/prose.py [--all]``.

Exits with 1 if a page exceeds 18 words a sentence on average, or 35 words in one sentence. ``--all`` prints the sentences beyond 35 words, too.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEAN, LONGEST = 18.0, 35
NAMES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "examples/README.rst"]
PATTERNS = ["docs/*.rst", "docs/*.md", "docs/guide/*.rst", "examples/*/README.rst", "examples/*/demo_*.py"]
PATTERNS += ["deepinv_deq/*.py", "deepinv_deq/*/*.py"]  # their docstrings are the pages of the API
RULE = r"(?P<rule>[=\-^~\"'*#])(?P=rule){2,}"  # underlines of headings


def pages() -> list[Path]:
    """All pages that a reader sees, without those that only include another."""
    found = [ROOT / name for name in NAMES] + [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    hidden = ("changelog.md", "contributing.md", "sg_execution_times.rst", "__init__.py")
    return [path for path in found if path.name not in hidden]


def text_of(path: Path) -> str:
    """The prose of a page: for a gallery script, its docstring and the comments of its text blocks; for a module, all docstrings."""
    source = path.read_text()
    if path.suffix != ".py":
        return source
    if "deepinv_deq" in path.relative_to(ROOT).parts:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        fields = r"^( *):(?:param [^:]*|return|raises [^:]*):"
        return "\n\n".join([path.stem + "\n===", *(re.sub(fields, r"\n\1-", text, flags=re.M) for text in found)])
    docstring = re.search(r'r?"""(.*?)"""', source, flags=re.S)
    blocks = re.findall(r"^# %%\n((?:#.*\n)*)", source, flags=re.M)
    return "\n\n".join([docstring[1] if docstring else "", *(re.sub(r"^# ?", "", b, flags=re.M) for b in blocks)])


def heading(text: str) -> str:
    """The first heading."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    found = re.search(rf"^# (.+)$|^(\S.*)\n{RULE}$", text, flags=re.M)
    return (found[1] or found[2]) if found else ""


def sentences(text: str) -> list[str]:
    """Sentences of paragraphs, bullets and table cells, without code, mathematics, tables of data and directives."""
    text = re.sub(r"```.*?```|<!-- (?!.*command).*?-->.*?<!-- end -->", "\n\n", text, flags=re.S)
    text = re.sub(
        r"^\.\. (code-block|math|literalinclude|toctree|footbibliography).*\n((\n| +.*\n)*)", "\n", text, flags=re.M
    )
    text = re.sub(r"^ *(\.\. .*|:[\w-]+:(?!`).*|>>> .*|\.\.\. .*|\|.*|=+( +=+)+)$", "", text, flags=re.M)
    text = re.sub(rf"^.*\n{RULE}$|^#+ .*$", "\n", text, flags=re.M)  # headings
    text = re.sub(r":[\w:]+:`[^`<]*`", "NAME", text)
    text = re.sub(r":[\w:]+:`([^`]*?)\s*<[^`]*>`", r"\1", text)
    text = re.sub(r"`+[^`]*`+", "NAME", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\S+  +\S)", text)
    found = []
    for block in blocks:
        flat = re.sub(r"^(\W*)([-*]|\d+\.) ", "", " ".join(block.split()))
        parts = re.split(r"(?<=[.!?:])[\"*)]*\s+(?=[\"*(]*[A-Z0-9])", flat)
        found += [part for part in parts if len(words(part)) > 2]
    return found


def words(sentence: str) -> list[str]:
    """Words of a sentence: runs with a letter in them, and numbers."""
    return re.findall(r"[\w'’./×%+-]*\w[\w'’/×%+-]*", sentence)


def main() -> int:
    """Print the table."""
    long, beyond = [], 0
    print(f"{'page':44} {'heading':52} {'words':>6} {'mean':>5} {'longest':>7}")
    for path in pages():
        text = text_of(path)
        found = sentences(text)
        lengths = [len(words(sentence)) for sentence in found] or [0]
        mean = sum(lengths) / len(lengths)
        bad = mean > MEAN or max(lengths) > LONGEST
        beyond += bad
        name = str(path.relative_to(ROOT))
        print(
            f"{name:44} {heading(text)[:52]:52} {sum(lengths):6} {mean:5.1f} {max(lengths):7}{'  beyond' if bad else ''}"
        )
        long += [f"{name}: {sentence}" for sentence in found if len(words(sentence)) > LONGEST]
    if "--all" in sys.argv:
        print("\n" + "\n".join(long))
    if beyond:
        print(
            f"{beyond} pages are beyond {MEAN:.0f} words a sentence or {LONGEST} words in one. --all prints the sentences."
        )
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
