"""A worker's process, and what it is built of: the trainer with its backbone, its stores and its caches."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from prometheus_client import start_http_server

from prompts_store import open_store
from server.engine.backbone import Backbone
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
from .stores import open_datasets, open_jobs, require_storage

log = logging.getLogger(__name__)


def run_worker(
    settings: Settings,
    stop: threading.Event | None = None,
    *,
    of_terminal: bool = False,
    give_up_s: float | None = None,
) -> int:
    """Fit jobs until SIGTERM or `stop`, then return the job to the queue; return the exit status.

    `of_terminal`: SIGINT counts as well, and a second one ends the worker at once; else whoever started the worker gets
    it, too, and decides. `give_up_s`: how long after SIGTERM the job may take, before the process is killed. Raises
    BackboneError, StoreError, ServiceError, ValueError, OSError.
    """
    stop = stop or threading.Event()

    def leave(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            log.warning("stopped at once, by a second signal; the lease of a running job ends by itself")
            os._exit(128 + number)  # as a program that the signal has killed
        stop.set()
        if give_up_s is not None:
            threading.Thread(target=_kill_after, args=(give_up_s,), daemon=True).start()

    os.nice(settings.worker_nice)
    require_storage(settings)
    trainer = build_worker(settings, f"{socket.gethostname()}-{os.getpid()}", stop)
    if settings.worker_metrics_port:
        _serve_metrics(settings)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave if of_terminal else signal.SIG_IGN)
    log.info("worker ready, pid %d", os.getpid())
    trainer.run()
    log.info("worker stopped, pid %d", os.getpid())
    return 0


def _serve_metrics(settings: Settings) -> None:
    try:
        start_http_server(settings.worker_metrics_port, settings.worker_metrics_host, metrics.REGISTRY)
    except OSError as error:
        place = f"{settings.worker_metrics_port} at {settings.worker_metrics_host}"
        expected = "LENSRACK_WORKER_METRICS_PORT: expected a free port"
        raise OSError(f"{expected}, got {place}: {error.strerror}") from error


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
