r"""The parts of the site that need no browser: notebooks without roles, links on paths, summaries, tooltips of citations."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sphinx_gallery", reason="needs the tools of the site: pip install -e '.[doc]'")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

extras, notebooks, prose, nodes = map(importlib.import_module, ("extras", "notebooks", "prose", "docutils.nodes"))
EXAMPLES = sorted((ROOT / "examples").glob("*/demo_*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_text_of_notebooks_has_no_roles(path):
    text = notebooks.markdown(prose.text_of(path))
    assert not re.search(r":(?!math)[\w:]+:`|``|^\.\. \w+::", text.replace(".. code-block::", ""), flags=re.M)


def test_roles_become_what_a_reader_sees():
    text = "See :doc:`/guide/fixed_points`, :class:`~deepinv_deq.Solver`, ``x`` and :footcite:t:`mehta2025equivariant` :math:`x`."
    assert notebooks.markdown(text) == (
        "See *Fixed points: contraction and the certificate*, `Solver`, `x` and "
        "[Mehta et al. (2025)](https://arxiv.org/abs/2511.18667) :math:`x`."
    )
    assert notebooks.markdown(":footcite:p:`bai2019deep`") == "(Bai et al., 2019)"
    assert (
        notebooks.markdown(":ref:`sphx_glr_auto_examples_basics_demo_fixed_point.py`")
        == "*One fixed point, from every start*"
    )


def test_install_cell_does_nothing_where_the_package_is():
    for cell in (notebooks.install_cell(""), notebooks.install_cell("https://host/name")):
        lines = cell.splitlines()
        at = lines.index('if importlib.util.find_spec("deepinv_deq") is None:')
        assert lines[at + 1].startswith("    %pip install") and lines[-1] == "%matplotlib inline"
    assert "git+https://host/name" in cell


def linked(text, repository):
    config = SimpleNamespace(
        repository=repository, sphinx_gallery_conf={"filename_pattern": "/demo_", "ignore_pattern": "/paper/"}
    )
    literal = nodes.literal(text, text)
    tree = nodes.paragraph("", "", literal)
    extras.link_paths(SimpleNamespace(config=config, env=SimpleNamespace(docname="index")), tree)
    return tree.children[0]


def test_paths_are_links():
    page = linked("examples/basics/demo_fixed_point.py", "")
    assert page["reftarget"] == "/auto_examples/basics/demo_fixed_point"
    assert (
        linked("examples/paper/run.py", "https://host/name")["refuri"]
        == "https://host/name/blob/main/examples/paper/run.py"
    )
    assert linked("python examples/paper/run.py --all", "https://host/name")["refuri"].endswith(
        "/examples/paper/run.py"
    )
    assert linked("examples/paper", "https://host/name")["refuri"] == "https://host/name/tree/main/examples/paper"
    assert isinstance(linked("examples/paper/run.py", ""), nodes.literal)  # not published yet
    assert isinstance(linked("examples/no_such_file.py", "https://host/name"), nodes.literal)


def test_tooltips_of_citations():
    note = '<a class="footnote-reference brackets" href="#a" id="id1">1</a>'
    aside = '<aside class="footnote brackets" id="a" role="doc-footnote"><span>1</span><p>A. <em>Title</em> &amp; more. 2020.</p></aside>'
    context = {"body": f"<p>{note}</p>{aside}"}
    extras.citation_tooltips(None, "page", "page.html", context, None)
    assert 'href="#a" title="A. Title &amp; more. 2020."' in context["body"]


def test_guides_of_public_names():
    pages = extras.guide_pages()
    assert pages["deepinv_deq.Solver"] == ["/guide/solvers", "/guide/convergence"]
    assert all(pages.values())
