"""A worker's process, and what it is built of: the trainer with its backbone, its stores and its caches."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from prometheus_client import start_http_server

from prompts_store import StoreError, open_store
from server.engine.backbone import Backbone, BackboneError
from server.errors import ServiceError
from server.methods.registry import Registry
from server.observability import metrics
from server.settings import Settings
from server.training.low_priority import cap_memory
from server.training.stored_images import Decoder
from server.worker.checkpoints import Checkpoints
from server.worker.dataset_reader import DatasetReader
from server.worker.resources import Resources
from server.worker.trainer import Trainer

from . import instrumentation
from .backbone import UNTRAINED_NOTE, load_backbone
from .instrumentation import CountedFeatures, CountedPixels
from .stores import open_datasets, open_jobs

log = logging.getLogger(__name__)


def run_worker(settings: Settings, stop: threading.Event | None = None, *, give_up_s: float | None = None) -> int:
    """Fit jobs until SIGTERM, SIGINT or `stop`; return the exit status. A worker that cannot start says why.

    `give_up_s`: how long after a signal the job may take to go back to the queue, before the process is killed.
    """
    stop = stop or threading.Event()

    def leave(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        if give_up_s is not None:
            threading.Thread(target=_kill_after, args=(give_up_s,), daemon=True).start()

    os.nice(settings.worker_nice)
    try:
        trainer = build_worker(settings, f"{socket.gethostname()}-{os.getpid()}", stop)
        if settings.worker_metrics_port:
            start_http_server(settings.worker_metrics_port, settings.worker_metrics_host, metrics.REGISTRY)
    except (BackboneError, StoreError, ServiceError, ValueError, OSError) as error:
        print(f"the worker cannot start: {error}", file=sys.stderr, flush=True)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    log.info("worker ready, pid %d", os.getpid())
    trainer.run()
    return 0


def _kill_after(seconds: float) -> None:
    time.sleep(seconds)
    log.warning("the worker has not left within %.0f s and is killed", seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def build_worker(settings: Settings, name: str, stop: threading.Event | None = None) -> Trainer:
    """Load the backbone, open the stores and return the trainer, which runs until `stop` is set. `name`: the worker's
    name in the job store.

    Raises BackboneError, StoreError, ServiceError, ValueError, OSError.
    """
    cores = os.cpu_count() or 1
    threads = settings.worker_threads or max(1, cores // 2)
    backbone = load_backbone(settings, threads, settings.worker_device, training=True)
    cap_memory(backbone.device, settings.worker_gpu_memory)
    instrumentation.process(settings, backbone)
    if not backbone.spec.trained:
        log.warning(UNTRAINED_NOTE)
    return Trainer(
        open_resources(settings, backbone),
        open_store(settings.store_url),
        open_jobs(settings),
        worker=name,
        lease_s=settings.lease_s,
        keep_s=settings.jobs_keep_s,
        at_once=settings.worker_jobs,
        stop=stop,
    )


def open_resources(settings: Settings, backbone: Backbone) -> Resources:
    datasets = open_datasets(settings)
    pixels = CountedPixels(
        settings.pixel_cache_dir, disk_bytes=settings.pixel_cache_bytes, memory_bytes=settings.pixel_memory_bytes
    )
    pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
    decoder = Decoder(datasets.read, backbone.spec.geometry, settings.max_image_pixels, pixels, pool)
    return Resources(
        backbone,
        Registry.installed(),
        datasets,
        DatasetReader(decoder),
        CountedFeatures(settings.feature_cache_dir, settings.feature_cache_bytes),
        Checkpoints(settings.home.resolve() / "checkpoints"),
    )
