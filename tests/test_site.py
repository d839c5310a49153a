r"""The documentation in a real browser: what every page and every example must show."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

from tests.browser import CHROMIUM, DOCS, HTML, LARGEST, PHONE, browser, listed, page, prose, shown, site, survey  # noqa: F401

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")


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
    assert "tol" in text and "relative residual in natural units" in text
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


def test_examples_say_their_cpu_time():
    seconds = json.loads((DOCS / "auto_examples" / "cpu_seconds.json").read_text())
    examples = [path for path in (HTML / "auto_examples").glob("*/demo_*.html")]
    assert len(examples) >= 8
    for path in examples:
        text = path.read_text()
        assert f"This example took {seconds[path.stem]:.0f} s of CPU time" in text and "Total running time" not in text


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
