"""What the site adds to Sphinx: CPU times of examples, links on paths, tooltips of citations, descriptions of pages."""

import html
import json
import re
import time
from pathlib import Path

import sphinx.ext.autosummary
from docutils import nodes
from sphinx.addnodes import pending_xref

HERE = Path(__file__).parent
ROOT = HERE.parent
TIMES = HERE / "auto_examples" / "cpu_seconds.json"

# methods that the package calls itself; users neither call nor override them
INTERNAL = {
    "iterations": "natural networks select_constants split step extra_repr",
    "solvers": "chunks joined report verify cause join judge remainder",
    "metrics": "read",
    "equivariance": "system",
    "training": "check_clip_grad compute_loss load_model save_model setup_train",
}

_extract_summary = sphinx.ext.autosummary.extract_summary
_started = [0.0]


def guide_pages() -> dict[str, list[str]]:
    """Guide pages of every public name, as the sections of ``api.rst`` list them."""
    pages: dict[str, list[str]] = {}
    for section in re.split(r"\n(?=.*\n-{3,}\n)", (HERE / "api.rst").read_text()):
        guides = re.findall(r":doc:`([^`]+)`", "".join(re.findall(r"^Guide: .*$", section, flags=re.M)))
        for name in re.findall(r"^   (\w[\w.]*)$", section, flags=re.M):
            pages[f"deepinv_deq.{name}"] = [f"/{guide.lstrip('/')}" for guide in guides]
    return pages


def hide_internal(app, what, name, obj, skip, options):
    """Leave internal methods out of the API pages."""
    function = getattr(obj, "fget", None) or getattr(obj, "__func__", obj)
    part = f"{getattr(function, '__module__', '')}..".split(".")[1]
    return True if name in INTERNAL.get(part, "").split() else None


def summary_without_citations(doc, settings):
    """The summary of a class: its first sentence, uncut at "eq." and "Fig.", without citations, which have no footnote there."""
    lines = [re.sub(r"(, )?:footcite:[a-z]+:`[^`]*`", "", line).replace("()", "") for line in doc]
    return _extract_summary(lines, settings)


def cpu_seconds(gallery_conf, fname, when):
    """Record the CPU time of an example. sphinx-gallery itself reports elapsed time, which depends on what else runs."""
    if fname is None or when == "before":
        _started[0] = time.process_time()
        return
    known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    known[Path(fname).stem] = round(time.process_time() - _started[0], 1)
    TIMES.write_text(json.dumps(known, indent=1) + "\n")


def print_cpu_seconds(app, docname, source):
    """Write the CPU time above the download links of an example."""
    stem = docname.rsplit("/", 1)[-1]
    if not docname.startswith("auto_examples/") or not TIMES.exists():
        return
    seconds = json.loads(TIMES.read_text()).get(stem)
    if seconds is not None:
        line = f"This example took {seconds:.0f} s of CPU time.\n\n.. _sphx_glr_download_"
        source[0] = source[0].replace(".. _sphx_glr_download_", line, 1)


def link_paths(app, doctree):
    """Link every literal path of the repository: to its page in the gallery, or to the repository once it is published."""
    for node in list(doctree.findall(nodes.literal)):
        found = re.fullmatch(
            r"(?:python3? )?((?:examples|docs|tests|deepinv_deq|\.ci)/[\w./-]+)(?: .*)?", node.astext()
        )
        if not found or not (ROOT / (path := found[1])).exists():
            continue
        if node.parent is None or isinstance(node.parent, (nodes.reference, pending_xref)):
            continue
        page = re.sub(r"^examples/(.*)\.py$", r"auto_examples/\1", path)
        if page != path and re.search(app.config.sphinx_gallery_conf["filename_pattern"], path):
            if not re.search(app.config.sphinx_gallery_conf["ignore_pattern"], path):
                options = {"refdomain": "std", "reftype": "doc", "refexplicit": True, "refwarn": True}
                link = pending_xref("", node.deepcopy(), reftarget=f"/{page}", refdoc=app.env.docname, **options)
                node.replace_self(link)
                continue
        if app.config.repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            address = f"{app.config.repository}/{kind}/main/{path}"
            node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=address))


