r"""The documentation in a real browser: built, served on loopback, and looked at with headless Chromium.

It looks at the site in ``docs/_build/html``, and builds it (with the gallery, some minutes) if there is none. ``survey`` visits every
page once and measures it. The tests then judge the measurements.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[doc]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")

DOCS = Path(__file__).parents[1] / "docs"
HTML = DOCS / "_build" / "html"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
DESKTOP = {"width": 1400, "height": 900}
PHONE = {"width": 375, "height": 800}
PATIENCE = 180_000  # milliseconds, for a machine that does other things
LARGEST = 1_000_000  # bytes of a page and its images
CONTRAST = 4.5  # of text, by the Web Content Accessibility Guidelines

# texts whose contrast to their background is too low, as "ratio: text"
CONTRASTS = """(least) => {
  const numbers = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (node) => {
    const layers = [];
    for (; node; node = node.parentElement) layers.push(numbers(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || !node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    if (!node.getClientRects().length || node.closest("script, style, svg, mjx-assistive-mml, .visually-hidden")) continue;
    const below = background(node), colour = over(numbers(getComputedStyle(node).color), below);
    const [low, high] = [light(below), light(colour)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < least) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 30)}`);
  }
  return [...new Set(found)];
}"""

# headings, descriptions, alternative texts, and blocks of code that need scrolling
MEASURES = """() => {
  const meta = (name) => (document.querySelector(`meta[name="${name}"], meta[property="${name}"]`) || {}).content || "";
  return {
    headings: [...document.querySelectorAll("h1")].length,
    title: document.title,
    description: meta("description"),
    graph: ["og:title", "og:description", "og:type", "og:site_name"].filter((name) => !meta(name)),
    images: [...document.querySelectorAll("article img")].map((image) => [image.currentSrc, image.alt, image.naturalWidth]),
    scrolling: [...document.querySelectorAll("pre")].filter((pre) => pre.scrollWidth > pre.clientWidth + 1)
      .map((pre) => pre.textContent.split("\\n").sort((a, b) => b.length - a.length)[0]),
  };
}"""

# what a narrow screen hides: width of the document, letters, columns that cannot be reached, and parts of the navigation beyond the edge
NARROW = """() => {
  const reachable = (node) => {
    for (; node && node.scrollWidth <= node.clientWidth + 1; node = node.parentElement) if (node.tagName === "ARTICLE") return true;
    return node && ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  };
  const shown = (node) => node.checkVisibility() && node.getClientRects().length;
  const edge = document.documentElement.clientWidth + 1;
  return {
    width: document.documentElement.scrollWidth,
    letters: Math.min(...[...document.querySelectorAll("article p")].map((p) => parseFloat(getComputedStyle(p).fontSize))),
    columns: [...document.querySelectorAll("article table")].filter((table) => shown(table) && !reachable(table)).length,
    cut: [...document.querySelectorAll("article h1, article h2, article h3, article p, article li, article dt")].filter(shown)
      .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth && !node.querySelector("table, pre, .math"))
      .filter((node) => getComputedStyle(node).display !== "inline").map((node) => node.textContent.trim().slice(0, 40)),
    clipped: [...document.querySelectorAll("header a, header button, header label")].filter(shown)
      .filter((node) => { const r = node.getBoundingClientRect(); return r.left < -1 || r.right > edge; })
      .map((node) => node.textContent.trim().slice(0, 20) || node.className),
  };
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    r"""Address of the site."""
    if not (HTML / "index.html").exists():
        subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(HTML)], check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(site, browser):
    r"""A page that fails the test if its console has an error, or if it asks another host for anything."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    page, errors, strangers = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def asked(request):
        if not request.url.startswith((site, "data:", "blob:")):
            strangers.append(request.url)

    page.on("request", asked)
    yield page
    context.close()
    assert not errors and not strangers


@pytest.fixture(scope="module")
def survey(site, browser):
    r"""Measurements of every page, by its path: in both themes on a desktop, and on a phone."""
    context, measured = browser.new_context(viewport=DESKTOP), {}
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(HTML.rglob("*.html")):
        if "_static" in path.parts:
            continue
        asked.clear()
        page.set_viewport_size(DESKTOP)
        page.goto(site + path.relative_to(HTML).as_posix())
        page.add_style_tag(content="* { transition: none !important; animation: none !important }")
        found = page.evaluate(MEASURES)
        for theme in ("light", "dark"):
            page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
            found[theme] = page.evaluate(CONTRASTS, CONTRAST)
        page.set_viewport_size(PHONE)
        found["phone"] = page.evaluate(NARROW)
        found["strangers"] = [url for url in asked if not url.startswith((site, "data:", "blob:"))]
        own = [
            HTML / unquote(urlparse(url).path).lstrip("/")
            for url in asked
            if "/_images/" in url and url.startswith(site)
        ]
        found["bytes"] = path.stat().st_size + sum(image.stat().st_size for image in set(own))
        measured[path.relative_to(HTML).as_posix()] = found
    context.close()
    return measured


def listed(survey, choose):
    r"""Pages with what ``choose`` finds on them, for pages on which it finds something."""
    found = {name: choose(page) for name, page in survey.items()}
    return {name: what for name, what in found.items() if what}


def prose(name):
    r"""Whether a page was written by us: no index, no listing of source code."""
    return not name.startswith(("_modules/", "genindex", "py-modindex", "search"))


def shown(page, selector):
    r"""Whether all images that match are there and have pixels."""
    images = page.locator(selector)
    assert images.count() > 0
    return all(
        images.nth(i).evaluate("image => image.complete && image.naturalWidth > 50") for i in range(images.count())
    )


def test_landing_page(page, site):
    page.goto(site)
    assert "deepinv-deq" in page.title()
    assert shown(page, "article figure img")
    assert "DEQReconstructor(" in page.locator("div.highlight-python").first.inner_text()
    for name in ("Quickstart", "User guide", "Examples", "API", "Results", "Benchmarks", "Robustness"):
        assert page.locator(".sd-card").filter(has_text=name).count() >= 1


def test_search_finds_what_people_look_for(page, site):
    words = {
        "tolerance": "solvers",
        "ModularIDHook": "ModularIDHook",
        "jfb": "demo_id_vs_jfb",
        "singular": "troubleshooting",
    }
    for word, expected in words.items():
        page.goto(f"{site}search.html?q={word}")
        page.wait_for_selector("#search-results ul.search li")
        links = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
        assert any(expected in link for link in links), word


def test_gallery_page_has_figures_and_downloads(page, site):
    page.goto(f"{site}auto_examples/basics/demo_id_vs_jfb.html")
    assert shown(page, "img.sphx-glr-single-img")
    links = page.locator("a.reference.download").evaluate_all("links => links.map(link => link.href)")
    notebook = next(link for link in links if link.endswith(".ipynb"))
    assert page.request.get(notebook).json()["cells"]
    assert any(link.endswith(".py") for link in links)


def test_an_animation_plays(page, site):
    page.goto(f"{site}auto_examples/basics/demo_fixed_point.html")
    frame = page.locator(".animation img").first
    before = frame.get_attribute("src")
    page.locator(".animation button[title='Next frame']").first.click()
    assert frame.get_attribute("src") != before


def test_api_pages_name_parameters_and_examples(page, site):
    page.goto(f"{site}api.html")
    names = page.locator("article table a").all_inner_texts()
    assert {"DEQReconstructor", "ModularIDHook", "Solver", "FromOptim"} <= set(names)
    page.goto(f"{site}api/deepinv_deq.Solver.html")
    text = page.locator("article").inner_text()
    assert "tol" in text and "relative error in natural units" in text
    assert page.locator("article .sphx-glr-thumbnails img").count() > 0


def test_mathematics_is_rendered(page, site):
    page.goto(f"{site}guide/implicit.html")
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-container").count() > 10 and page.locator("mjx-merror").count() == 0
    assert "\\frac" not in page.locator("article").inner_text()


@pytest.mark.parametrize(("name", "title"), [("results", "Results"), ("cost", "Benchmarks"), ("faults", "Robustness")])
def test_one_name_for_each_page(page, site, name, title):
    page.goto(f"{site}{name}.html")
    assert page.locator("article h1").count() == 1
    assert page.locator("article h1").inner_text().startswith(title)
    assert page.title().startswith(title)
    assert page.locator("header nav a").filter(has_text=title).count() >= 1


def test_every_page_has_one_heading_and_a_description(survey):
    assert len(survey) > 50
    assert not listed(survey, lambda page: page["headings"] != 1)
    assert not listed(survey, lambda page: not page["title"] or len(page["description"]) < 40 or page["graph"])
    texts = [page["description"] for name, page in survey.items() if prose(name) and not name.startswith("api/")]
    assert len(set(texts)) > 0.8 * len(texts)  # a page describes itself


def test_every_image_is_there_and_has_an_alternative_text(survey):
    def bad(page):
        return [source for source, text, width in page["images"] if len(text.split()) < 2 or not width]

    assert not listed(survey, bad)


def test_no_page_asks_another_host(survey):
    assert not listed(survey, lambda page: page["strangers"])


def test_pages_are_small(survey):
    assert not listed(survey, lambda page: page["bytes"] > LARGEST and page["bytes"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_code_have_contrast(survey, theme):
    assert not listed(survey, lambda page: page[theme])


def test_code_is_read_without_scrolling(survey):
    assert not listed({name: page for name, page in survey.items() if prose(name)}, lambda page: page["scrolling"])


def test_a_phone_shows_everything(survey):
    assert not listed(survey, lambda page: page["phone"]["width"] > PHONE["width"] + 1 and page["phone"]["width"])
    assert not listed(survey, lambda page: page["phone"]["columns"])
    assert not listed(survey, lambda page: page["phone"]["cut"])
    assert not listed(survey, lambda page: page["phone"]["clipped"])
    assert not listed(survey, lambda page: page["phone"]["letters"] is not None and page["phone"]["letters"] < 13)


def test_examples_say_their_cpu_time_which_is_short():
    seconds = json.loads((DOCS / "auto_examples" / "cpu_seconds.json").read_text())
    examples = [path for path in (HTML / "auto_examples").glob("*/demo_*.html")]
    assert len(examples) >= 8
    for path in examples:
        text = path.read_text()
        assert f"This example took {seconds[path.stem]:.0f} s of CPU time" in text and "Total running time" not in text
        assert seconds[path.stem] < 90, path.stem


def test_outputs_of_examples_have_no_noise():
    noise = r"<matplotlib|<deepinv|Warning|/tmp/|/home/|/work/|\.py:\d+|it/s\]|\bobject at 0x"
    for path in (HTML / "auto_examples").glob("*/demo_*.html"):
        for output in re.findall(r'<div class="sphx-glr-script-out.*?</pre>', path.read_text(), flags=re.S):
            assert not re.search(noise, html.unescape(re.sub("<[^>]*>", "", output))), path.stem


def test_thumbnails_are_square_and_legible():
    from PIL import Image

    thumbs = list((DOCS / "auto_examples").glob("*/images/thumb/*.png"))
    assert len(thumbs) >= 8
    for path in thumbs:
        pixels = Image.open(path).convert("L")
        assert pixels.width == pixels.height >= 300, path.name
        left, top, right, bottom = pixels.point(lambda value: 255 if value < 250 else 0).getbbox()
        assert right - left > 0.8 * pixels.width and bottom - top > 0.8 * pixels.height, path.name


def test_api_summaries_are_not_cut_and_internal_methods_are_hidden(page, site):
    page.goto(f"{site}api.html")
    rows = page.locator("article table tr").all_inner_texts()
    summaries = [row.split("\t", 1)[1].strip() for row in rows if "\t" in row]
    assert len(summaries) > 30
    assert not [text for text in summaries if not text.endswith(".") or text.endswith(("eq.", "Fig.", "e.g.", "i.e."))]
    assert not [text for text in summaries if text.count("(") != text.count(")")]
    for name, hidden in {
        "DEGrad": "natural",
        "Solver": "verify",
        "SolverStat": "join",
        "PipelineEquivariance": "system",
    }.items():
        page.goto(f"{site}api/deepinv_deq.{name}.html")
        assert page.locator(f"dt[id='deepinv_deq.{name}.{hidden}']").count() == 0
        assert page.locator("article").get_by_text("Guide:").count() == 1


def test_guide_and_examples_lead_to_each_other(page, site):
    page.goto(f"{site}guide/fixed_points.html")
    assert page.locator(".sphx-glr-thumbnails img").count() >= 1
    page.goto(f"{site}auto_examples/basics/demo_fixed_point.html")
    assert page.locator("article a[href$='guide/fixed_points.html']").count() >= 1


def test_citations_show_the_reference(page, site):
    page.goto(f"{site}guide/losses.html")
    notes = page.locator("a.footnote-reference")
    titles = notes.evaluate_all("notes => notes.map(note => note.title)")
    assert titles and all(re.search(r"\d{4}", title) for title in titles)


def test_animations_are_short_and_small():
    text = (HTML / "auto_examples" / "basics" / "demo_fixed_point.html").read_text()
    frames = re.findall(r"frames\[\d+\] = ", text)
    assert 0 < len(frames) <= 20
    images = re.findall(r'frames\[\d+\] = "data:image/png;base64,([^"]*)"', text)
    assert len(images) == len(frames) and sum(map(len, images)) * 3 / 4 < 500_000


class _Links(HTMLParser):
    r"""Where a page leads to, and what in it can be led to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def test_no_internal_link_is_broken(site):
    pages = {path.resolve(): _Links(path) for path in HTML.rglob("*.html") if "_static" not in path.parts}
    broken = []
    for path, parsed in pages.items():
        for link in parsed.links:
            target, anchor = urldefrag(link)
            if urlparse(target).scheme or target.startswith("//"):
                continue
            there = (path.parent / unquote(urlparse(target).path)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            known = (
                there in pages and anchor and anchor not in ("", "top") and unquote(anchor) not in pages[there].anchors
            )
            if not there.exists() or known:
                broken.append(f"{path.relative_to(HTML.resolve())} -> {link}")
    assert len(pages) > 30 and not broken
