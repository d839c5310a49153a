r"""The documentation in a real browser: built, served on loopback, and looked at with headless Chromium.

It looks at the site in ``docs/_build/html``, and builds it (with the gallery, some minutes) if there is none.
"""

from __future__ import annotations

import functools
import http.server
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
PAGES = ["index.html", "install.html", "guide/implicit.html", "auto_examples/index.html", "api.html", "results.html"]
PAGES += ["auto_examples/basics/demo_id_vs_jfb.html", "api/deepinv_deq.Solver.html", "cost.html", "quickstart.html"]
PAGES += [
    "guide/choose.html",
    "guide/troubleshooting.html",
    "guide/migrate.html",
    "guide/fixed_points.html",
    "contributing.html",
]
PHONE = {"width": 375, "height": 800}


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
        page.wait_for_selector("#search-results ul.search li", timeout=15000)
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
    page.wait_for_selector("mjx-container", timeout=15000)
    assert page.locator("mjx-container").count() > 10 and page.locator("mjx-merror").count() == 0
    assert "\\frac" not in page.locator("article").inner_text()


@pytest.mark.parametrize(("name", "title"), [("results", "Results"), ("cost", "Benchmarks"), ("faults", "Robustness")])
def test_one_name_for_each_page(page, site, name, title):
    page.goto(f"{site}{name}.html")
    assert page.locator("article h1").count() == 1
    assert page.locator("article h1").inner_text().startswith(title)
    assert page.title().startswith(title)
    assert page.locator("header nav a").filter(has_text=title).count() >= 1


@pytest.mark.parametrize("name", PAGES)
def test_description_and_heading(page, site, name):
    page.goto(site + name)
    assert page.locator("h1").count() == 1
    assert len(page.locator("meta[name=description]").first.get_attribute("content")) > 40
    assert page.locator("meta[property='og:title']").count() == 1
    assert page.locator("article img:not([alt])").count() == 0


def test_animations_are_short_and_small():
    text = (HTML / "auto_examples" / "basics" / "demo_fixed_point.html").read_text()
    frames = re.findall(r"frames\[\d+\] = ", text)
    assert 0 < len(frames) <= 20
    assert len(text) < 900_000


@pytest.mark.parametrize("name", PAGES)
def test_legible_on_a_phone(page, site, name):
    page.set_viewport_size(PHONE)
    page.goto(site + name)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"] + 1
    size = page.locator("article p").first.evaluate("p => parseFloat(getComputedStyle(p).fontSize)")
    assert size >= 14


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
