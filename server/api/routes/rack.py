"""The state of the device, and the methods that it serves: for dashboards and operators."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import Counter, Histogram

from lensrack import wire
from server.api.services import ServicesOf
from server.observability import metrics

router = APIRouter(tags=["rack"])


@router.get("/rack")
async def get_rack(services: ServicesOf) -> wire.Rack:
    """The versions on the device, the rows that wait for it, and the sizes of its batches. A key for some tasks sees
    only these, and no counts over all tasks."""
    counts_of, now = services.predictor.request_counts, await services.rack()
    seats = [seat.model_copy(update={"requests": counts_of(seat.task)[seat.version]}) for seat in now.seats]
    if services.tenant:
        sizes = {"max_queue": services.settings.max_queue, "max_batch": services.settings.max_batch}
        return now.model_copy(update={"seats": seats, **sizes})
    await metrics.refresh()
    batch_rows = counts(metrics.BATCH_ROWS)
    return now.model_copy(
        update={
            "seats": seats,
            "queued": len(services.batcher),
            "places": services.batcher.places,
            "max_queue": services.settings.max_queue,
            "max_batch": services.settings.max_batch,
            "rows": outcomes(metrics.ROWS),
            "forwards": sum(batch_rows.values()),
            "batch_rows": batch_rows,
            "batch_tasks": counts(metrics.BATCH_TASKS),
        }
    )


@router.get("/methods")
async def list_methods(services: ServicesOf) -> wire.MethodList:
    """How a task can be fitted."""
    known = sorted(services.methods.items())
    return wire.MethodList(
        methods=[wire.Method(name=name, meaning=meaning) for name, meaning in known],
        baselines=[wire.Method(name=name, meaning=meaning) for name, (meaning, _) in services.baselines.items()],
    )


def counts(histogram: Histogram) -> dict[str, int]:
    """Return a histogram's observations by the upper end of their bucket; empty buckets are left out."""
    observations, below = {}, 0.0
    for sample in metrics.samples(histogram):
        if sample.name.endswith("_bucket"):
            if sample.value > below:
                observations[sample.labels["le"].removesuffix(".0")] = int(sample.value - below)
            below = sample.value
    return observations


def outcomes(counter: Counter) -> dict[str, int]:
    """Return a counter's values by their label `outcome`."""
    totals = [sample for sample in metrics.samples(counter) if sample.name.endswith("_total")]
    return {sample.labels["outcome"]: int(sample.value) for sample in totals}
