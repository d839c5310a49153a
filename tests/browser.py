r"""The documentation in a real browser: ``docs/_build/html``, built if it is missing, served on loopback, every page measured once."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[doc]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

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
      .filter((node) => getComputedStyle(node).display !== "inline")
      .filter((node) => !(node.querySelector("img") && getComputedStyle(node).overflowX === "auto")).map((node) => node.textContent.trim().slice(0, 40)),
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
