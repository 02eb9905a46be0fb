"""Chromium for the tests of web pages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["BrowserPage", "needs_browser", "open_browser"]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI_REQUIRE_BROWSER"),
    reason="there is no chromium with chromedriver here",
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --mute-audio --window-size=1280,900"
)


def open_browser(profile: Path, *flags: str) -> webdriver.Chrome:
    """A browser with a fresh profile that logs its requests and complaints; the caller quits it."""
    assert CHROMIUM and DRIVER, "CI_REQUIRE_BROWSER is set, and there is no chromium with chromedriver"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))


class BrowserPage:
    """A page in a browser; ``page["name"]`` is the element with that id."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def __getitem__(self, name: str):
        return self.driver.find_element(By.ID, name)

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 120) -> None:
        WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: ready(), what)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def screen(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def requests(self) -> set[str]:
        """Addresses that were asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {address for address in sent if not address.startswith(("data:", "blob:", "chrome"))}

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]
