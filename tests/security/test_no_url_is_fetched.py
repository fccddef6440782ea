"""Addresses wherever a client may put one: each is refused, and the server opens no connection and asks for no name.

The interpreter tells of every connection and every look-up (audit events `socket.connect`, `socket.getaddrinfo`), and
at the address that is named somebody listens who would notice.
"""

from __future__ import annotations

import base64
import io
import socket
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.api.api_server import Api, serving
from tests.serving.floor import png, publish

NAME = "metadata.internal.example"  # whoever asks for it has been talked into something


@dataclass
class Bait:
    """Somewhere to connect to; `taken` tells who did, `seen` what the interpreter told of while `armed`."""

    url: str
    taken: list[Any] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    port: int = 0  # the server's own: what clients of this test connect to
    armed: bool = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            return
        place = arguments[1] if event == "socket.connect" else arguments[:2]
        if isinstance(place, tuple) and place[1] != self.port:
            self.seen.append(f"{event} {place}")


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Bait(f"http://127.0.0.1:{listener.getsockname()[1]}/a.png")

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, whose = listener.accept()
                    made.taken.append(whose)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        sys.addaudithook(made.hear)  # there is no way to take it away again: it listens while it is armed
        yield made
        made.armed = False
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, bait: Bait) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as made:
        publish(made.floor.store)
        bait.port = made.port
        yield made


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, data in {"a/1.png": png(1), "a/2.png": png(2), "b/3.png": png(3), "b/4.png": png(4), **files}.items():
            out.writestr(name, data)
    return file.getvalue()


def parquet(url: str) -> bytes:
    """The columns of an image data set, whose pictures say where they are and not what they are."""
    rows = [{"image": {"bytes": None, "path": url}, "label": f"label {number % 2}"} for number in range(4)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def xmp(url: str) -> bytes:
    """A JPEG whose XMP and ICC names point elsewhere: data like any other, so the picture is answered."""
    file = io.BytesIO()
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a xlink:href="{url}"/></x:xmpmeta>'.encode()
    Image.new("RGB", (8, 8), "teal").save(file, "JPEG", xmp=packet, comment=url.encode())
    return file.getvalue()


def post(path: str, **how: Any) -> Callable[[httpx.Client], httpx.Response]:
    return lambda http: http.post(path, **how)


def typed(path: str, kind: str, content: bytes) -> Callable[[httpx.Client], httpx.Response]:
    return post(path, content=content, headers={"content-type": kind})


WAYS: dict[str, tuple[Callable[[str], Callable[[httpx.Client], httpx.Response]], set[int]]] = {
    "JSON, as base64": (lambda url: post("/predict/fish", json={"images": [{"b64": url}]}), {422}),
    "JSON, as a url": (lambda url: post("/predict/fish", json={"images": [{"url": url}]}), {422}),
    "JSON, as the whole image": (lambda url: post("/predict/fish", json={"images": [url]}), {422}),
    "a query": (lambda url: post("/predict/fish", params={"image_url": url, "url": url}, json={}), {422}),
    "a body of text": (lambda url: typed("/predict/fish", "text/uri-list", url.encode()), {415}),
    "a body under a picture's type": (lambda url: typed("/predict/fish", "image/png", url.encode()), {415}),
    "a message elsewhere": (
        lambda url: typed("/predict/fish", f'message/external-body; access-type=URL; URL="{url}"', b"x"),
        {415},
    ),
    "an SVG that refers": (
        lambda url: typed("/predict/fish", "image/png", f'<svg><image href="{url}"/></svg>'.encode()),
        {415},
    ),
    "an XML entity": (
        lambda url: typed(
            "/predict/fish", "image/png", f'<!DOCTYPE x [<!ENTITY e SYSTEM "{url}">]><x>&e;</x>'.encode()
        ),
        {415},
    ),
    "a form's field": (lambda url: post("/predict/fish", data={"images": url}), {415}),
    "a form's file name": (lambda url: post("/predict/fish", files={"images": (url, b"", "image/png")}), {400}),
    "a picture's own words": (lambda url: typed("/predict/fish", "image/jpeg", xmp(url)), {200}),
    "features": (lambda url: typed("/embed", "image/png", url.encode()), {415}),
    "feedback": (lambda url: typed("/tasks/fish/feedback?label=a", "image/png", url.encode()), {415}),
    "OpenAI's input": (lambda url: post("/v1/embeddings", json={"model": "untrained", "input": [url]}), {422}),
    "OpenAI's input as base64": (
        lambda url: post(
            "/v1/embeddings", json={"model": "untrained", "input": [base64.b64encode(url.encode()).decode()]}
        ),
        {415},
    ),
    "OpenAI's image_url": (
        lambda url: post("/v1/embeddings", json={"model": "untrained", "input": [{"image_url": {"url": url}}]}),
        {400, 422},
    ),
    "a tensor of bytes": (
        lambda url: post(
            "/v2/models/fish/infer",
            json={"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [url]}]},
        ),
        {400, 415, 422},
    ),
    "a data set's table of labels": (
        lambda url: typed(
            "/datasets", "application/zip", zipped(**{"labels.csv": f"file,label\n{url},cat\n".encode()})
        ),
        {400, 422},
    ),
    "a data set of addresses": (
        lambda url: typed("/datasets", "application/vnd.apache.parquet", parquet(url)),
        {400, 422},
    ),
    "a file of addresses among pictures": (
        lambda url: typed(
            "/datasets", "application/zip", zipped(**{"a/list.txt": url.encode(), "a/x.png": url.encode()})
        ),
        {201},
    ),
    "an archive's own address": (lambda url: post("/datasets", json={"url": url}), {415}),
    "a job's data set": (lambda url: post("/train", json={"task": "fish", "dataset": url}), {404, 422}),
    "a bundle": (lambda url: lambda http: http.put("/tasks/fish/versions", content=url.encode()), {400, 415, 422}),
    "headers": (
        lambda url: post(
            "/predict/fish",
            content=png(),
            headers={
                **{"content-type": "image/png", "Content-Location": url, "Referer": url, "Link": f"<{url}>; rel=next"},
                **{"X-Forwarded-Host": NAME, "Forwarded": f"host={NAME}", "Callback": url, "Prefer": "respond-async"},
            },
        ),
        {200},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_an_address_is_a_word_like_any_other(way: str, api: Api, bait: Bait) -> None:
    make, told = WAYS[way]
    for url in (bait.url, f"http://{NAME}/latest/meta-data", "file:///etc/passwd", f"//{NAME}/a.png"):
        bait.armed = True
        try:
            answer = make(url)(api.http)
        finally:
            bait.armed = False
        assert answer.status_code in told, answer.text
        assert "root:" not in answer.text
    assert (bait.seen, bait.taken) == ([], [])


def test_the_bait_would_be_noticed(bait: Bait) -> None:
    """By both means; a name is looked up before anything is connected to."""
    bait.armed = True
    try:
        socket.create_connection(("127.0.0.1", int(bait.url.split(":")[2].split("/")[0]))).close()
        with suppress(OSError):
            socket.getaddrinfo("name.invalid", 80)
    finally:
        bait.armed = False
    assert [line.split()[0] for line in bait.seen].count("socket.connect") == 1
    assert any("getaddrinfo" in line and "name.invalid" in line for line in bait.seen)
    for _ in range(600):
        if bait.taken:
            break
        threading.Event().wait(0.1)
    assert bait.taken
    bait.seen.clear()
    bait.taken.clear()
