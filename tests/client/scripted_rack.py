"""A lensrack server small enough to read: it keeps state, tells what it was asked, and misbehaves to order.

The same rack answers over a real socket (`serve`) and inside an injected transport (`transport`).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx

VERSION = hashlib.sha256(b"a bundle").hexdigest()
LABELS = ("glass", "metal", "paper")


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]  # names in lower case
    body: bytes
    body_bytes: int
    at: float = field(default_factory=time.monotonic)

    @property
    def params(self) -> dict[str, str]:
        return dict(self.query)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Told:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drip_s: float = 0.0  # between one byte of the body and the next
    drop: bool = False  # break the connection in the middle of the body

    def pieces(self) -> Iterator[bytes]:
        if not self.drip_s:
            yield self.body
            return
        for position in range(len(self.body)):
            time.sleep(self.drip_s)
            yield self.body[position : position + 1]


def told(value: Any, status: int = 200, **headers: str) -> Told:
    return Told(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


def problem(status: int, code: str, detail: str = "", **headers: str) -> Told:
    document = {"title": code, "status": status, "detail": detail or code, "code": code, "request_id": "request-1"}
    return Told(status, json.dumps(document).encode(), {"Content-Type": "application/problem+json", **headers})


@dataclass
class _Upload:
    """What came of an upload; of a large one only how much, as the rack keeps no datasets."""

    length: int
    metadata: str
    offset: int = 0
    body: bytes = b""

    def take(self, asked: Asked) -> None:
        self.offset += asked.body_bytes
        if self.offset <= 2**20:
            self.body += asked.body

    def headers(self) -> dict[str, str]:
        told = {"Upload-Offset": str(self.offset), "Upload-Length": str(self.length)}
        return {**told, "Upload-Metadata": self.metadata}


class Rack:
    """State enough for the scenarios; `misbehave` puts answers in front of the real ones, by path."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.job_of_key: dict[str, str] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.tasks = {"trash", "signs"}
        self.revision = 1
        self.page = 2
        self.job_plan = ("succeeded", 2)
        self.uploads: dict[str, _Upload] = {}
        self._orders: dict[str, deque[Told]] = defaultdict(deque)
        self._lock = threading.Lock()

    def misbehave(self, path: str, *answers: Told) -> None:
        self._orders[path].extend(answers)

    def behave(self) -> None:
        self._orders.clear()

    def to(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == path]

    def answer(self, asked: Asked) -> Told:
        with self._lock:
            self.asked.append(asked)
            if self._orders[asked.path]:
                return self._orders[asked.path].popleft()
            parts = asked.path.strip("/").split("/")
            room = getattr(self, f"_{parts[0]}", None)
            return room(asked, parts[1:]) if room else problem(404, "not_found")

    # --- rooms --------------------------------------------------------------------------------------------------------

    def _healthz(self, asked: Asked, rest: list[str]) -> Told:
        return told({"status": "ok", "version": "9.9.9"})

    def _readyz(self, asked: Asked, rest: list[str]) -> Told:
        backbone = {"arch": "tiny", "fingerprint": "f0", "trained": True, "device": "cpu", "dtype": "float32"}
        return told({"ready": True, "backbone": {**backbone, "image_size": 224, "depth": 12, "dim": 192}})

    def _predict(self, asked: Asked, rest: list[str]) -> Told:
        images = asked.body.count(b'name="images"') or 1
        predictions = [_ranking(int(asked.params["top_k"]))] * images
        if rest:
            name = rest[0].partition("@")[0]
            if name not in self.tasks:
                return problem(404, "task_not_found", f"no task {name!r}")
            return told({"task": name, "version": VERSION, "predictions": predictions})
        return told(
            {"results": {task: self._one_of_many(task, predictions) for key, task in asked.query if key == "task"}}
        )

    def _one_of_many(self, task: str, predictions: list[Any]) -> dict[str, Any]:
        if task in self.tasks:
            return {"version": VERSION, "predictions": predictions}
        return {"error": {"title": "Not Found", "status": 404, "code": "task_not_found", "detail": f"no task {task!r}"}}

    def _embed(self, asked: Asked, rest: list[str]) -> Told:
        return told({"fingerprint": "f0", "embeddings": [[0.5, 1.5]] * (asked.body.count(b'name="images"') or 1)})

    def _tasks(self, asked: Asked, rest: list[str]) -> Told:
        if not rest:
            return told({"tasks": [self._task(name) for name in sorted(self.tasks)]})
        name, *rest = rest
        if name.partition("@")[0] not in self.tasks:
            return problem(404, "task_not_found", f"no task {name!r}")
        if not rest and asked.method == "DELETE":
            self.tasks.discard(name)
            return Told(204)
        return self._in_task(asked, name, rest) if rest else told(self._task(name))

    def _in_task(self, asked: Asked, name: str, rest: list[str]) -> Told:
        verb, *rest = rest
        if verb == "versions":
            return self._versions(asked, rest)
        if verb == "aliases":
            return self._aliases(asked, rest)
        if verb == "rollback":
            self.revision += 1
            return told(self._alias(asked.json()["alias"]))
        if verb == "feedback":
            return self._feedback(asked, name, rest)
        pinned = verb == "pin" and asked.json()["pinned"]
        return told({"task": name, "version": VERSION, "resident": verb != "unload", "pinned": pinned, "bytes": 7})

    def _versions(self, asked: Asked, rest: list[str]) -> Told:
        if asked.method == "PUT":
            return told(self._version(hashlib.sha256(asked.body).hexdigest()), 201)
        if not rest:
            return told({"versions": [self._version()]})
        if not VERSION.startswith(rest[0]):
            return problem(404, "version_not_found")
        if asked.method == "DELETE":
            return Told(204)
        return Told(200, b"a bundle", {"Lensrack-Version": VERSION}) if rest[1:] else told(self._version())

    def _feedback(self, asked: Asked, name: str, rest: list[str]) -> Told:
        if rest == ["dataset"]:
            return told(self._dataset(asked.params.get("name", "")) | {"parent": asked.params.get("parent", "d0")}, 201)
        if asked.method == "DELETE":
            return Told(204)
        item = {"sha256": "ab" * 32, "label": "glass", "bytes": 9, "width": 3, "height": 2, "at": 1.0}
        if asked.method == "POST":
            items = [item | {"label": asked.params["label"], "previous": "metal"}]
            return told({"task": name, "items": items * (asked.body.count(b'name="images"') or 1)}, 201)
        return told({"task": name, "images": 1, "labels": {"glass": 1}, "items": [item], "next": "7"})

    def _aliases(self, asked: Asked, rest: list[str]) -> Told:
        if asked.method == "DELETE":
            return Told(204)
        if rest[1:]:
            return told({"changes": [{**self._alias(rest[0]), "alias": rest[0]}]})
        return self._alias_of(asked, rest[0])

    def _alias_of(self, asked: Asked, alias: str) -> Told:
        if asked.method == "PUT":
            if asked.headers.get("if-match", f'"{self.revision}"') != f'"{self.revision}"':
                return problem(412, "precondition_failed", "alias 'live' has changed")
            self.revision += 1
        return told(self._alias(alias))

    def _alias(self, name: str) -> dict[str, Any]:
        targets = [{"version": VERSION, "weight": 1.0}]
        return {"name": name, "targets": targets, "revision": self.revision, "changed_at": 1.0}

    def _task(self, name: str) -> dict[str, Any]:
        return {"task": name, "live": VERSION, "aliases": [self._alias("live")], "versions": 1, "resident": True}

    def _version(self, version: str = VERSION) -> dict[str, Any]:
        shape = {"labels": list(LABELS), "prompt_lengths": [5], "bytes": 8, "created_at": 1.0}
        return {"version": version, "method": "vpt_deep", **shape, "metrics": {"val_accuracy": 0.9}}

    def _uploads(self, asked: Asked, rest: list[str]) -> Told:
        if not rest:
            id_, length = f"u{len(self.uploads) + 1}", int(asked.headers["upload-length"])
            self.uploads[id_] = _Upload(length, asked.headers["upload-metadata"])
            return told({"id": id_, "length": length, "offset": 0, "expires_at": 1.0}, 201, Location=f"/uploads/{id_}")
        upload = self.uploads.get(rest[0])
        if upload is None:
            return problem(404, "upload_not_found")
        if asked.method == "PATCH":
            if int(asked.headers["upload-offset"]) != upload.offset:
                return problem(409, "upload_offset_conflict")
            upload.take(asked)
        return Told(204 if asked.method == "PATCH" else 200, b"", upload.headers())

    def _datasets(self, asked: Asked, rest: list[str]) -> Told:
        if asked.method == "POST":
            return told(self._dataset(asked.params.get("name", "")) | {"parent": asked.params.get("parent")}, 201)
        if asked.method == "DELETE":
            return Told(204)
        if rest and rest != ["d1"]:
            return problem(404, "dataset_not_found", f"no dataset {rest[0]!r}")
        return told(self._dataset("trash") if rest else {"datasets": [self._dataset("trash")]})

    def _dataset(self, name: str) -> dict[str, Any]:
        splits = {"train": {"glass": 3, "metal": 2}}
        skipped = [{"name": "glass/broken.jpg", "reason": "truncated"}]
        shape = {"images": 5, "bytes": 1000, "splits": splits, "skipped": skipped, "created_at": 1.0}
        shape["report"] = self._report()
        return {"id": "d1", "name": name, "labels": ["glass", "metal"], **shape}

    def _report(self) -> dict[str, Any]:
        spread = {"min": 24.0, "median": 30.5, "max": 2048.0}
        names = ["train/glass: glass/1.jpg", "test/glass: test/glass/1.jpg"]
        leaks = [{"sha256": "0" * 64, "count": 2, "names": names}]
        duplicates = {"repeated": {"train": 3}, "leaked": 1, "contradictory": 0, "leaks": leaks, "contradictions": []}
        warnings = [{"code": "leakage", "text": "1 picture is in train and in test as well"}]
        sizes = {"width": spread, "height": spread, "bytes": spread, "modes": {"RGB": 4, "L": 1}, "formats": {}}
        return {**sizes, "duplicates": duplicates, "warnings": warnings}

    def _train(self, asked: Asked, rest: list[str]) -> Told:
        if asked.method == "POST" and not rest:
            return told(self.start(asked.json(), asked.headers["idempotency-key"]), 202)
        if not rest:
            return self._page_of_jobs(asked)
        job = self.jobs.get(rest[0])
        if job is None:
            return problem(404, "job_not_found", f"no job {rest[0]!r}")
        if rest[1:] == ["events"]:
            return self._page_of_events(job["id"], int(asked.params["after"]))
        if rest[1:] == ["cancel"]:
            job |= {"state": "cancelled", "cancel_requested": True}
        return told(job)

    def _compare(self, asked: Asked, rest: list[str]) -> Told:
        if asked.method == "POST":
            body = {"task": asked.json()["task"], "dataset": asked.json()["dataset"], "method": "compare"}
            return told(self.start(body, asked.headers["idempotency-key"]), 202)
        rows = [
            {"method": "linear", "fits": 2, "val_accuracy": 0.8, "val_accuracy_std": 0.01, "parameters": 1930,
             "bundle_bytes": 10_000, "lens_bytes": 3_000, "forward_cost": 1.0, "fit_s": 2.5},
            {"method": "vpt_deep", "fits": 2, "diverged": 1, "val_accuracy": 0.9, "parameters": 24_970,
             "bundle_bytes": 102_000, "lens_bytes": 90_000, "forward_cost": 1.1, "fit_s": 60.0},
            {"method": "full", "servable": False, "fits": 2, "diverged": 2, "fit_s": 200.0},
        ]  # fmt: skip
        done = self.jobs[rest[0]]["state"] == "succeeded"
        found = {"rows": rows, "dataset_split": "val"} if done else {}
        return told({"id": rest[0], "task": "trash", "dataset": "d1", "state": self.jobs[rest[0]]["state"], **found})

    def start(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """Queue a job that ends as `job_plan` says as soon as its events have been read."""
        if key not in self.job_of_key:
            id_ = f"j{len(self.jobs) + 1}"
            self.job_of_key[key] = id_
            self.jobs[id_] = {"dataset": "d1", **body, "id": id_, "state": "queued", "created_at": 1.0}
            self.events[id_] = _life(*self.job_plan)
        return self.jobs[self.job_of_key[key]]

    def _page_of_jobs(self, asked: Asked) -> Told:
        known = [job for job in self.jobs.values() if asked.params.get("task") in (None, job["task"])]
        start, limit = int(asked.params.get("cursor", "0")), min(self.page, int(asked.params["limit"]))
        following = start + limit if start + limit < len(known) else None
        return told({"jobs": known[start : start + limit], "next": following and str(following)})

    def _page_of_events(self, id_: str, after: int) -> Told:
        found = self.events[id_][after : after + self.page]
        finished = after + len(found) == len(self.events[id_]) and self.job_plan[0] != "running"
        if finished:
            self._end(id_)
        return told({"events": found, "next": after + len(found), "finished": finished})

    def _end(self, id_: str) -> None:
        state = self.job_plan[0]
        error = {"code": "bad_dataset", "detail": "one class only"} if state == "failed" else None
        self.jobs[id_] |= {"state": state, "version": VERSION if state == "succeeded" else None, "error": error}


def _ranking(top_k: int) -> list[dict[str, Any]]:
    return [{"label": label, "index": i, "score": 0.7 / (i + 1)} for i, label in enumerate(LABELS)][:top_k]


def _life(end: str, epochs: int) -> list[dict[str, Any]]:
    steps: list[tuple[str, dict[str, Any]]] = [("queued", {}), ("started", {"attempt": 1})]
    for epoch in range(1, epochs + 1):
        left = {"epochs": epochs, "loss": 1 / epoch, "val_accuracy": 0.8, "eta_s": 60.0 * (epochs - epoch)}
        steps.append(("epoch", {"epoch": epoch, **left}))
    if end != "running":
        steps.append((end, {}))
    return [{"seq": seq, "type": kind, "at": 1.0, "data": data} for seq, (kind, data) in enumerate(steps, 1)]


# --- over a socket ----------------------------------------------------------------------------------------------------


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True  # the client has left, as in the scenarios it may

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's word
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body, count = self._read()
        headers = _lower(self.headers)
        asked = Asked(self.command, unquote(url.path), parse_qsl(url.query), headers, body, count)
        self._write(self.server.rack.answer(asked))

    do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = do_DELETE = _serve  # noqa: N815 - http.server looks for these names

    def _read(self) -> tuple[bytes, int]:
        """The body, and its length; of a large one the length only, as the rack keeps no datasets."""
        kept, count = bytearray(), 0
        for chunk in self._chunks():
            count += len(chunk)
            if count <= 2**20:
                kept += chunk
        return (bytes(kept) if count <= 2**20 else b""), count

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", "0"))
        while left and (chunk := self.rfile.read(min(left, 65536))):
            left -= len(chunk)
            yield chunk

    def _write(self, answer: Told) -> None:
        time.sleep(answer.delay_s)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body) + 100 * answer.drop))
        self.end_headers()
        for piece in answer.pieces() if self.command != "HEAD" else ():
            self.wfile.write(piece)
        self.close_connection = self.close_connection or answer.drop


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    rack: Rack


@contextmanager
def serve(rack: Rack) -> Iterator[str]:
    """The rack on a free port of this machine; its URL."""
    with _Server(("127.0.0.1", 0), _Connection) as server:
        server.rack = rack
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- inside a transport -----------------------------------------------------------------------------------------------


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in pieces, and whose connection may break."""

    def __init__(self, answer: Told) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.pieces()
        if self._answer.drop:
            raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


def transport(rack: Rack) -> httpx.MockTransport:
    """The rack inside httpx, without a socket."""

    def handle(request: httpx.Request) -> httpx.Response:
        body = request.content
        headers = {name.lower(): value for name, value in request.headers.items()}
        query = parse_qsl(request.url.query.decode())
        answer = rack.answer(Asked(request.method, request.url.path, query, headers, body, len(body)))
        if answer.delay_s > request.extensions["timeout"]["read"]:
            raise httpx.ReadTimeout("too slow", request=request)
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer))

    return httpx.MockTransport(handle)
