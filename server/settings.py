"""All settings with their defaults and meanings. No other module reads the environment.

Each is set as `LENSRACK_<NAME>`. Sizes end in `_bytes`, times in `_s`; counts have no ending.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 2**20
PREFIX = "LENSRACK_"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    # --- storage ----------------------------------------------------------------------------------------------------
    home: Annotated[Path, Field(description="Folder for everything that the server writes to disk.")] = Path("data")
    store: Annotated[
        str, Field(description="Bundle store URL: file://DIR, redis://… or memory://. Empty: HOME/store.")
    ] = ""
    jobs: Annotated[str, Field(description="Job store URL: sqlite://FILE or redis://… Empty: HOME/jobs.sqlite.")] = ""
    keys: Annotated[
        str,
        Field(description="Key store URL: sqlite://FILE or redis://… Empty: the jobs' Redis, else HOME/keys.sqlite."),
    ] = ""
    redis_password_file: Annotated[
        Path | None, Field(description="File with the Redis password, for URLs without one.")
    ] = None

    # --- the backbone -----------------------------------------------------------------------------------------------
    backbone: Annotated[
        str,
        Field(description="`bundled`, a timm architecture (optionally .tag), or `untrained`: small, random weights."),
    ] = "bundled"
    backbone_weights: Annotated[
        Path | None, Field(description="Safetensors file with the backbone's weights. Unset: timm loads them.")
    ] = None
    sample_tasks: Annotated[
        bool, Field(description="Add the tasks bundled with the backbone to a store without tasks.")
    ] = True
    device: Annotated[str, Field(description="`cpu`, `cuda`, `cuda:N`; `auto`: CUDA if available.")] = "auto"
    devices: Annotated[
        str,
        Field(
            description="Several devices of one kind, such as `cuda:0,cuda:1`: one engine process on each, shared by "
            "LENSRACK_FRONTS front ends (1 or more). Empty: one engine on LENSRACK_DEVICE."
        ),
    ] = ""
    dtype: Annotated[
        str,
        Field(
            description="`float32`, `bfloat16`, `float64`; `auto` is float32 on a CPU, bfloat16 on CUDA. `float8`: "
            "products of the blocks in 8 bits, on CUDA devices of capability 8.9 and newer; workers fit as `auto`. "
            "`bench precision` measures the error. Not yet run on a GPU."
        ),
    ] = "auto"
    threads: Annotated[int, Field(ge=0, description="Threads of each engine on a CPU; 0: all cores but one.")] = 0
    packed: Annotated[
        bool,
        Field(description="On a CPU, keep a second copy of the blocks' weights, in a layout that multiplies faster."),
    ] = True

    cuda_graphs: Annotated[
        bool,
        Field(
            description="On CUDA, capture the forward as CUDA graphs at start, and check them against the ordinary "
            "forward. Off by default: not yet run on a GPU."
        ),
    ] = False

    # --- HTTP -------------------------------------------------------------------------------------------------------
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 8000
    root_path: Annotated[
        str,
        Field(
            pattern=r"^(/[A-Za-z0-9._~-]+)*$",
            description="Path under which a proxy serves this server, such as `/lensrack`, whether or not the proxy "
            "takes it off. Empty: none.",
        ),
    ] = ""
    fronts: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Front-end processes, which serve HTTP and decode images, beside the engine's process. "
            "0: a single process, the only mode outside Linux.",
        ),
    ] = 1 if sys.platform.startswith("linux") else 0
    grpc_port: Annotated[
        int,
        Field(
            ge=0, le=65535, description="Port for the Open Inference Protocol over gRPC, at the same address; 0: none."
        ),
    ] = 0
    allow_open: Annotated[bool, Field(description="Allow listening beyond loopback without any API keys.")] = False
    keys_file: Annotated[
        Path | None, Field(description="File of API keys from a secret manager; read again when it changes.")
    ] = None
    open_metrics: Annotated[bool, Field(description="Serve /metrics without a key.")] = False
    trusted_proxies: Annotated[
        str,
        Field(
            description="Addresses and networks of proxies, separated by commas, whose X-Forwarded-For and "
            "X-Forwarded-Proto are believed; *: any."
        ),
    ] = "127.0.0.1,::1"
    allowed_hosts: Annotated[
        str,
        Field(
            description="Host names that requests may use, separated by commas; beyond loopback, also the server's "
            "addresses. Empty: local names on a loopback address, any name elsewhere."
        ),
    ] = ""
    stuck_s: Annotated[
        float,
        Field(gt=1, description="Seconds without a sign of life after which an engine or a front end is replaced."),
    ] = 20.0
    max_connections: Annotated[
        int, Field(gt=0, description="Most open connections; beyond it requests other than probes get 503.")
    ] = 2000
    max_body_bytes: Annotated[int, Field(gt=0, description="Largest body of a predict request.")] = 64 * MIB
    max_bundle_bytes: Annotated[int, Field(gt=0, description="Largest bundle that can be uploaded.")] = 64 * MIB
    max_dataset_bytes: Annotated[int, Field(gt=0, description="Largest dataset that can be uploaded.")] = (
        10 * 1024 * MIB
    )
    max_json_bytes: Annotated[int, Field(gt=0, description="Largest JSON body of other requests.")] = MIB
    body_timeout_s: Annotated[
        float, Field(gt=0, description="Longest time to receive a request's head, or its body other than a dataset.")
    ] = 60.0
    request_timeout_s: Annotated[float, Field(gt=0, description="Longest time to answer a prediction.")] = 30.0
    drain_timeout_s: Annotated[
        float, Field(gt=0, description="Longest time that a shutdown waits for open requests.")
    ] = 10.0

    engine_timeout_s: Annotated[
        float,
        Field(
            ge=0,
            description="Longest time for one batch. Beyond it the server reports not ready, and exits unless the "
            "engine answers within LENSRACK_DRAIN_TIMEOUT_S. 0: no limit.",
        ),
    ] = 120.0

    # --- images -----------------------------------------------------------------------------------------------------
    max_images: Annotated[int, Field(gt=0, description="Most images in one predict request.")] = 64
    max_image_pixels: Annotated[
        int,
        Field(
            gt=0,
            description="Most pixels in one image. Decoding takes 4 bytes for each, up to 10 if it is transparent, in "
            "each of LENSRACK_DECODE_THREADS. The default is enough for a phone's 108 megapixels.",
        ),
    ] = 120_000_000
    max_tasks_per_request: Annotated[int, Field(gt=0, description="Most tasks in one predict request.")] = 64
    scaled_decode: Annotated[
        float,
        Field(
            ge=0,
            le=8,
            description="Decode JPEGs for predictions at 1/2, 1/4 or 1/8 of their size, if that is at least this many "
            "times the size that the version resizes to. Faster for large photographs, but the pixels differ from "
            "those it was fitted on: slightly at 2, clearly at 1. 0: decode in full size.",
        ),
    ] = 0.0
    decode_threads: Annotated[int, Field(gt=0, description="Threads that decode and resize images.")] = 2

    # --- batching and the rack --------------------------------------------------------------------------------------
    max_batch: Annotated[int, Field(gt=0, description="Most rows in one forward.")] = 32
    target_latency_s: Annotated[
        float,
        Field(
            ge=0,
            description="Limit batches by measured times, so that 99 % of rows are answered within this time once "
            "their turn has come. 0: only LENSRACK_MAX_BATCH limits them.",
        ),
    ] = 0.0
    max_queue: Annotated[
        int,
        Field(gt=0, description="Most rows in the queue, whatever LENSRACK_MAX_WAIT_S; beyond it requests get 429."),
    ] = 512
    max_wait_s: Annotated[
        float,
        Field(
            ge=0,
            description="Longest time in the queue, estimated from the measured rate; beyond it requests get 429. "
            "Two full batches may always wait. 0: only LENSRACK_MAX_QUEUE limits the queue.",
        ),
    ] = 0.25
    rack_slots: Annotated[int, Field(gt=0, description="Most lenses on the device.")] = 1024
    rack_bytes: Annotated[int, Field(gt=0, description="Device memory of the rack.")] = 256 * MIB
    cache_bytes: Annotated[int, Field(ge=0, description="Host memory for decoded bundles.")] = 256 * MIB

    # --- training ---------------------------------------------------------------------------------------------------
    workers: Annotated[int, Field(ge=0, le=64, description="Worker processes that `serve` starts and restarts.")] = 1
    worker_threads: Annotated[int, Field(ge=0, description="Threads of a worker; 0: half of the cores.")] = 0
    worker_jobs: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Jobs that a worker fits at once, in shared batches; more pays on a GPU.",
        ),
    ] = 1
    worker_nice: Annotated[
        int, Field(ge=0, le=19, description="Niceness of workers, so that the server has priority.")
    ] = 10
    lease_s: Annotated[
        float, Field(gt=0, description="Time without a heartbeat after which a worker loses its job.")
    ] = 30.0
    max_attempts: Annotated[int, Field(gt=0, description="Attempts at a job before it fails.")] = 3
    jobs_keep_s: Annotated[
        float, Field(ge=0, description="Time for which finished jobs and their events are kept; 0: forever.")
    ] = 30 * 86_400.0
    worker_gpu_memory: Annotated[
        float, Field(gt=0, le=1, description="Share of a CUDA device's memory that a worker may use.")
    ] = 0.5
    pixel_cache_bytes: Annotated[
        int, Field(ge=0, description="Disk cache of decoded training pictures, shared by all workers; 0: none.")
    ] = 4 * 1024 * MIB
    pixel_memory_bytes: Annotated[
        int, Field(ge=0, description="Memory cache of decoded training pictures in each worker.")
    ] = 128 * MIB
    feature_cache_bytes: Annotated[
        int, Field(ge=0, description="Disk cache of the datasets' frozen features, shared by all workers; 0: none.")
    ] = 2 * 1024 * MIB

    # --- datasets ---------------------------------------------------------------------------------------------------
    max_dataset_images: Annotated[int, Field(gt=0, description="Most images in one dataset.")] = 1_000_000
    max_unpacked_bytes: Annotated[int, Field(gt=0, description="Most bytes that an upload may unpack to.")] = (
        40 * 1024 * MIB
    )
    upload_expiry_s: Annotated[
        float, Field(gt=0, description="Time after its last byte for which an unfinished resumable upload is kept.")
    ] = 86_400.0
    upload_silence_s: Annotated[
        float, Field(gt=0, description="Longest pause in the upload of a dataset before it is aborted.")
    ] = 30.0
    max_feedback_images: Annotated[int, Field(gt=0, description="Most images of feedback for one task.")] = 100_000

    # --- logs -------------------------------------------------------------------------------------------------------
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda level: level.lower() if isinstance(level, str) else level),
        Field(description="`debug`, `info`, `warning` or `error`."),
    ] = "info"
    log_requests: Annotated[
        bool, Field(description="Log a line for every request. Otherwise only those that fail with 5xx, as warnings.")
    ] = False
    log_format: Annotated[Literal["text", "json"], Field(description="`text`, or `json`: an object a line.")] = "text"

    # --- metrics and traces -----------------------------------------------------------------------------------------
    metrics_tasks: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Tasks with a label of their own in metrics, the busiest; the rest share `other`.",
        ),
    ] = 50
    watch_s: Annotated[
        float, Field(gt=0, description="Interval at which the server probes its stores, for the metrics.")
    ] = 5.0
    worker_metrics_port: Annotated[
        int,
        Field(
            ge=0, le=65535, description="Port of a worker's /metrics; `serve` gives each worker the next port. 0: none."
        ),
    ] = 0
    worker_metrics_host: Annotated[str, Field(description="Address of a worker's /metrics.")] = "127.0.0.1"
    otlp_endpoint: Annotated[
        str, Field(description="Endpoint for traces, OTLP over HTTP, such as http://collector:4318. Empty: none.")
    ] = ""
    trace_ratio: Annotated[float, Field(ge=0, le=1, description="Share of the traces begun here that is kept.")] = 1.0

    def metrics_port_of(self, worker: int) -> int:
        """The port of the metrics of a worker of a number, from 0; 0 for none."""
        return self.worker_metrics_port + worker if self.worker_metrics_port else 0

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
        """A Redis URL with the password of LENSRACK_REDIS_PASSWORD_FILE. Raises ValueError if the file has none."""
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
        """Whether timm downloads the backbone's weights."""
        return self.backbone_weights is None and self.backbone not in ("bundled", "untrained")

    @property
    def engine_devices(self) -> tuple[str, ...]:
        """The device of each engine. Raises ValueError."""
        devices = tuple(d.strip() for d in self.devices.split(",")) if self.devices.strip() else (self.device,)
        kinds = {d.partition(":")[0] for d in devices}
        if "" in kinds or len(kinds) > 1 or (len(devices) > 1 and kinds == {"auto"}):
            expected = "devices of one kind, separated by commas, such as cuda:0,cuda:1"
            raise ValueError(f"LENSRACK_DEVICES: expected {expected}, got {self.devices}")
        return devices

    @property
    def worker_device(self) -> str:
        """The workers' device: LENSRACK_DEVICE, or the first engine's if that is `auto`. Raises ValueError."""
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
