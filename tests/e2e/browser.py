"""A real browser: Debian's chromium, without a window, driven by its chromedriver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

AXE = Path(__file__).parent / "axe" / "axe.min.js"
WAIT_S = 60  # the machine may be busy; nothing is asserted about time


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Skips, with the reason, where there is no chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: `make chromium` installs Debian's chromium and chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new",
        "--no-sandbox",  # a container's root has no user namespaces
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # whatever asks the network fails, and is seen
        "--force-color-profile=srgb",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    chrome = Chrome(options=options, service=Service(driver))
    chrome.set_script_timeout(WAIT_S)
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


class Browser:
    """What a person does with a page: goes, finds by what it says, presses, types, waits."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def go(self, url: str) -> None:
        self.chrome.get(url)

    def find(self, css: str, text: str = "") -> WebElement:
        """The first visible element of this selector that holds the text; waited for."""
        return self.until(lambda: next(iter(self.all(css, text)), None), f"{css} with {text!r}")

    def all(self, css: str, text: str = "") -> list[WebElement]:
        return [
            one for one in self.chrome.find_elements(By.CSS_SELECTOR, css) if text in one.text and one.is_displayed()
        ]

    def hidden(self, css: str) -> WebElement:
        """An element that need not be visible, such as the input behind a button."""
        return self.until(lambda: next(iter(self.chrome.find_elements(By.CSS_SELECTOR, css)), None), css)

    def press(self, css: str, text: str = "") -> None:
        element = self.find(css, text)
        self.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def until(self, look: Any, what: str) -> Any:
        """Pages replace what they show: an element that has just gone is looked for again."""
        wait = WebDriverWait(self.chrome, WAIT_S, poll_frequency=0.05, ignored_exceptions=[Exception])
        return wait.until(lambda _: look(), f"waited for {what}; the page says:\n{self.text[:2000]}")

    @property
    def text(self) -> str:
        return self.chrome.find_element(By.TAG_NAME, "body").text

    def script(self, source: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(source, *arguments)

    def complaints(self) -> list[str]:
        """What the console has heard since the last call, warnings included."""
        return [entry["message"] for entry in self.chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def barriers(self) -> list[str]:
        """What axe-core finds on the page as it is: WCAG 2.2 A and AA, and best practices."""
        if not self.script("return Boolean(window.axe)"):
            self.chrome.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text()})
        found = self.chrome.execute_async_script(
            "const done = arguments[0]; axe.run().then(done, e => done({error: String(e)}))"
        )
        assert "violations" in found, found
        return [
            f"{one['id']}: {[node['target'] for node in one['nodes'][:3]]} {one['nodes'][0]['failureSummary']}"
            for one in found["violations"]
        ]

    def resize(self, width: int, height: int) -> None:
        """Of the page itself: a window cannot be as narrow as a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme: str) -> None:
        """As the system would prefer: light or dark."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # a colour on its way is neither
        ]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
