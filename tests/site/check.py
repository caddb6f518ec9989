"""Check the built documentation site in a headless browser; run by `nox -s docs`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

SITE = Path(os.environ["INCO_TRIO_SITE"])
WIDTHS = (1280, 390)
CUT_OFF = """
return [...document.querySelectorAll("article pre")]
    .filter(block => block.clientWidth && block.scrollWidth > block.clientWidth)
    .map(block => block.textContent.slice(0, 80));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        yield browser


def test_no_code_block_is_cut_off(browser: webdriver.Chrome) -> None:
    for width in WIDTHS:
        device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        for page in sorted(SITE.glob("*.html")):
            browser.get(page.as_uri())
            assert browser.execute_script("return innerWidth") == width
            assert browser.execute_script(CUT_OFF) == [], f"{page.name} at {width} pixels"


def test_no_table_is_shown_as_text() -> None:
    broken = [page.name for page in SITE.glob("*.html") if "<p>|" in page.read_text()]
    assert broken == []


def test_the_site_links_its_repository_and_shows_its_version() -> None:
    text = (SITE / "index.html").read_text()
    assert "https://github.com/inco-trio/inco-trio" in text
    assert "inco-trio 0." in text
    assert 'href="changelog.html"' in text
