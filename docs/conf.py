"""Sphinx configuration. Build with ``python -m sphinx -W --keep-going docs docs/_build/html``; no network is needed."""

import os
import re
import sys
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))

import extras
import notebooks
from gallery_order import NewcomersFirst
from sphinx_gallery.sorting import ExplicitOrder

import deepinv_deq

HERE = Path(__file__).parent

project = "deepinv-deq"
author = "The deepinv-deq authors"
copyright = "2026, the deepinv-deq authors"  # noqa: A001
version = release = deepinv_deq.__version__
description = (
    "Deep equilibrium models for imaging inverse problems: exact implicit gradients, with or without ground truth"
)

# the address of the repository has one place, [project.urls] in pyproject.toml; example.org means "not published yet"
_address = re.search(r'^Repository = "(.*)"$', (HERE.parent / "pyproject.toml").read_text(), flags=re.M)[1]
repository = "" if "example.org" in _address else _address

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "extras",
]
exclude_patterns = ["_build", "inventories"]
templates_path = ["_templates"]
bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "plain"
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# deepinv's docstrings separate what a class does from its example with |sep|
rst_prolog = """
.. |sep| raw:: html

   <hr>
"""

autosummary_generate = True
# the guide page of each public name, for the line "See the guide" of its API page
autosummary_context = {"guide": extras.guide_pages()}
autodoc_typehints = "none"  # types are in the docstrings, as deepinv has them
autodoc_inherit_docstrings = False
nitpicky = True
# words that stand where a type does, and the names of types that have no page anywhere
nitpick_ignore = [("py:class", name) for name in ("Callable", "Sequence", "torchdeq.solver.stat.SolverStat")]
# private base classes, and names in docstrings of inherited methods that have no page
nitpick_ignore_regex = [
    ("py:class", r"deepinv_deq\.(.*\.)?_\w+(\.\w+)?"),
    ("py:class", r"deepinv_deq\.iterations\.(terms\.Terms|splitting\.MeasurementIteration|bound\.BoundIteration)"),
    ("py:class", r"Layout|Problem|Settings|DEQReconstructor"),
    ("py:meth", r"DEQReconstructor\.certify"),
    ("py:data", r"deepinv_deq\.solvers\.METHODS"),
]
suppress_warnings = ["config.cache"]  # sphinx-gallery's configuration holds objects that cannot be pickled

# -- links to other projects ---------------------------------------------------
# Their inventories are lists of the few names used here (inventories/*.txt), so that nothing is fetched to build the pages.
_SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "deepinv": "https://deepinv.github.io/deepinv/",
}


def _inventory(name: str) -> str:
    """Write a list of ``role name page`` as the compressed inventory that intersphinx reads."""
    lines = [line.split() for line in (HERE / "inventories" / f"{name}.txt").read_text().splitlines() if line.strip()]
    body = "".join(f"{target} {role} 1 {page} -\n" for role, target, page in lines)
    path = HERE / "_build" / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version:\n"
    header += "# The remainder of this file is compressed using zlib.\n"
    path.write_bytes(header.encode() + zlib.compress(body.encode()))
    return str(path)


intersphinx_mapping = {name: (site, _inventory(name)) for name, site in _SITES.items()}

# -- gallery -------------------------------------------------------------------
warnings.filterwarnings("ignore", message=".*(meshgrid|progress bar|[Ss]parse|non_blocking|pin_memory).*")
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": r"/demo_",
    "ignore_pattern": r"(/paper/|records\.py|ddp_train\.py|demo_sparse_view_ct\.py)",
    "subsection_order": ExplicitOrder(
        ["../examples/basics", "../examples/ct", "../examples/mri", "../examples/advanced"]
    ),
    "within_subsection_order": NewcomersFirst,
    "thumbnail_size": (360, 360),
    "reset_modules": ("matplotlib", extras.cpu_seconds),
    "reset_modules_order": "both",
    "write_computation_times": False,
    "backreferences_dir": "gen_modules/backreferences",
    "doc_module": ("deepinv_deq",),
    "reference_url": {"deepinv_deq": None},
    "image_scrapers": ("matplotlib",),
    "matplotlib_animations": (True, "jshtml"),
    "remove_config_comments": True,
    "download_all_examples": True,
    "notebook_images": False,
    "plot_gallery": "True",
    "abort_on_example_error": False,
    "min_reported_time": float("inf"),  # elapsed time; extras.py prints CPU time
    "first_notebook_cell": notebooks.install_cell(repository),
}
notebooks.use()

# -- pages ---------------------------------------------------------------------
html_theme = "pydata_sphinx_theme"
html_title = "deepinv-deq"
html_favicon = html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "show_prev_next": True,
    "logo": {"text": "deepinv-deq"},
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "header_links_before_dropdown": 7,
    "icon_links": [{"name": "Source", "url": repository, "icon": "fa-solid fa-code"}] if repository else [],
    "secondary_sidebar_items": {"*": ["page-toc"], "guide/*": ["page-toc"]},
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
_WIDE = ("index", "install", "quickstart", "results", "cost", "faults", "changelog", "cite", "contributing", "release")
html_sidebars = {name: [] for name in _WIDE}
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
