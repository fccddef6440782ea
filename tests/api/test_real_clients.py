"""What clients and proxies really send: bodies without a type, forms of every spelling, packed bodies, HEAD, paths."""

from __future__ import annotations

import gzip
import io
import re
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lensrack import Client
from server.api import forms
from server.api.middleware.body_limit import Unpacker
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import zipped
from tests.serving.floor import SIZE, png, publish

CAP = 300_000
ROUTES = ["/predict/fish", "/predict?task=fish", "/embed", "/tasks/fish/attention", "/tasks/fish/feedback?label=a"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), max_body_bytes=CAP, max_dataset_bytes=CAP) as made:
        publish(made.floor.store)
        yield made


def send(api: Api, path: str, body: bytes, kind: str | None, **headers: str) -> httpx.Response:
    return api.http.post(path, content=body, headers={**({} if kind is None else {"content-type": kind}), **headers})


# --- content types ----------------------------------------------------------------------------------------------------

TYPES = [None, "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream", "image/jpg"]
TYPES += ["image/pjpeg", "image/x-png", "image/x-ms-bmp", "image/gif", "image/heic"]


@pytest.mark.parametrize("path", ROUTES)
def test_a_picture_is_taken_for_what_it_is_whatever_its_type_says(api: Api, path: str) -> None:
    for kind in TYPES:
        assert send(api, path, png(7), kind).status_code in (200, 201), kind
    for body, status, words in (
        (b"", 400, "0 bytes"),
        (b"\0\0\0\x18ftypheic" + bytes(50), 415, "a HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(50), 415, "an AVIF"),
        (b"%PDF-1.7\n", 415, "a PDF"),
    ):
        for kind in (None, "application/octet-stream", "image/jpeg"):
            code = {400: "bad_image", 415: "unsupported_image"}[status]
            assert words in assert_problem(send(api, path, body, kind), status, code)["detail"]


def test_a_declared_type_keeps_its_meaning(api: Api) -> None:
    assert_problem(send(api, "/predict/fish", png(), "application/json"), 400, "bad_request")
    assert_problem(send(api, "/predict/fish", png(), "application/x-npy"), 400, "bad_image")
    array = io.BytesIO()
    np.save(array, np.zeros((2, SIZE, SIZE, 3), np.uint8))
    for kind in ("application/x-npy", None):
        assert len(send(api, "/predict/fish", array.getvalue(), kind).json()["predictions"]) == 2


# --- forms ------------------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body: of each part the header lines, and the content."""
    return b"".join(b"--X\r\n%s\r\n\r\n%s\r\n" % (head.encode(), body) for head, body in parts) + b"--X--\r\n"


def named(name: str, more: str = "") -> str:
    return f'Content-Disposition: form-data; name="{name}"{more}'


IMAGE = "\r\nContent-Type: image/png"
FORMS: dict[str, tuple[bytes, int, str]] = {
    "no filename": (form((named("images") + IMAGE, png())), 1, ""),
    "neither filename nor type": (form((named("images"), png())), 1, ""),
    "filename* alone": (form((named("images", "; filename*=UTF-8''%D0%BA.png"), png())), 1, ""),
    "another field": (form((named("photo", '; filename="a.png"') + IMAGE, png())), 1, ""),
    "another field, several": (form(*[(named("files[]", '; filename="a"'), png())] * 3), 3, ""),
    "numbered": (form(*[(named(f"images[{n}]", '; filename="a"'), png()) for n in range(3)]), 3, ""),
    "no field": (form(('Content-Disposition: form-data; filename="a.png"', png())), 1, ""),
    "octets": (form((named("images") + "\r\nContent-Type: application/octet-stream", png())), 1, ""),
    "empty": (form((named("images", '; filename="a.png"'), b"")), 400, "0 bytes"),
    "a path for a file": (form((named("images"), b"a.png")), 422, "got the text 'a.png' in 'images'"),
    "a parameter": (form((named("images"), png()), (named("top_k"), b"3")), 422, "got the text '3' in 'top_k'"),
    "two fields": (form((named("a"), png()), (named("b"), png())), 422, "got 'a' and 'b'"),
    "no disposition": (form(("Content-Type: image/png", png())), 422, "Content-Disposition"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(api: Api, case: str) -> None:
    body, expected, words = FORMS[case]
    answer = send(api, "/predict/fish", body, "multipart/form-data; boundary=X")
    if expected < 400:
        assert len(answer.json()["predictions"]) == expected, answer.text
    else:
        assert words in assert_problem(answer, expected, answer.json()["code"])["detail"]


def test_an_archive_in_any_envelope_is_the_same_data_set(api: Api) -> None:
    body, ids = zipped(), []
    for kind in (None, "application/x-zip-compressed", "application/x-www-form-urlencoded", "application/octet-stream"):
        ids.append(send(api, "/datasets", body, kind).json()["id"])
    for head in (named("file"), named("archive", "; filename*=UTF-8''a.zip"), named("upload", '; filename="a.zip"')):
        kind = "multipart/form-data; boundary=X"
        ids.append(send(api, "/datasets", form((head, body)), kind).json()["id"])
        told = send(api, "/v1/files", form((named("purpose"), b"fine-tune"), (head, body)), kind)
        ids.append(told.json()["id"])
    assert len(set(ids)) == 1
    extra = form((named("file"), body), (named("name"), b"pets"))
    problem = assert_problem(send(api, "/datasets", extra, kind), 422, "invalid_request")
    assert "the field 'name'; name and parent belong to the query" in problem["detail"]
    for broken in (form((named("name"), b"pets")), form((named("file"), body))[:-8]):
        assert send(api, "/datasets", broken, kind).status_code in (400, 422)


def test_a_forms_bytes_in_any_pieces_are_the_same_parts() -> None:
    body = form((named("images", '; filename="a\\"b.png"') + IMAGE, png()), (named("note"), "ключ".encode()))
    reader = forms.FormReader("multipart/form-data; boundary=X", 2)
    for at in range(len(body)):
        reader.feed(body[at : at + 1])
    reader.finish()
    assert [(part.name, part.filename, part.is_file) for part in reader.parts] == [
        ("images", 'a"b.png', True),
        ("note", None, False),
    ]
    assert reader.parts[0].data == png()


# --- packed bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_packed_bodies_are_unpacked_on_every_route(api: Api, encoding: str, pack: Any) -> None:
    for path in ROUTES:
        assert send(api, path, pack(png(9)), None, **{"content-encoding": encoding}).status_code in (200, 201), path
    packed = {"content-encoding": encoding}
    assert send(api, "/datasets", pack(zipped()), "application/zip", **packed).status_code == 201
    unknown = send(api, "/train", pack(b'{"task": "fish", "dataset": "d"}'), "application/json", **packed)
    assert_problem(unknown, 404, "dataset_not_found")
    bomb, chunked = pack(bytes(CAP + 1)), iter([pack(bytes(CAP + 1))])
    for body in (bomb, chunked):
        told = api.http.post("/predict/fish", content=body, headers=packed)
        detail = assert_problem(told, 413, "body_too_large")["detail"]
        assert f"at most {CAP} bytes once it is unpacked (LENSRACK_MAX_BODY_BYTES)" in detail
    assert_problem(send(api, "/datasets", bomb, "application/zip", **packed), 413, "body_too_large")
    for body in (png(), pack(png())[:-4], pack(png()) + b"more"):
        assert_problem(send(api, "/predict/fish", body, None, **packed), 400, "bad_request")
    other = assert_problem(
        send(api, "/predict/fish", png(), None, **{"content-encoding": "br"}), 415, "unsupported_media_type"
    )
    assert "expected gzip or deflate, got 'br'" in other["detail"]
    assert send(api, "/predict/fish", png(), None, **{"content-encoding": "identity"}).status_code == 200


def test_a_body_that_unpacks_to_far_more_takes_no_memory() -> None:
    bomb = zlib.compress(b" " * 50_000_000)
    tracemalloc.start()
    try:
        assert len(Unpacker("deflate").feed(bomb, 1001)) == 1001
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


# --- HEAD -------------------------------------------------------------------------------------------------------------


def test_head_is_get_without_its_body_on_every_route(api: Api) -> None:
    dataset = send(api, "/datasets", zipped(), None).json()["id"]
    job = api.http.post("/train", json={"task": "fish", "dataset": dataset, "method": "linear"}).json()["id"]
    version = api.http.get("/tasks/fish").json()["live"]
    known = {"task": "fish", "version": version, "alias": "live", "dataset_id": dataset, "job_id": job, "number": "0"}
    known |= {"upload_id": "0"}
    schema = api.http.get("/openapi.json").json()["paths"]
    paths = [path for path, operations in schema.items() if "get" in operations]
    paths += ["/", "/ui/app.js", "/ui/nothing.js", "/docs", "/openapi.json", "/nowhere", "/train/0", "/predict/fish"]
    answered = 0
    for template in paths:
        path = re.sub(r"\{(\w+)[^}]*\}", lambda name: known[name[1]], template)
        told, head = api.http.get(path), api.http.head(path)
        varying = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
        assert head.status_code == told.status_code, path
        assert {name: value for name, value in head.headers.items() if name not in varying} == {
            name: value for name, value in told.headers.items() if name not in varying
        }, path
        status, raw = api.raw(head=f"HEAD {path} HTTP/1.1\nHost: localhost\nConnection: close")
        assert (status, raw.partition(b"\r\n\r\n")[2]) == (told.status_code, b""), path
        answered += told.status_code == 200
    assert answered > 30
    stream = api.http.head(f"/train/{job}/events", headers={"accept": "text/event-stream"}, timeout=5)
    assert (stream.status_code, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


# --- conditions and queries -------------------------------------------------------------------------------------------


def test_if_match_with_a_star_means_any_that_is_there(api: Api) -> None:
    version, star = publish(api.floor.store, "stars"), {"If-Match": "*"}
    there, missing = "/tasks/stars/aliases/live", "/tasks/stars/aliases/other"
    assert api.http.put(there, json={"version": version}, headers=star).status_code == 200
    told = assert_problem(api.http.put(missing, json={"version": version}, headers=star), 412, "precondition_failed")
    assert "expected an alias 'other' of 'stars', got none" in told["detail"]
    assert_problem(api.http.delete(missing, headers=star), 412, "precondition_failed")
    assert api.http.delete(there, headers=star).status_code == 204


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/predict/fish?topk=3", "expected the parameters top_k, got 'topk' (did you mean 'top_k'?)"),
        ("POST", "/predict?tasks=fish&task=fish", "(did you mean 'task'?)"),
        ("POST", "/datasets?parnet=x", "expected the parameters name or parent or label_column or upload,"),
        ("GET", "/train?limt=5", "(did you mean 'limit'?)"),
        ("GET", "/tasks?x=1", "expected the parameters none at all, got 'x'"),
        ("DELETE", "/tasks/fish?force=true", "got 'force'"),
    ],
)
def test_a_query_parameter_that_nobody_knows_is_told(api: Api, method: str, path: str, words: str) -> None:
    assert words in assert_problem(api.http.request(method, path, content=png()), 422, "invalid_request")["detail"]


@pytest.mark.parametrize(
    "path", ["/healthz?t=1", "/metrics?name[]=x", "/v1/models?x=1", "/v2?x=1", "/?utm=x", "/docs?x"]
)
def test_probes_pages_and_other_protocols_may_say_more(api: Api, path: str) -> None:
    assert api.http.get(path).status_code == 200


# --- behind a proxy ---------------------------------------------------------------------------------------------------


def test_a_prefix_whether_or_not_the_proxy_takes_it_off(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text('{"id": "all", "scopes": ["admin"], "token": "a-token-of-some-length"}')
    options: dict[str, Any] = {"root_path": "/lens/rack", "keys_file": keys}
    with (
        serving(tmp_path, **options) as api,
        Client(f"{api.url}/lens/rack", api_key="a-token-of-some-length") as client,
    ):
        publish(api.floor.store)
        assert client.predict("fish", png()).task == "fish"
        bearer = {"authorization": "Bearer a-token-of-some-length"}
        for prefix in ("", "/lens/rack"):
            page = api.http.get(f"{prefix}/")
            assert 'src="/lens/rack/ui/app.js"' in page.text
            assert api.http.get(f"{prefix}/ui/app.js").status_code == 200
            assert 'src="/lens/rack/ui/docs.js"' in api.http.get(f"{prefix}/docs", headers=bearer).text
            schema = api.http.get(f"{prefix}/openapi.json", headers=bearer).json()
            assert schema["servers"] == [{"url": "/lens/rack"}]
            made = api.http.post(f"{prefix}/datasets", content=zipped(), headers=bearer)
            assert made.headers["location"] == f"/lens/rack/datasets/{made.json()['id']}"
            assert api.http.get(made.headers["location"], headers=bearer).json() == made.json()
            api.http.cookies.clear()  # a session would have to name its origin
            signed = api.http.post(f"{prefix}/session", json={"key": "a-token-of-some-length"})
            assert "Path=/lens/rack;" in signed.headers["set-cookie"]
        assert api.http.get("/lens/rack/tasks").status_code == 200, "the cookie is sent along"
        assert_problem(api.http.get("/tasks"), 401, "unauthenticated")
        for prefix in ("", "/lens/rack"):
            assert api.http.get(f"{prefix}/v2/models/nobody", headers=bearer).json().keys() == {"error"}
        bare = api.http.get("/lens/rack", follow_redirects=False)
        assert (bare.status_code, bare.headers["location"]) == (308, "/lens/rack/")
        assert_problem(api.http.get("/lens/racket", headers=bearer), 404, "not_found")
