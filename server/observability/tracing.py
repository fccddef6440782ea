"""OpenTelemetry traces, where the extra `otel` is installed and an endpoint is set; otherwise nothing is imported.

    request ─┬─ predict ─┬─ seat, decode                     job ─── epoch, epoch, …
             │           └─ queue ─► batch ─► forward
             └─ continues the caller's trace: `traceparent` (W3C Trace Context)

A batch serves rows of many requests. Each request's trace contains the batch once, with the number of rows in it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context
from typing import Any, Final

Attributes = Mapping[str, str | int | float | bool]

NONE: Final[Attributes] = {}
_OFF: Final[AbstractContextManager[None]] = nullcontext()
_tracer: Any = None  # an OpenTelemetry Tracer while traces are on
_provider: Any = None


class NotInstalled(RuntimeError):
    """Traces are enabled but the packages of the extra `otel` are missing."""


def require() -> list[Any]:
    """The modules SDK, sampling, export, OTLP exporter and resources of OpenTelemetry. Raises NotInstalled."""
    try:
        return [
            importlib.import_module("opentelemetry.sdk.trace"),
            importlib.import_module("opentelemetry.sdk.trace.sampling"),
            importlib.import_module("opentelemetry.sdk.trace.export"),
            importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter"),
            importlib.import_module("opentelemetry.sdk.resources"),
        ]
    except ImportError as error:
        raise NotInstalled(f"LENSRACK_OTLP_ENDPOINT needs the extra `otel`, which brings {error.name}") from error


def start(endpoint: str, *, service: str, version: str, ratio: float) -> None:
    """Send traces to this OTLP/HTTP endpoint, such as http://collector:4318. Raises NotInstalled.

    `ratio` is the share of the traces begun here that is kept; for others the caller's decision holds.
    """
    sdk, sampling, batches, otlp, resources = require()
    resource = resources.Resource.create({"service.name": service, "service.version": version})
    sampler = sampling.ParentBased(sampling.TraceIdRatioBased(ratio))
    provider = sdk.TracerProvider(resource=resource, sampler=sampler)
    exporter = otlp.OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(batches.BatchSpanProcessor(exporter))
    use_provider(provider)


def use_provider(provider: Any) -> None:
    """Trace with this TracerProvider; None turns traces off."""
    global _tracer, _provider  # noqa: PLW0603  # one for the process, like logging's
    _provider = provider
    _tracer = provider.get_tracer("lensrack") if provider is not None else None


def stop() -> None:
    """Send the pending spans and turn traces off."""
    if _provider is not None:
        _provider.shutdown()
    use_provider(None)


def enabled() -> bool:
    return _tracer is not None


def current_ids() -> tuple[str, str] | None:
    """Trace id and span id of the current span, in hexadecimal; None without one."""
    if _tracer is None:
        return None
    context = _api().get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


def span(name: str, attributes: Attributes = NONE) -> AbstractContextManager[Any]:
    """A context manager that makes a child span of the current one; an exception marks it as failed."""
    if _tracer is None:
        return _OFF
    return _tracer.start_as_current_span(name, attributes=attributes)  # type: ignore[no-any-return]


@contextmanager
def request_span(name: str, headers: Iterable[tuple[bytes, bytes]], attributes: Attributes) -> Iterator[Any]:
    """A server span around a request, in the trace of its `traceparent` header; yields None where traces are off."""
    if _tracer is None:
        yield None
        return
    w3c = importlib.import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
    carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key.startswith(b"trace")}
    with _tracer.start_as_current_span(
        name, context=w3c.extract(carrier), kind=_api().SpanKind.SERVER, attributes=attributes
    ) as server_span:
        yield server_span


def finish_request(server_span: Any, name: str, attributes: Attributes, *, failed: bool) -> None:
    """Set a request span's final name, attributes and status; `server_span` is None where traces are off."""
    if server_span is not None:
        server_span.update_name(name)
        server_span.set_attributes(attributes)
        if failed:
            server_span.set_status(_api().StatusCode.ERROR)


def record_span(name: str, duration_s: float, attributes: Attributes = NONE) -> None:
    """Record a child span of the current one that began `duration_s` ago and ends now."""
    if _tracer is not None:
        _record(name, (0.0, duration_s, duration_s), None, attributes)


def record_batch(
    contexts: Iterable[tuple[Context, float]], taken: float, forward: tuple[float, float], now: float, extra: Attributes
) -> None:
    """Record the spans queue, batch and forward in the trace of each request that had rows in a batch.

    `contexts`: each row's context and arrival. `forward`: begin and end. `extra`: attributes of the batch. All times
    are seconds of one clock.
    """
    if _tracer is None:
        return
    for context, (arrived, rows) in _by_request(contexts).items():
        parent = _api().set_span_in_context(context)
        _record("queue", (arrived, taken, now), parent, {"lensrack.rows": rows})
        shared = _record("batch", (taken, forward[1], now), parent, {"lensrack.rows": rows, **extra})
        _record("forward", (*forward, now), _api().set_span_in_context(shared), NONE)


def _by_request(contexts: Iterable[tuple[Context, float]]) -> Mapping[Any, tuple[float, int]]:
    """request span → arrival of its first row, and its number of rows; recording spans only."""
    requests: dict[Any, tuple[float, int]] = {}
    for context, arrived in contexts:
        parent = context.run(_api().get_current_span)
        if parent.is_recording():
            first, rows = requests.get(parent, (arrived, 0))
            requests[parent] = min(first, arrived), rows + 1
    return requests


def _record(name: str, times: tuple[float, float, float], parent: Any, attributes: Attributes) -> Any:
    """Record a span that has ended. `times`: begin, end and now, in seconds of one clock."""
    began, ended, now = times
    wall_ns = time.time_ns()
    start_ns, end_ns = (wall_ns - int((now - at) * 1e9) for at in (began, ended))
    recorded = _tracer.start_span(name, context=parent, start_time=start_ns, attributes=attributes)
    recorded.end(end_ns)
    return recorded


def _api() -> Any:
    return importlib.import_module("opentelemetry.trace")