def citation_tooltips(app, pagename, templatename, context, doctree):
    """Show a reference when the pointer is on its citation. The theme shows the same text at the end of the page."""
    body = context.get("body", "")
    notes = dict(re.findall(r'<aside class="footnote brackets" id="([^"]+)".*?<p>(.*?)</p>', body, flags=re.S))
    if not notes:
        return

    def titled(match):
        text = " ".join(html.unescape(re.sub("<[^>]*>", "", notes.get(match[1], ""))).split())
        return f'{match[0]} title="{html.escape(text)}"' if text else match[0]

    context["body"] = re.sub(r'<a class="footnote-reference brackets" href="#([^"]+)"', titled, body)


def thumbnail_texts(app, pagename, templatename, context, doctree):
    """The title of an example as the alternative text of its thumbnail, which sphinx-gallery leaves empty."""

    def named(match):
        title = html.escape(html.unescape(re.sub("<[^>]*>", "", match[3])).strip())
        return f'{match[1]}alt="Example: {title}"{match[2]}{match[3]}</div>'

    pattern = r'(<div class="sphx-glr-thumbcontainer"(?:(?!alt=).)*?<img )alt=""(.*?<div class="sphx-glr-thumbnail-title">)(.*?)</div>'
    context["body"] = re.sub(pattern, named, context.get("body", ""), flags=re.S)


def ask_nobody(app, pagename, templatename, context, doctree):
    """Remove the link by which Matplotlib's animations load icons from another host, which the theme has. Name their frames."""
    if "maxcdn" in context.get("body", ""):
        body = re.sub(r'<link rel="stylesheet"\s+href="https://maxcdn[^>]*>', "", context["body"])
        context["body"] = re.sub(r'<img (id="_anim_img)', r'<img alt="Frames of the animation" \1', body)


def _summary(doctree, otherwise):
    """The first paragraph of a page, as plain text of at most 300 characters."""
    for paragraph in doctree.findall(nodes.paragraph) if doctree is not None else ():
        parent, paragraph = paragraph.parent, paragraph.deepcopy()
        for note in list(paragraph.findall(nodes.footnote_reference)):
            note.parent.remove(note)
        text = " ".join(paragraph.astext().split()).replace(" .", ".")
        if len(text) > 60 and not isinstance(parent, (nodes.Admonition, nodes.list_item, nodes.entry)):
            return text if len(text) <= 300 else text[:297].rsplit(" ", 1)[0] + " …"
    return otherwise


def describe(app, pagename, templatename, context, doctree):
    """A description for search engines and link previews, on every page."""
    title = html.unescape(re.sub("<[^>]*>", "", context.get("title") or app.config.project))
    text = app.config.description if pagename == "index" else _summary(doctree, f"{title}: {app.config.description}")
    tags = {"name": {"description": text}}
    tags["property"] = {"og:title": title, "og:description": text, "og:type": "website"}
    tags["property"]["og:site_name"] = app.config.project
    lines = [
        f'<meta {kind}="{key}" content="{html.escape(value)}">'
        for kind, values in tags.items()
        for key, value in values.items()
    ]
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)


def setup(app):
    """Connect everything."""
    app.add_config_value("repository", "", "env")
    app.add_config_value("description", "", "env")
    sphinx.ext.autosummary.extract_summary = summary_without_citations
    sphinx.ext.autosummary.WELL_KNOWN_ABBREVIATIONS += ("eq.", "eqs.", "Fig.", "Figs.", "Prop.", "cf.")
    app.connect("autodoc-skip-member", hide_internal)
    app.connect("source-read", print_cpu_seconds)
    app.connect("doctree-read", link_paths)
    for change in (ask_nobody, citation_tooltips, thumbnail_texts, describe):
        app.connect("html-page-context", change)
    return {"parallel_read_safe": True}
