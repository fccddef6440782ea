"""Builds the services that routes call, and the gRPC server, over an engine in this process or in another."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lensrack import wire
from prompts_store import Store
from server.api import services as api
from server.api.services import Services
from server.api.tenancy import services_by_key
from server.batching.admission import Queue
from server.errors import NotInstalled
from server.jobs.store import JobStore
from server.keys.authenticator import Authenticator
from server.methods.registry import Registry
from server.serving.answers import Limits
from server.serving.predictor import Predictor
from server.serving.residency import Residency
from server.settings import Settings

from . import exporter, instrumentation
from .backbone import UNTRAINED_NOTE, BackboneInfo, importer_for
from .stores import open_datasets, open_feedback, open_meter, open_uploads

if TYPE_CHECKING:  # its packages are an extra's
    from server.api.oip.grpc.server import GrpcServer


@dataclass(frozen=True)
class EngineBindings:
    """What HTTP needs of an engine, wherever it runs.

    `look`: the exclusive work of attention maps · `rack`: what `GET /rack` shows · `ready`: what `GET /readyz` answers.
    """

    backbone: BackboneInfo
    residency: Residency
    batcher: Queue
    look: api.Look
    rack: Callable[[], Awaitable[wire.Rack]]
    ready: Callable[[], wire.Ready]


def build_services(
    settings: Settings, bindings: EngineBindings, *, registry: Registry, store: Store, jobs: JobStore
) -> tuple[Services, ThreadPoolExecutor]:
    """The services that routes call, and the thread pool that decodes."""
    backbone = bindings.backbone
    decoding = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
    predictor = Predictor(
        store,
        bindings.residency,
        bindings.batcher,
        decoding,
        limits=Limits(
            settings.max_images,
            settings.max_image_pixels,
            settings.max_tasks_per_request,
            settings.scaled_decode or math.inf,
        ),
        geometry=backbone.spec.geometry,
        fingerprint=backbone.spec.fingerprint,
    )
    instrumentation.front(predictor.quarantine)
    services = Services(
        settings=settings,
        predictor=predictor,
        batcher=bindings.batcher,
        residency=bindings.residency,
        store=store,
        jobs=jobs,
        datasets=open_datasets(settings),
        uploads=open_uploads(settings),
        feedback=open_feedback(settings),
        ready=bindings.ready,
        rack=bindings.rack,
        look=bindings.look,
        methods=registry.meanings,
        baselines={name: (one.meaning, one.why) for name, one in registry.baselines.items()},
        check_bundle=lambda bundle: registry.check(bundle, backbone.spec),
        importer=importer_for(backbone, registry),
        export=partial(exporter.export, settings),
        meter=open_meter(settings),
    )
    return services, decoding


def readiness(
    backbone: BackboneInfo, settings: Settings, trouble: str, workers: int, away: Sequence[str] = ()
) -> wire.Ready:
    """What `/readyz` answers: the backbone, and whether engine and workers run. `trouble`: what is wrong with the
    engine.
    `away`: what is wrong with some of several engines, while others answer."""
    spec = backbone.spec
    notes = [note for note in (trouble, *away, "" if spec.trained else UNTRAINED_NOTE) if note]
    if settings.scaled_decode:
        notes.append(f"JPEGs larger than {settings.scaled_decode:g} times the needed size are decoded at reduced size")
    if workers < settings.workers:
        notes.append(f"{workers} of {settings.workers} workers are running: training may wait")
    return wire.Ready(
        ready=not trouble,
        backbone=wire.Backbone(
            arch=spec.arch,
            fingerprint=spec.fingerprint,
            trained=spec.trained,
            device=backbone.device,
            dtype=backbone.dtype,
            image_size=spec.image_size,
            depth=spec.depth,
            dim=spec.dim,
        ),
        notes=notes,
        checks={"engine": trouble or "; ".join(away) or "ok", "workers": f"{workers} of {settings.workers}"},
    )


def build_grpc(services: Services, authenticator: Authenticator) -> GrpcServer | None:
    """The gRPC server; None where no port is set. Raises NotInstalled."""
    settings = services.settings
    if not settings.grpc_port:
        return None
    try:
        from server.api.oip.grpc.server import GrpcServer
    except ImportError as error:
        raise NotInstalled(f"LENSRACK_GRPC_PORT needs the extra `grpc`, which brings {error.name}") from error
    return GrpcServer(services_by_key(services), authenticator, settings, settings.grpc_port)
