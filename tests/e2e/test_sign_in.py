"""The dashboard of a server that asks for keys, in a real browser: in with a key, out again, and the own tasks only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lensrack import AuthenticationError, Client, NotFoundError
from server.cli.sample_pictures import draw
from tests.e2e.browser import Browser, browser
from tests.e2e.server_process import ServerProcess, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKENS = {name: f"token-of-{name}-{'x' * 20}" for name in ("ops", "acme")}


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "keys"
    rows = [{"id": "ops", "scopes": ["admin"]}, {"id": "acme", "scopes": ["admin"], "tasks": "acme-", "name": "Acme"}]
    path.write_text("\n".join(json.dumps(row | {"token": TOKENS[str(row["id"])]}) for row in rows))
    return path


@pytest.fixture(scope="module")
def server(chrome: Browser, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """It listens on every address: with keys it may."""
    with serving(tmp_path_factory.mktemp("signed"), keys_file=str(keys), host="0.0.0.0", worker_nice="0") as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        with Client(running.url, TOKENS["acme"]) as acme:
            pictures = tmp_path_factory.mktemp("pictures")
            draw(pictures, per_class=4)
            dataset = acme.datasets.upload(pictures / "fruit" / "train", name="fruit of acme").id
            acme.train("acme-fruit", dataset, "linear", {"epochs": 1}).wait(200)
        yield running


def sign_in(page: Browser, token: str) -> None:
    field = page.find('input[type="password"]')
    field.clear()
    field.send_keys(token)
    page.press("button", "Sign in")


def test_a_person_signs_in_sees_the_own_tasks_and_signs_out(chrome: Browser, server: ServerProcess) -> None:
    chrome.go(f"{server.url}/#/tasks/acme-fruit")
    chrome.find("h1", "Sign in")
    assert chrome.barriers() == []
    assert chrome.complaints() == [], "a stranger is not met with errors"
    sign_in(chrome, "not-a-key-of-this-server")
    chrome.find(".toast", "wrong, revoked or unknown")
    assert all("401" in one for one in chrome.complaints())
    sign_in(chrome, TOKENS["acme"])
    chrome.find("h1", "acme-fruit")
    assert chrome.script("return document.cookie") == "", "no script can read it"
    assert chrome.script("return JSON.stringify([localStorage, sessionStorage])").count("token-of") == 0
    chrome.press("a", "Rack")
    chrome.find("h1", "Rack")
    chrome.press("nav a", "Tasks")
    chrome.find("a", "acme-fruit")
    shown = "return [...document.querySelectorAll('img.thumb')].filter(one => one.naturalWidth > 0).length"
    chrome.until(lambda: chrome.script(shown) > 0, "thumbnails, which come by the cookie alone")
    assert chrome.complaints() == []
    chrome.press("button", "Sign out")
    chrome.find("h1", "Sign in")
    chrome.go("about:blank")
    chrome.go(f"{server.url}/")
    chrome.find("h1", "Sign in")
    assert chrome.complaints() == []


def test_the_sdk_takes_a_key(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LENSRACK_API_KEY", raising=False)
    with Client(server.url) as nobody, pytest.raises(AuthenticationError):
        nobody.tasks.list()
    monkeypatch.setenv("LENSRACK_API_KEY", TOKENS["acme"])
    with Client(server.url) as acme:
        assert [task.task for task in acme.tasks.list()] == ["acme-fruit"]
        with pytest.raises(AuthenticationError):
            acme.train("fruit", acme.datasets.list()[0].id)
        with pytest.raises(NotFoundError):
            acme.tasks.get("fruit")
