r"""Every notebook of the gallery runs from top to bottom, without a network. Needs the tools of the site; ``.ci/run`` has them."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the tools of the site: pip install -e '.[doc]'")
preprocessors = pytest.importorskip(
    "nbconvert.preprocessors", reason="needs the tools of the site: pip install -e '.[doc]'"
)
pytest.importorskip("sphinx_gallery", reason="needs the tools of the site: pip install -e '.[doc]'")
ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*/demo_*.py") if path.stem != "demo_sparse_view_ct")

# the kernel itself talks to the test through sockets of ZeroMQ, which are not Python's
NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise OSError("an example asked for the network")

socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""


@pytest.fixture(scope="module")
def convert():
    r"""The notebook that the site offers for an example, made as the site makes it."""
    sys.path.insert(0, str(ROOT / "docs"))
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    notebooks = importlib.import_module("notebooks")
    notebooks.use()
    conf = {**DEFAULT_GALLERY_CONF, "first_notebook_cell": notebooks.install_cell(""), "notebook_images": False}

    def notebook(path):
        _, blocks = split_code_and_text_blocks(str(path))
        return nbformat.reads(json.dumps(jupyter_notebook(blocks, conf, str(path.parent))), as_version=4)

    return notebook


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_begin_with_an_install_cell_and_have_no_roles(convert, path):
    notebook = convert(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "code" and "%pip install" in notebook.cells[0].source
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r":[a-z:]+:`|``|^\.\. ", text, flags=re.M)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_notebooks_run_without_a_network(convert, path, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = convert(path)
    runner = preprocessors.ExecutePreprocessor(timeout=600, kernel_name="python3", resources={})
    runner.preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert not re.search(r"<matplotlib|/tmp/|it/s\]", printed)
