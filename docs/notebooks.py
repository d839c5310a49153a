"""Text of the gallery's notebooks: sphinx-gallery leaves roles of reStructuredText in them, which Jupyter prints raw."""

import re
from pathlib import Path

import sphinx_gallery.notebook
from pybtex.database import Person, parse_file

HERE = Path(__file__).parent


def install_cell(repository: str) -> str:
    """The first cell of every notebook. The package is installed only where it is missing.

    :param str repository: address of the published repository, or ``""``.
    """
    source = f'"deepinv-deq[dicom] @ git+{repository}"' if repository else '"/path/to/deepinv-deq[dicom]"'
    note = "" if repository else " Replace the path by that of your clone."
    return "\n".join(
        [
            f"# Install the package if it is missing.{note}",
            "import importlib.util",
            "",
            'if importlib.util.find_spec("deepinv_deq") is None:',
            f"    %pip install -q {source}",
            "%matplotlib inline",
        ]
    )


def _last_name(person: Person) -> str:
    return re.sub(r"[{}\\'\"]", "", " ".join(person.prelast_names + person.last_names))


def _citation(key: str, bracket: bool) -> str:
    """Authors and year, with a link if the entry has one."""
    entry = parse_file(str(HERE / "refs.bib")).entries[key]
    names = [_last_name(person) for person in entry.persons["author"]]
    authors = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    url = entry.fields.get("url") or (f"https://doi.org/{entry.fields['doi']}" if "doi" in entry.fields else "")
    if not url and (arxiv := re.search(r"arXiv:(\d+\.\d+)", entry.fields.get("journal", ""))):
        url = f"https://arxiv.org/abs/{arxiv[1]}"
    text = f"{authors}, {entry.fields['year']}" if bracket else f"{authors} ({entry.fields['year']})"
    text = f"[{text}]({url})" if url else text
    return f"({text})" if bracket else text


def _title(target: str) -> str:
    """Heading of a page of the documentation, or of an example."""
    label = re.fullmatch(r"sphx_glr_auto_examples_(\w+?)_(demo_\w+)\.py", target)
    names = [HERE.parent / "examples" / label[1] / f"{label[2]}.py"] if label else []
    names += [HERE / f"{target.lstrip('/')}{suffix}" for suffix in (".rst", ".md")]
    example = re.fullmatch(r"/?auto_examples/(\w+/demo_\w+)", target)
    names += [HERE.parent / "examples" / f"{example[1]}.py"] if example else []
    path = next(name for name in names if name.exists())
    found = re.search(r"^# (\S.*)$" if path.suffix == ".md" else r"^(\S.*)\n[=]{3,}$", path.read_text(), flags=re.M)
    assert found, path
    return found[1].replace("``", "`")


def _role(match: re.Match[str]) -> str:
    name, content = match["name"], " ".join(match["content"].split())
    title = re.fullmatch(r"(.*?)\s*<(.*)>", content)
    if name.startswith("footcite"):
        return "; ".join(_citation(key.strip(), name.endswith("p")) for key in content.split(","))
    if name in ("doc", "ref"):
        return f"*{title[1] if title else _title(content)}*"
    if title:
        return title[1]
    return f"`{content[1:].rsplit('.', 1)[-1] if content.startswith('~') else content}`"


def markdown(text: str) -> str:
    """Markdown of a text block without roles: literals, titles of pages, and citations with their links."""
    text = re.sub(r"^\.\. footbibliography::\s*$", "", text, flags=re.M)
    text = re.sub(r":(?P<name>(?!math)[a-z]+(?::[a-z]+)?):`(?P<content>[^`]+)`", _role, text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def use() -> None:
    """Replace sphinx-gallery's conversion (0.22), which knows ``:math:`` and ``:ref:`` only."""
    original = sphinx_gallery.notebook.rst2md
    if not hasattr(original, "__wrapped__"):

        def rst2md(text, *args, **kwargs):
            return original(markdown(text), *args, **kwargs)

        rst2md.__wrapped__ = original
        sphinx_gallery.notebook.rst2md = rst2md
