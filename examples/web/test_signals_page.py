"""Test the page in a real browser; `inco-trio send` and `inco-trio wait` act as core 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

HANG = 300
"""Timeout in seconds. Only a hang reaches this limit."""
PROGRAM = Path(__file__).with_name("signals_page.py")


@attrs.define
class Service:
    """The program signals_page.py on a `unix:` link. The sockets of the link are in `home`."""

    home: Path
    port: str = "0"
    process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start the program and return the address of the page."""
        link = f"unix:{self.home}/core0,peer={self.home}/core1"
        command = [sys.executable, str(PROGRAM), link, f"{self.home}/irq", self.port]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("listening on "), said
        self.port = said.strip().rpartition(":")[2]
        return said.split()[-1]

    def stop(self) -> None:
        """Stop the program with SIGTERM, as a supervisor does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(HANG) == 0
            self.process = None

    def core1(self, *words: str) -> None:
        """Run an `inco-trio` command as core 1, and check that it succeeds."""
        link = f"unix:{self.home}/core1,peer={self.home}/core0"
        command = [sys.executable, "-m", "inco_trio", *words, "--as", "core1", link]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    # /dev/shm is small in many containers.
    for option in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(option)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root with its sandbox.
    with webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")) as browser:
        yield browser


def wait_shown(browser: webdriver.Chrome, selector: str, text: str) -> None:
    """Wait until an element of the page has this text."""

    def shown(browser: webdriver.Chrome) -> bool:
        return any(each.text == text for each in browser.find_elements(By.CSS_SELECTOR, selector))

    WebDriverWait(browser, HANG).until(shown, f"{selector}: {text!r} did not appear")


def test_signals_from_core1_are_shown_at_once(service: Service, browser: webdriver.Chrome) -> None:
    browser.get(service.start())
    wait_shown(browser, "#ihub_hwwd_irq .count", "0")
    for count in ("1", "2"):
        service.core1("send", "ihub_hwwd_irq")
        wait_shown(browser, "#ihub_hwwd_irq .count", count)
    wait_shown(browser, "#ihub_reset_irq .count", "0")


def test_a_button_sends_its_signal(service: Service, browser: webdriver.Chrome) -> None:
    browser.get(service.start())
    wait_shown(browser, "#redun_notify_irq button", "send")
    assert len(browser.find_elements(By.TAG_NAME, "button")) == 1
    browser.find_element(By.CSS_SELECTOR, "#redun_notify_irq button").click()
    # A signal that is sent while core 1 is not running stays queued until core 1 starts.
    service.core1("wait", "redun_notify_irq", "--timeout", str(HANG))
    wait_shown(browser, "#redun_notify_irq .count", "1")


def test_the_page_reconnects_after_a_restart(service: Service, browser: webdriver.Chrome) -> None:
    browser.get(service.start())
    wait_shown(browser, "#state", "connected")
    service.stop()
    wait_shown(browser, "#state", "disconnected")
    service.start()
    wait_shown(browser, "#state", "connected")


def test_an_unknown_signal_is_an_error(service: Service) -> None:
    request = urllib.request.Request(f"{service.start()}/send/nothing", method="POST")  # noqa: S310 - our own
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)  # noqa: S310
    assert error.value.code == 404
    assert "(expected one of: redun_notify_irq)" in error.value.read().decode()
    error.value.close()
