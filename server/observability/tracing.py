"""OpenTelemetry traces, for whoever installs the extra `otel` and says where they go; otherwise nothing is imported.

    request ─┬─ predict ─┬─ seat, decode                     job ─── epoch, epoch, …
             │           └─ queue ─► batch ─► forward
             └─ the caller's own trace goes on: `traceparent` (W3C Trace Context)

A batch serves rows of many requests. Each of them has the batch in its own trace, with how many rows shared it; a
request with several rows in a batch has it once.
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
    """Traces were asked for and the packages are not there."""


def require() -> list[Any]:
    """The modules that send traces: SDK, sampling, export, OTLP's exporter, resources. Raises NotInstalled."""
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

    `ratio` is the share of traces that begin here and are kept; a caller that has decided already is followed.
    """
    sdk, sampling, batches, otlp, resources = require()
    resource = resources.Resource.create({"service.name": service, "service.version": version})
    sampler = sampling.ParentBased(sampling.TraceIdRatioBased(ratio))
    provider = sdk.TracerProvider(resource=resource, sampler=sampler)
    exporter = otlp.OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(batches.BatchSpanProcessor(exporter))
    use(provider)


def use(provider: Any) -> None:
    """Trace with this TracerProvider; None turns traces off."""
    global _tracer, _provider  # noqa: PLW0603  # like logging: one for the process
    _provider = provider
    _tracer = provider.get_tracer("lensrack") if provider is not None else None


def stop() -> None:
    """Send what has not been sent; no traces from here on."""
    if _provider is not None:
        _provider.shutdown()
    use(None)


def on() -> bool:
    return _tracer is not None


def ids() -> tuple[str, str] | None:
    """The present trace's id and span's id in hexadecimal, as other tools write them."""
    if _tracer is None:
        return None
    found = _api().get_current_span().get_span_context()
    return (f"{found.trace_id:032x}", f"{found.span_id:016x}") if found.is_valid else None


def span(name: str, attributes: Attributes = NONE) -> AbstractContextManager[Any]:
    """A span around a block, under the present one; an exception marks it as failed."""
    if _tracer is None:
        return _OFF
    return _tracer.start_as_current_span(name, attributes=attributes)  # type: ignore[no-any-return]


@contextmanager
def request(name: str, headers: Iterable[tuple[bytes, bytes]], attributes: Attributes) -> Iterator[Any]:
    """A server span around a request, in the trace that its `traceparent` header names; None where traces are off."""
    if _tracer is None:
        yield None
        return
    w3c = importlib.import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
    carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key.startswith(b"trace")}
    with _tracer.start_as_current_span(
        name, context=w3c.extract(carrier), kind=_api().SpanKind.SERVER, attributes=attributes
    ) as found:
        yield found


def answered(found: Any, name: str, attributes: Attributes, *, failed: bool) -> None:
    """Tell a request's span, None where traces are off, what is known only at its end."""
    if found is not None:
        found.update_name(name)
        found.set_attributes(attributes)
        if failed:
            found.set_status(_api().StatusCode.ERROR)


def since(name: str, ago_s: float, attributes: Attributes = NONE) -> None:
    """A span under the present one that began so many seconds ago and ends now."""
    if _tracer is not None:
        _past(name, (0.0, ago_s, ago_s), None, attributes)


def batch(
    contexts: Iterable[tuple[Context, float]], taken: float, forward: tuple[float, float], now: float, about: Attributes
) -> None:
    """Queue, batch and forward in the trace of each request that had rows in a batch.

    `contexts`: each row's context and when the row arrived; all times are seconds of one clock.
    """
    if _tracer is None:
        return
    for context, (arrived, rows) in _by_request(contexts).items():
        parent = _api().set_span_in_context(context)
        _past("queue", (arrived, taken, now), parent, {"lensrack.rows": rows})
        shared = _past("batch", (taken, forward[1], now), parent, {"lensrack.rows": rows, **about})
        _past("forward", (*forward, now), _api().set_span_in_context(shared), NONE)


def _by_request(contexts: Iterable[tuple[Context, float]]) -> Mapping[Any, tuple[float, int]]:
    """The requests' spans, with when their first row arrived and how many there are."""
    found: dict[Any, tuple[float, int]] = {}
    for context, arrived in contexts:
        own = context.run(_api().get_current_span)
        if own.is_recording():
            first, rows = found.get(own, (arrived, 0))
            found[own] = min(first, arrived), rows + 1
    return found


def _past(name: str, times: tuple[float, float, float], parent: Any, attributes: Attributes) -> Any:
    """`times`: when it began, when it ended, and now, in seconds of one clock."""
    began, ended, now = times
    wall_ns = time.time_ns()
    start_ns, end_ns = (wall_ns - int((now - at) * 1e9) for at in (began, ended))
    found = _tracer.start_span(name, context=parent, start_time=start_ns, attributes=attributes)
    found.end(end_ns)
    return found


def _api() -> Any:
    return importlib.import_module("opentelemetry.trace")
