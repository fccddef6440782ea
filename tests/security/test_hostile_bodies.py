"""Bodies made to do harm, over a real socket: each is answered with 400 to 499, and the next one is served."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import pytest

from tests.api.api_server import Api, assert_problem, serving
from tests.serving.floor import png, publish

PNG = png()
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), max_body_bytes=3_000_000) as made:
        publish(made.floor.store)
        yield made


@pytest.fixture(autouse=True)
def serves_on(api: Api) -> Iterator[None]:
    """Whatever a body did, nobody after it notices, and nothing of it is left in the queue."""
    yield
    answer = api.http.post("/predict/fish", content=PNG, headers={"content-type": "image/png"})
    assert answer.status_code == 200
    assert (len(api.floor.batcher), api.floor.shelf.in_use) == (0, 0)


# --- JSON -------------------------------------------------------------------------------------------------------------

HUGE_INTEGER, HUGE_FLOAT = "9" * 10_000, "1e" + "9" * 50
JSON_ROUTES = {
    "predict": ("POST", "/predict/fish", '{"images": %s}'),
    "predict, b64": ("POST", "/predict/fish", '{"images": [{"b64": %s}]}'),
    "train": ("POST", "/train", '{"task": "fish", "dataset": "d", "recipe": %s}'),
    "train, priority": ("POST", "/train", '{"task": "fish", "dataset": "d", "priority": %s}'),
    "recipe's rate": ("POST", "/train", '{"task": "fish", "dataset": "d", "recipe": {"lr": %s}}'),
    "compare": ("POST", "/compare", '{"task": "fish", "dataset": "d", "methods": %s}'),
    "alias": ("PUT", "/tasks/fish/aliases/live", '{"version": %s}'),
    "weight": ("PUT", "/tasks/fish/aliases/live", '{"version": "v", "weight": %s}'),
    "pin": ("POST", "/tasks/fish/pin", '{"pinned": %s}'),
}
VALUES = {
    "nested 100,000 lists": "[" * 100_000 + "]" * 100_000,
    "nested 100,000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "never closed": "[" * 100_000,
    "an integer of 10,000 digits": HUGE_INTEGER,
    "an exponent of 50 digits": HUGE_FLOAT,
    "minus zero point": "-0.",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "a lone surrogate": '"\\ud800"',
    "a NUL": '"\\u0000"',
    "a key twice": '{"a": 1, "a": 2}',
    "100,000 keys": "{" + ",".join(f'"k{n}": 1' for n in range(60_000)) + "}",
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("route", JSON_ROUTES)
def test_json(api: Api, route: str, value: str) -> None:
    method, path, template = JSON_ROUTES[route]
    body = template.replace("%s", VALUES[value])
    answer = api.http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert_problem(answer, answer.status_code, answer.json()["code"])
    assert len(answer.content) < 20_000, "an answer must not repeat the attack"


@pytest.mark.parametrize("body", [b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"\x00" * 1000, b'{"images": "\xff"}'])
def test_json_that_is_not_utf_8(api: Api, body: bytes) -> None:
    answer = api.http.post("/predict/fish", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize(
    "text",
    [
        B64[:20] + "\n" + B64[20:],
        " " + B64,
        base64.urlsafe_b64encode(b"\xfb\xff\xbf").decode(),
        f"data:image/png;base64,{B64}",
        B64.rstrip("=") if B64.endswith("=") else B64[:-1],
        B64 + "====",
    ],
    ids=["a line break", "a blank", "the alphabet of URLs", "a data URI", "no padding", "padding and more"],
)
def test_base64_is_strict(api: Api, text: str) -> None:
    answer = api.http.post("/predict/fish", json={"images": [{"b64": text}]})
    assert "base64" in assert_problem(answer, 422, "invalid_request")["detail"]


# --- forms ------------------------------------------------------------------------------------------------------------


def part(name: str = "images", data: bytes = PNG, head: bytes = b"", filename: str = "a.png") -> bytes:
    told = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'.encode()
    return b"--x\r\n" + told + head + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"


END = b"--x--\r\n"
FORMS: dict[str, Callable[[], bytes]] = {
    "20,000 parts": lambda: part(data=b"") * 20_000 + END,
    "20,000 fields": lambda: b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 20_000 + END,
    "10,000 headers in a part": lambda: part(head=b"A: b\r\n" * 10_000) + END,
    "a header of a megabyte": lambda: part(head=b"A: " + b"b" * 1_000_000 + b"\r\n") + END,
    "a header without an end": lambda: b"--x\r\nA: " + b"b" * 1_000_000 + b"\r\n--x--",
    "a name of a megabyte": lambda: part(name="i" * 1_000_000) + END,
    "nearly a boundary, a million times": lambda: b"--x\r\n\r\n" + b"\r\n--" * 500_000 + END,
    "line breaks before the first boundary": lambda: b"\r\n" * 1_000_000 + END,
    "a million carriage returns in a part": lambda: part(data=b"\r" * 1_000_000) + END,
    "no part": lambda: END,
    "only the end's text, within": lambda: b"--x--" * 100_000,
    "a field of the same name beside the file": (
        lambda: part() + b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\ntext\r\n' + END
    ),
    "a part in a part": lambda: part(head=b"Content-Transfer-Encoding: base64\r\n", data=part() + END) + END,
    "no disposition": lambda: b"--x\r\nContent-Type: image/png\r\n\r\n" + PNG + b"\r\n" + END,
    "NUL in a name": lambda: part(name="im\0ages") + END,
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(api: Api, name: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = api.http.post("/predict/fish", content=FORMS[name](), headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert len(assert_problem(answer, answer.status_code, answer.json()["code"])["detail"]) < 500


@pytest.mark.parametrize("length", [71, 1_000, 50_000])
def test_long_boundaries(api: Api, length: int) -> None:
    """Longer than RFC 2046 allows: served, or refused; the HTTP parser's own limit on headers comes first."""
    boundary = b"x" * length
    body = part().replace(b"--x", b"--" + boundary) + b"--" + boundary + b"--\r\n"
    headers = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
    answer = api.http.post("/predict/fish", content=body, headers=headers)
    assert answer.status_code in (200, 400, 413, 431)


