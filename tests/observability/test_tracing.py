"""Traces: from the caller's span to the forward, from a job to its epochs; and nothing at all when they are off."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lensrack import Client
from server.observability import logs, tracing
from tests.api.api_server import Api, serving
from tests.serving.floor import png, publish
from tests.worker.test_trainer import QUICK, House

JPEG = {"content-type": "image/jpeg"}


class Spans:
    """The recorded spans: those of one trace, by name, and their parents."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))

    def all(self) -> list[ReadableSpan]:
        return list(self._memory.get_finished_spans())

    def of(self, trace_id: int) -> dict[str, list[ReadableSpan]]:
        traced: dict[str, list[ReadableSpan]] = {}
        for span in self.all():
            if span.context.trace_id == trace_id:
                traced.setdefault(span.name, []).append(span)
        return traced


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    tracing.use_provider(spans.provider)
    yield spans
    tracing.stop()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        publish(api.floor.store)
        publish(api.floor.store, "birds")
        yield api


def test_a_request_is_one_trace_from_the_caller_to_the_forward(spans: Spans, api: Api):
    theirs = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {**JPEG, "traceparent": f"00-{theirs}-00f067aa0ba902b7-01"}
    assert api.http.post("/predict/fish", content=png(3), headers=headers).status_code == 200
    api.http.get("/healthz")  # an answer of the same connection: the request before has been recorded
    traced = spans.of(int(theirs, 16))
    assert set(traced) == {"POST /predict/{task}", "predict", "seat", "decode", "queue", "batch", "forward"}
    assert all(len(each) == 1 for each in traced.values())
    (request,), (predict,), (batch,) = traced["POST /predict/{task}"], traced["predict"], traced["batch"]
    assert request.parent.span_id == int("00f067aa0ba902b7", 16)
    assert request.kind is trace.SpanKind.SERVER
    assert request.attributes["http.response.status_code"] == 200
    assert predict.parent.span_id == request.context.span_id
    for name in ("seat", "decode", "queue", "batch"):
        assert traced[name][0].parent.span_id == predict.context.span_id, name
    assert traced["forward"][0].parent.span_id == batch.context.span_id
    times = [at for name in ("queue", "batch") for at in (traced[name][0].start_time, traced[name][0].end_time)]
    assert times == sorted(times), "first it waits, then it is computed"
    assert predict.start_time <= times[0]


def test_a_batch_is_in_the_trace_of_everybody_who_shares_it(spans: Spans, api: Api):
    engine, batcher = api.floor.engine, api.floor.batcher
    engine.gate.clear()
    engine.entered.clear()
    ids = ["a" * 32, "b" * 32, "c" * 32]

    def ask(n: int) -> None:
        headers = {"traceparent": f"00-{ids[n]}-00f067aa0ba902b7-01"}
        files = [("images", (f"{i}.png", png(i))) for i in range(2)]
        response = api.http.post("/predict", params={"task": ["fish", "birds"]}, files=files, headers=headers)
        assert response.status_code == 200

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    threads[0].start()
    assert engine.entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(batcher) < 8:
        threading.Event().wait(0.01)
    engine.gate.set()
    for thread in threads:
        thread.join(10)
    api.http.get("/healthz")
    for n in (1, 2):
        traced = spans.of(int(ids[n], 16))
        assert len(traced["predict"]) == 2, "two tasks"
        batches = [
            (span.attributes["lensrack.batch.rows"], span.attributes["lensrack.rows"]) for span in traced["batch"]
        ]
        assert batches == [(8, 2), (8, 2)], "each task once, with how many rows of it and how many in all"


