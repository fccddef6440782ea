"""What a worker's process is built of: the trainer with its backbone, its stores and its caches."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from prompts_store import open_store
from server.engine.backbone import Backbone
from server.methods.registry import Registry
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


def build_worker(settings: Settings, name: str) -> Trainer:
    """Load the backbone, open the stores and return the trainer. `name`: the worker's name in the job store.

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