@pytest.mark.parametrize("filename", ["../../etc/passwd", "C:\\x.png", "a\nb", "\u202egnp.exe", "x" * 5000])
def test_a_file_s_name_is_nobody_s_business(api: Api, filename: str) -> None:
    answer = api.http.post("/predict/fish", files={"images": (filename, PNG, "image/png")})
    assert answer.status_code == (200 if len(filename) < 1000 else 400)


def test_the_same_field_twice_is_two_images(api: Api) -> None:
    body = part() + part() + END
    answer = api.http.post("/predict/fish", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert len(answer.json()["predictions"]) == 2


# --- HTTP itself ------------------------------------------------------------------------------------------------------


def test_a_picture_under_another_picture_s_type_is_taken_for_what_it_is(api: Api) -> None:
    answer = api.http.post("/predict/fish", content=PNG, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200


def test_a_body_in_chunks_of_a_byte(api: Api) -> None:
    answer = api.http.post(
        "/predict/fish", content=(bytes([one]) for one in PNG), headers={"content-type": "image/png"}
    )
    assert answer.status_code == 200


HEAD = "POST /predict/fish HTTP/1.1\nHost: [::1]\nContent-Type: image/png\nConnection: close"
SMUGGLED = {
    "two lengths": (f"{HEAD}\nContent-Length: 5\nContent-Length: {len(PNG)}", PNG),
    "a length and chunks": (f"{HEAD}\nContent-Length: {len(PNG)}\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "a negative length": (f"{HEAD}\nContent-Length: -1", PNG),
    "a length in words": (f"{HEAD}\nContent-Length: five", PNG),
    "a chunk of a negative size": (f"{HEAD}\nTransfer-Encoding: chunked", b"-5\r\nabc\r\n0\r\n\r\n"),
    "a chunk size of 60 digits": (f"{HEAD}\nTransfer-Encoding: chunked", b"f" * 60 + b"\r\nabc\r\n0\r\n\r\n"),
    "a header that is folded": (f"{HEAD}\nX: a\n b\nContent-Length: {len(PNG)}\nContent-Length: 3", PNG),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_lengths_that_mean_two_things(api: Api, name: str) -> None:
    head, body = SMUGGLED[name]
    status, got = api.raw(head=head, body=body)
    assert 400 <= status < 500, got[:300]


@pytest.mark.parametrize("query", ["top_k=1e9", "top_k=-1", "top_k=%00", "top_k=" + "9" * 5000, "top_k=1&top_k=x"])
def test_queries(api: Api, query: str) -> None:
    answer = api.http.post(f"/predict/fish?{query}", content=PNG, headers={"content-type": "image/png"})
    assert_problem(answer, 422, "invalid_request")


@pytest.mark.parametrize("name", ["%00", "%ff%fe", "%2e%2e%2f", "a" * 9000, "fish@" + "+live" * 2000, "%F0%9F%90%9F"])
def test_names(api: Api, name: str) -> None:
    answer = api.http.post(f"/predict/{name}", content=PNG, headers={"content-type": "image/png"})
    assert answer.status_code in (400, 404, 422), answer.text