def test_a_failed_request_is_a_failed_span_and_an_unsampled_one_none(spans: Spans, api: Api):
    api.floor.engine.culprit = lambda image: True
    theirs = "d" * 32
    assert api.http.post(
        "/predict/fish", content=png(3), headers={**JPEG, "traceparent": f"00-{theirs}-00f067aa0ba902b7-01"}
    ).is_error
    unsampled = "e" * 32
    api.http.post(
        "/predict/fish", content=png(3), headers={**JPEG, "traceparent": f"00-{unsampled}-00f067aa0ba902b7-00"}
    )
    api.http.get("/healthz")
    traced = spans.of(int(theirs, 16))
    assert not traced["POST /predict/{task}"][0].status.is_ok
    assert not traced["predict"][0].status.is_ok
    assert traced["predict"][0].events[0].name == "exception"
    assert not spans.of(int(unsampled, 16)), "the caller has decided"


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "\xe9"])
def test_a_bad_traceparent_is_no_error_but_a_new_trace(spans: Spans, api: Api, header: str):
    answer = api.http.post("/predict/fish", content=png(3), headers={**JPEG, "traceparent": header.encode("latin-1")})
    assert answer.status_code == 200
    api.http.get("/healthz")
    (request,) = [span for span in spans.all() if span.name == "POST /predict/{task}"]
    assert request.parent is None


def test_the_sdk_carries_the_callers_trace(spans: Spans, api: Api):
    with Client(api.url) as client:
        with spans.provider.get_tracer("caller").start_as_current_span("theirs") as theirs:
            client.predict("fish", png(3))
        client.predict("fish", png(3))
    mine = spans.of(theirs.context.trace_id)
    assert mine["POST /predict/{task}"][0].parent.span_id == theirs.context.span_id
    assert len(mine["POST /predict/{task}"]) == 1, "outside of the caller's span there is no trace to go on with"


def test_a_job_is_a_trace_with_its_epochs(spans: Spans, tmp_path: Path):
    house = House(tmp_path)
    house.trainer = house.worker("w1", at_once=2)
    jobs = [house.submit(recipe={**QUICK, "epochs": 2}) for _ in range(2)]
    assert house.trainer.work_once()
    roots = {span.attributes["lensrack.job"]: span for span in spans.all() if span.name == "job"}
    assert set(roots) == {job.id for job in jobs}
    for root in roots.values():
        assert root.parent is None
        epochs = spans.of(root.context.trace_id)["epoch"]
        assert [span.attributes["lensrack.epoch"] for span in epochs] == [1, 2]
        assert all(span.parent.span_id == root.context.span_id for span in epochs), "jobs in one thread stay apart"
        assert root.start_time <= epochs[0].start_time <= epochs[0].end_time <= epochs[1].end_time <= root.end_time


def test_a_log_line_names_its_trace(spans: Spans):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonLines())
    log = logging.getLogger("server.traced")
    log.addHandler(handler)
    with tracing.span("something"):
        log.warning("inside")
    log.warning("outside")
    log.removeHandler(handler)
    inside, outside = map(json.loads, out.getvalue().splitlines())
    assert inside["trace_id"] == f"{spans.all()[0].context.trace_id:032x}"
    assert "trace_id" not in outside


# --- off, and on for real ---------------------------------------------------------------------------------------------


def test_without_traces_nothing_of_opentelemetry_is_imported():
    """By our code: FastAPI imports the interfaces, which do nothing by themselves."""
    code = (
        "import sys, lensrack, server.serving.predictor, server.worker.heartbeat, server.observability.logs\n"
        "import server.observability.tracing as t\n"
        "with t.span('x'), t.request_span('GET', [], {}): t.record_span('y', 1.0)\n"
        "lensrack.Client('http://127.0.0.1:1').close()\n"
        "assert t.current_ids() is None and not t.enabled()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_needs_no_sdk_of_opentelemetry():
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; import lensrack, server.__main__, server.app.server"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_a_missing_extra_is_a_sentence():
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from server.__main__ import cli; cli(['serve', '--port', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LENSRACK_OTLP_ENDPOINT": "http://127.0.0.1:1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "needs the extra `otel`" in done.stderr
    assert "Traceback" not in done.stderr


def test_spans_reach_a_collector_over_otlp():
    exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="needs extra `otel`")
    assert exporter
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{collector.server_port}"
        tracing.start(f"{url}/", service="lensrack-server", version="1", ratio=1.0)
        with tracing.span("something-to-send"):
            pass
        tracing.stop()
        collector.shutdown()
        thread.join(10)
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"something-to-send" in body
    assert b"lensrack-server" in body
    assert not tracing.enabled()
