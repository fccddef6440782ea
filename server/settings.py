"""Every setting once, with its default and its meaning; the only reader of the environment.

Set any of them as `LENSRACK_<NAME>`. Sizes end in `_bytes`, times in `_s`, counts in nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 2**20


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="LENSRACK_", extra="ignore", frozen=True)

    # --- where things lie -------------------------------------------------------------------------------------------
    home: Annotated[Path, Field(description="Folder of everything the embedded server writes.")] = Path("data")
    store: Annotated[
        str, Field(description="Bundle store URL: file://DIR, redis://… or memory://. Empty: HOME/store.")
    ] = ""
    jobs: Annotated[str, Field(description="Job store URL: sqlite://FILE or redis://… Empty: HOME/jobs.sqlite.")] = ""
    keys: Annotated[
        str,
        Field(description="Key store URL: sqlite://FILE or redis://… Empty: the jobs' Redis, else HOME/keys.sqlite."),
    ] = ""
    redis_password_file: Annotated[
        Path | None, Field(description="File with the password of Redis, for URLs that do not hold one themselves.")
    ] = None

    # --- the backbone -----------------------------------------------------------------------------------------------
    backbone: Annotated[
        str,
        Field(description="`bundled`, a timm architecture (optionally .tag), or `untrained`: a small seeded stand-in."),
    ] = "bundled"
    backbone_weights: Annotated[
        Path | None, Field(description="Safetensors file with the backbone's weights; without it timm loads them.")
    ] = None
    sample_tasks: Annotated[
        bool, Field(description="Put the tasks that come with the bundled backbone into a store that holds none.")
    ] = True
    device: Annotated[str, Field(description="`cpu`, `cuda`, `cuda:N`; `auto` takes CUDA where there is one.")] = "auto"
    devices: Annotated[
        str,
        Field(
            description="Several devices of one kind, such as `cuda:0,cuda:1`: an engine's process on each, behind "
            "LENSRACK_FRONTS front ends (1 or more). Empty: LENSRACK_DEVICE alone."
        ),
    ] = ""
    dtype: Annotated[
        str,
        Field(
            description="`float32`, `bfloat16`, `float64`; `auto` is float32 on a CPU, bfloat16 on CUDA. `float8`: "
            "products of the blocks in 8 bits, on CUDA devices of capability 8.9 and newer; workers fit as `auto`. "
            "Ask `bench precision` what it costs; not yet run on a GPU."
        ),
    ] = "auto"
    threads: Annotated[
        int, Field(ge=0, description="Threads of each engine on a CPU; 0 leaves one core to everything else.")
    ] = 0
    packed: Annotated[
        bool,
        Field(description="On a CPU, a second copy of the blocks' weights in the layout that multiplies fastest."),
    ] = True

    cuda_graphs: Annotated[
        bool,
        Field(
            description="On CUDA, record the forward of prompts and heads at start, checked against the ordinary one, "
            "and launch it as a whole. Off until somebody has run it on a GPU: nobody has yet."
        ),
    ] = False

    # --- HTTP -------------------------------------------------------------------------------------------------------
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    fronts: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Processes that speak HTTP and decode images, before the engine's own (Linux); 0: all in one, "
            "which is all there is elsewhere.",
        ),
    ] = 1 if sys.platform.startswith("linux") else 0
    grpc_port: Annotated[
        int,
        Field(
            ge=0, le=65535, description="Port at the same address for the Open Inference Protocol over gRPC; 0: none."
        ),
    ] = 0
    allow_open: Annotated[
        bool, Field(description="Allow an address other than loopback although the server has no API keys.")
    ] = False
    keys_file: Annotated[
        Path | None, Field(description="File of API keys that a secret manager mounts; read again when it changes.")
    ] = None
    open_metrics: Annotated[bool, Field(description="Show /metrics without a key to whoever reaches the server.")] = (
        False
    )
    allowed_hosts: Annotated[
        str,
        Field(
            description="Names by which clients may call the server, with commas; elsewhere than on a loopback address "
            "they may call it by address too. Empty: on a loopback address only local names, elsewhere any."
        ),
    ] = ""
    max_connections: Annotated[
        int, Field(gt=0, description="Connections that may be open; beyond it the answer is 503, but for probes.")
    ] = 2000
    max_body_bytes: Annotated[int, Field(gt=0, description="Largest body of a predict request.")] = 32 * MIB
    max_bundle_bytes: Annotated[int, Field(gt=0, description="Largest bundle that can be uploaded.")] = 64 * MIB
    max_dataset_bytes: Annotated[int, Field(gt=0, description="Largest archive that can be uploaded.")] = (
        10 * 1024 * MIB
    )
    max_json_bytes: Annotated[int, Field(gt=0, description="Largest JSON body elsewhere.")] = MIB
    body_timeout_s: Annotated[
        float, Field(gt=0, description="Longest a request's head, or its body, may take to come, but for archives.")
    ] = 60.0
    request_timeout_s: Annotated[float, Field(gt=0, description="Longest a prediction may wait for its answer.")] = 30.0
    drain_timeout_s: Annotated[float, Field(gt=0, description="Longest a shutdown waits for answers in flight.")] = 10.0

    engine_timeout_s: Annotated[
        float,
        Field(
            ge=0,
            description="Longest the engine may be at one batch: then the server is not ready, and ends itself unless "
            "the engine comes back within the time of a drain. 0: no watch is kept.",
        ),
    ] = 120.0

    # --- images -----------------------------------------------------------------------------------------------------
    max_images: Annotated[int, Field(gt=0, description="Most images in one predict request.")] = 64
    max_image_pixels: Annotated[int, Field(gt=0, description="Most pixels in one image.")] = 50_000_000
    max_tasks_per_request: Annotated[
        int, Field(gt=0, description="Most tasks one image can be asked about at once.")
    ] = 64
    scaled_decode: Annotated[
        float,
        Field(
            ge=0,
            le=8,
            description="Decode JPEGs for predictions at a half, a quarter or an eighth of their size, as long as that "
            "is so many times what the version resizes to: cheaper for large photographs, not quite the pixels that "
            "it was fitted on. 2 is near, 1 is not; 0 decodes all of them whole.",
        ),
    ] = 0.0
    decode_threads: Annotated[int, Field(gt=0, description="Threads that decode and resize images.")] = 2

    # --- batching and the rack --------------------------------------------------------------------------------------
    max_batch: Annotated[int, Field(gt=0, description="Most rows in one forward.")] = 32
    target_latency_s: Annotated[
        float,
        Field(
            ge=0,
            description="Learn from measured forwards how many rows one may have, so that 99 in 100 rows whose turn "
            "has come are answered within so many seconds. 0: LENSRACK_MAX_BATCH alone counts.",
        ),
    ] = 0.0
    max_queue: Annotated[
        int, Field(gt=0, description="Rows that may wait, whatever LENSRACK_MAX_WAIT_S; beyond it the answer is 429.")
    ] = 512
    max_wait_s: Annotated[
        float,
        Field(
            ge=0,
            description="As many rows may wait as the engine works off in so many seconds, as measured, and two "
            "full batches in any case; who comes then is told 429. 0: LENSRACK_MAX_QUEUE alone counts.",
        ),
    ] = 0.25
    rack_slots: Annotated[int, Field(gt=0, description="Most lenses on the device at once.")] = 1024
    rack_bytes: Annotated[int, Field(gt=0, description="Device memory of the rack.")] = 256 * MIB
    cache_bytes: Annotated[int, Field(ge=0, description="Host memory for decoded bundles.")] = 256 * MIB

    # --- training ---------------------------------------------------------------------------------------------------
    workers: Annotated[int, Field(ge=0, le=64, description="Worker processes that `serve` starts and supervises.")] = 1
    worker_threads: Annotated[int, Field(ge=0, description="Threads of a worker; 0 takes half of the cores.")] = 0
    worker_jobs: Annotated[
        int, Field(ge=1, le=64, description="Jobs that a worker fits in one batch; more pays on a GPU.")
    ] = 1
    worker_nice: Annotated[int, Field(ge=0, le=19, description="How far a worker steps back for the server.")] = 10
    lease_s: Annotated[float, Field(gt=0, description="How long a silent worker keeps its job.")] = 30.0
    max_attempts: Annotated[int, Field(gt=0, description="Attempts before a job is given up.")] = 3
    jobs_keep_s: Annotated[
        float, Field(ge=0, description="How long finished jobs and their events are kept; 0: for ever.")
    ] = 30 * 86_400.0
    worker_gpu_memory: Annotated[
        float, Field(gt=0, le=1, description="Share of a CUDA device's memory that a worker may take.")
    ] = 0.5
    pixel_cache_bytes: Annotated[
        int, Field(ge=0, description="Disk for decoded training pictures, shared by all workers; 0 keeps none.")
    ] = 4 * 1024 * MIB
    pixel_memory_bytes: Annotated[
        int, Field(ge=0, description="Memory of each worker for decoded training pictures.")
    ] = 128 * MIB
    feature_cache_bytes: Annotated[
        int, Field(ge=0, description="Disk for frozen features of datasets, shared by all workers; 0 keeps none.")
    ] = 2 * 1024 * MIB

    # --- datasets ---------------------------------------------------------------------------------------------------
    max_dataset_images: Annotated[int, Field(gt=0, description="Most images in one dataset.")] = 1_000_000
    max_unpacked_bytes: Annotated[int, Field(gt=0, description="Most bytes an archive may unpack to.")] = (
        40 * 1024 * MIB
    )
    upload_expiry_s: Annotated[
        float, Field(gt=0, description="How long a resumable upload that nobody goes on with is kept.")
    ] = 86_400.0
    upload_silence_s: Annotated[
        float, Field(gt=0, description="How long an archive on its way may stay silent before it is ended.")
    ] = 30.0
    max_feedback_images: Annotated[int, Field(gt=0, description="Most images of feedback kept for one task.")] = 100_000

    # --- logs -------------------------------------------------------------------------------------------------------
    log_level: Annotated[str, Field(description="`debug`, `info`, `warning` or `error`.")] = "info"
    log_format: Annotated[
        Literal["text", "json"], Field(description="`text` for people, `json` for machines: an object a line.")
    ] = "text"

    # --- metrics and traces -----------------------------------------------------------------------------------------
    metrics_tasks: Annotated[
        int,
        Field(ge=0, le=1000, description="Tasks with a label of their own in metrics, the busiest; the rest: `other`."),
    ] = 50
    watch_s: Annotated[
        float, Field(gt=0, description="How often the server looks whether its stores answer, for the metrics.")
    ] = 5.0
    worker_metrics_port: Annotated[
        int,
        Field(
            ge=0, le=65535, description="Port of a worker's own /metrics, 0: none; `serve` gives each worker the next."
        ),
    ] = 0
    worker_metrics_host: Annotated[str, Field(description="Address of a worker's own /metrics.")] = "127.0.0.1"
    otlp_endpoint: Annotated[
        str, Field(description="Where traces go, OTLP over HTTP, such as http://collector:4318. Empty: no traces.")
    ] = ""
    trace_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of the traces that begin here and are kept.")
    ] = 1.0

    @property
    def store_url(self) -> str:
        return self._with_password(self.store) or f"file://{self.home.resolve() / 'store'}"

    @property
    def jobs_url(self) -> str:
        return self._with_password(self.jobs) or f"sqlite://{self.home.resolve() / 'jobs.sqlite'}"

    @property
    def keys_url(self) -> str:
        shared = self.jobs_url if self.jobs_url.startswith(("redis://", "rediss://")) else ""
        return self._with_password(self.keys) or shared or f"sqlite://{self.home.resolve() / 'keys.sqlite'}"

    def _with_password(self, url: str) -> str:
        """A redis URL with the password of the file. Raises ValueError when the file gives none."""
        if self.redis_password_file is None or not url.startswith(("redis://", "rediss://")):
            return url
        parts = urlsplit(url)
        if parts.password is not None:
            return url
        user, _, place = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}:{quote(self._redis_password(), safe='')}@{place}").geturl()

    def _redis_password(self) -> str:
        try:
            lines = self.redis_password_file.read_text().splitlines() if self.redis_password_file else []
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(f"LENSRACK_REDIS_PASSWORD_FILE: expected a file that can be read: {reason}") from None
        if len(lines) != 1 or not lines[0]:
            raise ValueError(f"LENSRACK_REDIS_PASSWORD_FILE: expected one line, got {len(lines)}")
        return lines[0]

    @property
    def downloads_weights(self) -> bool:
        """Whether timm has to find the backbone's weights by itself."""
        return self.backbone_weights is None and self.backbone not in ("bundled", "untrained")

    @property
    def engine_devices(self) -> tuple[str, ...]:
        """One for each engine. Raises ValueError."""
        named = tuple(one.strip() for one in self.devices.split(",")) if self.devices.strip() else (self.device,)
        kinds = {one.partition(":")[0] for one in named}
        if "" in kinds or len(kinds) > 1 or (len(named) > 1 and kinds == {"auto"}):
            raise ValueError(
                f"LENSRACK_DEVICES: expected devices of one kind with commas, such as cuda:0,cuda:1, got {self.devices}"
            )
        return named

    @property
    def worker_device(self) -> str:
        """Workers fit on LENSRACK_DEVICE, or where that is left to us on the first engine's. Raises ValueError."""
        return self.engine_devices[0] if self.device == "auto" else self.device

    @property
    def datasets_dir(self) -> Path:
        return self.home.resolve() / "datasets"

    @property
    def pixel_cache_dir(self) -> Path:
        return self.home.resolve() / "cache" / "pixels"

    @property
    def feature_cache_dir(self) -> Path:
        return self.home.resolve() / "cache" / "features"
