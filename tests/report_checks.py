"""What every report has to be: valid HTML that needs nothing but itself, and works in a browser."""

import contextlib
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = ("img", "link", "meta")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Page(HTMLParser):
    """The elements of a page, which has to close whatever it opens.

    Attributes:
        elements: names and attributes.
        texts: by name of the element that they are directly in.
    """

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, attribute: str) -> list[str | None]:
        """The values of an attribute, of whatever elements have it."""
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def read_report(path: Path) -> Page:
    """A report; it is valid, small, and has everything that it shows and links to."""
    text = path.read_text(encoding="utf-8")
    assert len(text) < 3_000_000 and "http://" not in text and "https://" not in text
    page = Page(text)
    ids = page.all("id")
    assert ids and len(ids) == len(set(ids))
    assert all(source.startswith("data:image/") for source in page.all("src"))
    assert set(page.all("href")) == {"data:,", *(f"#{id}" for id in ids)}
    assert all(page.all("alt"))
    return page


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A driver of a browser that shows a report; the test is skipped where there is no browser.

    There must be nothing in the browser's console in the end, and nothing beside a narrow or a wide screen.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[browser]'")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        session.get(path.absolute().as_uri())
        yield session
        for width in (1440, 390):
            screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            assert session.execute_script("return document.documentElement.scrollWidth") <= width
        assert session.get_log("browser") == []
    finally:
        session.quit()


def sort_by(session: Any, title: str, key: str | None = None) -> list[str]:
    """Clicks a header of the first table that has it, or presses a key on it; the cells of the column then."""
    header = next(th for th in session.find_elements("css selector", "th") if th.text == title)
    button = header.find_element("tag name", "button")
    button.click() if key is None else button.send_keys(key)
    rows = header.find_elements("xpath", "ancestor::table/tbody/tr")
    column = header.get_property("cellIndex")
    return [row.find_elements("tag name", "td")[column].text for row in rows]
