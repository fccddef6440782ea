"""What the environment says of proxies and certificates, and what a client makes of it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from lensrack import AsyncClient, Client, ConnectError, InvalidInput
from lensrack._network import is_loopback
from tests.client.command_line import Run
from tests.client.scripted_rack import Rack, transport

NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
BROKEN = [
    ("ALL_PROXY", "socks5://127.0.0.1:1080", "socksio"),
    ("all_proxy", "socks5h://127.0.0.1:1080", "socksio"),
    ("HTTPS_PROXY", "ftp://proxy:21", "Unknown scheme"),
    ("HTTP_PROXY", "http://proxy:port", "Invalid port"),
    ("NO_PROXY", "localhost,[::1]", "Invalid"),
    ("no_proxy", "fe80::/10", "Invalid"),
    ("SSL_CERT_FILE", "/nowhere/ca.pem", "No such file"),
    ("SSLKEYLOGFILE", "/nowhere/keys", "No such file"),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NETWORK:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(("name", "value", "why"), BROKEN, ids=lambda value: value.split(":")[0])
def test_a_value_that_cannot_be_used_is_named_and_does_not_concern_this_machine(
    monkeypatch: pytest.MonkeyPatch, rack: Rack, name: str, value: str, why: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY" if name == "HTTP_PROXY" else "HTTP_PROXY", "http://right:3128")
    monkeypatch.setenv(name, value)
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidInput, match=rf"the environment's {name} cannot be used: .*{why}"):
            kind("http://models.example:8000")
        for url in ("http://localhost:1", "http://127.8.0.1:1", "http://[::1]:1"):
            kind(url)
    with Client("http://rack", transport=transport(rack)) as client:
        assert client.health()


def test_certificates_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for url in ("https://models.example", "https://localhost"):  # a server here may have a certificate of one's own
        with pytest.raises(InvalidInput, match="SSL_CERT_FILE cannot be used"):
            Client(url)


def test_proxies_are_used_elsewhere_and_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    with Client("http://models.example") as far, Client("http://127.0.0.5") as near:
        assert far._http._transport_for_url(httpx.URL("http://models.example")) is not far._http._transport
        assert near._http._transport_for_url(httpx.URL("http://127.0.0.5")) is near._http._transport
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with (
        Client("http://models.example", max_retries=0) as far,
        pytest.raises(ConnectError, match="proxy of HTTP_PROXY:"),
    ):
        far.health()


@pytest.mark.parametrize(("name", "value", "why"), [BROKEN[0], BROKEN[5]], ids=["ALL_PROXY", "NO_PROXY"])
def test_the_command_line_says_it_in_one_line(run: Run, name: str, value: str, why: str) -> None:
    assert run("health", **{name: value}).stdout
    done = run("--url", "http://models.example", "health", code=2, **{name: value})
    assert f"error: the environment's {name} cannot be used" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("a.localhost", True),
        ("127.255.1.2", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("1270.0.0.1", False),
    ],
)
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) is here
