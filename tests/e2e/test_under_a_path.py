"""The pages in a real browser, behind a path of a proxy and without one: nothing is fetched from anywhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.api_server import serving
from tests.e2e.browser import Browser, browser
from tests.serving.floor import publish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module", params=["", "/vision"])
def address(request: pytest.FixtureRequest, chrome: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the server's front page, without the last slash. After the browser: without one, no server is started."""
    with serving(tmp_path_factory.mktemp("home"), root_path=request.param) as api:
        publish(api.floor.store)
        chrome.complaints()
        yield f"{api.url}{request.param}"
        chrome.go("about:blank")  # or it would go on asking a server that has ended


def fetched(page: Browser) -> set[str]:
    names: list[str] = page.script("return performance.getEntriesByType('resource').map(one => one.name)")
    return {name for name in names if not name.startswith("data:")}


def test_the_documentation_shows_every_operation_and_asks_one(chrome: Browser, address: str) -> None:
    chrome.go(f"{address}/docs")
    chrome.find(".opblock", "/predict/{task}")
    assert len(chrome.all(".opblock")) > 60
    chrome.press(".opblock-summary-control", "/healthz")
    chrome.press("button", "Try it out")
    chrome.press("button", "Execute")
    chrome.find(".live-responses-table", '"status": "ok"')
    assert f"{address}/healthz" in fetched(chrome)
    assert all(name.startswith(f"{address}/") for name in fetched(chrome))
    assert chrome.complaints() == []


def test_the_dashboard_finds_its_server(chrome: Browser, address: str) -> None:
    chrome.go(address)
    chrome.find("a.name", "fish")
    chrome.press("nav a", "Rack")
    chrome.find("h2", "Batch composition")
    assert f"{address}/rack" in fetched(chrome)
    assert all(name.startswith(f"{address}/") for name in fetched(chrome))
    assert chrome.complaints() == []
