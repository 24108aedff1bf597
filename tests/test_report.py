"""Reports as pages: valid, self-contained, escaped; tables that sort in a browser."""

import io

import numpy as np
import pytest
from PIL import Image
from report_checks import opened, read_report, sort_by

from detr_jax.viz.report import Folded, Gallery, Picture, Scale, Section, page, write_page
from detr_jax.viz.tables import Table

NASTY = "</style></script><img src=x onerror=alert(1)> & \"double\" 'single' {braces}"
COLUMNS = {
    "FFN": ["encoder.10", "encoder.2", "density 0.1", "density 0.03"],
    "points": ["-0.4 [-0.5, -0.2]", "+1.5 [+0.9, +2.0]", "-10.0 [-11.0, -9.0]*", ""],
    "share": ["58.8 %", "9.1 %", "100 %", "-"],
    "tokens": ["1,234", "1.5e+04", "99", "100"],
    "interval": ["[0.7, 0.9]", "[-0.1, 0.2]", "[0.5, 0.6]", "-"],
}
TABLE = Table(list(COLUMNS), list(zip(*COLUMNS.values(), strict=True)), total=["mean", "0.0", "", "", ""])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1500, 3), np.uint8))
    figure = io.BytesIO()
    photograph.resize((600, 200)).save(figure, "PNG")
    pictures = [Picture.of(photograph, NASTY, NASTY, 800)] * 2
    parts = [NASTY, {NASTY: NASTY, "number": 3}, TABLE, Table(["nothing"], []), Picture(figure.getvalue(), "a", "a")]
    parts += [Gallery(pictures, 400), Scale(NASTY, ["#000000", "#ff0000"], "0 %", NASTY), Folded(NASTY, {NASTY: NASTY})]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, NASTY, [Section(NASTY, parts), Section("end", [])])
    return path


def test_it_is_valid_and_needs_nothing_but_itself(report):
    found = read_report(report)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("img") == 3 and tags.count("table") == 2 and tags.count("script") == 1
    assert set(found.all("aria-sort")) == {"none"}


def test_texts_are_escaped(report):
    found = read_report(report)
    for tag in ("title", "h1", "h2", "a", "p", "dt", "dd", "figcaption", "b", "span", "summary"):
        assert NASTY in found.texts[tag], tag
    assert found.all("alt").count(NASTY) == 2 and "x" not in found.all("src") and not found.all("onerror")


def test_columns_of_numbers_are_found():
    assert TABLE.numeric == [False, True, True, True, True]
    assert Table(["text", "number"], [["1st", 2.0]]).numeric == [False, True]


def test_a_photograph_is_reduced_and_a_name_may_be_no_text(tmp_path):
    picture = Picture.of(Image.new("RGB", (3000, 1000)), "wide", "wide", 800)
    assert Image.open(io.BytesIO(picture.content)).size == (800, 267)
    write_page(tmp_path / "report.html", "photo \udcff.jpg", [])
    assert "<title>photo ?.jpg</title>" in (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page("<b>", [])


def test_tables_sort_in_a_browser(report):
    with opened(report) as browser:
        assert sort_by(browser, "points") == ["-10.0 [-11.0, -9.0]*", "-0.4 [-0.5, -0.2]", "+1.5 [+0.9, +2.0]", ""]
        assert sort_by(browser, "points") == ["+1.5 [+0.9, +2.0]", "-0.4 [-0.5, -0.2]", "-10.0 [-11.0, -9.0]*", ""]
        assert sort_by(browser, "share") == ["9.1 %", "58.8 %", "100 %", "-"]
        assert sort_by(browser, "tokens", key=" ") == ["99", "100", "1,234", "1.5e+04"]
        assert sort_by(browser, "interval", key="\n") == ["[-0.1, 0.2]", "[0.5, 0.6]", "[0.7, 0.9]", "-"]
        assert sort_by(browser, "FFN") == ["density 0.03", "density 0.1", "encoder.2", "encoder.10"]
        states = [th.get_attribute("aria-sort") for th in browser.find_elements("css selector", "th")]
        assert states == ["ascending", "none", "none", "none", "none", "none"]
        assert browser.find_element("css selector", "tfoot td").text == "mean"
