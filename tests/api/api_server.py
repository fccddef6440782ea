"""The real application behind a real socket: uvicorn in a thread, real stores, the plain engine of `serving`."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lensrack import wire
from prompts_store import Bundle, open_store
from server.api.app import Services, create_app
from server.api.middleware.connections import limited
from server.api.tenancy import services_by_key
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import FeedbackStore
from server.datasets.upload_store import UploadStore
from server.errors import Conflict, Unprocessable
from server.importing.format import BackboneShape
from server.importing.importer import Importer, RunningBackbone
from server.jobs.sqlite_store import SqliteJobStore
from server.keys.authenticator import Authenticator
from server.keys.keys_file import KeysFile
from server.keys.url import open_keys
from server.settings import Settings
from tests.serving.floor import FINGERPRINT, MANIFEST, Floor

BACKBONE = RunningBackbone(
    "stand-in", FINGERPRINT, BackboneShape(dim=4, depth=1, names={}), MANIFEST.preprocess, lambda arrays: FINGERPRINT
)
METHODS = {"linear": "a head alone", "vpt_deep": "prompts in every layer"}


def check_bundle(bundle: Bundle) -> None:
    if bundle.manifest.backbone.fingerprint != FINGERPRINT:
        theirs = bundle.manifest.backbone.fingerprint
        raise Conflict(f"the bundle is for backbone {theirs}, this server runs {FINGERPRINT}", code="wrong_backbone")


def export(bundle: Bundle, form: str, takes: str, path: Path) -> None:
    if takes == "float" and form == "timm":
        raise Unprocessable("the stand-in does not write this", code="not_exportable")
    path.write_text(f"{bundle.version} {form} {takes}")


async def occupied(floor: Floor) -> wire.Rack:
    seats = [
        wire.RackSeat(slot=seat.slot, task=seat.task, version=seat.version, bytes=1024, in_use=0, pinned=False)
        for seat in floor.shelf.seats.values()
    ]
    loads = len(floor.shelf.loads)
    return wire.Rack(
        slots=8, used_slots=len(seats), bytes=8192, used_bytes=1024 * len(seats), seats=seats, hits=0, loads=loads,
        evictions=0,
    )  # fmt: skip


@dataclass
class Api:
    """The running server, what it stands on, and a client of it."""

    url: str
    port: int
    floor: Floor
    services: Services
    http: httpx.Client
    ready: dict[str, Any] = field(default_factory=lambda: {"ready": True})
    grpc_port: int = 0

    def raw(self, *, head: str, body: bytes = b"") -> tuple[int, bytes]:
        """Speak HTTP by hand; the status and everything that came until the server closed or fell silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            got = read_response(sock)
        return int(got.split(b" ", 2)[1]), got


def read_response(sock: socket.socket) -> bytes:
    """One response with a content length."""
    got = b""
    while chunk := sock.recv(65536):
        got += chunk
        head, _, body = got.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if length and len(body) >= int(length[0].split(b":")[1]):
            break
    return got


@contextmanager
def serving(
    home: Path,
    *,
    max_batch: int = 8,
    configure: Callable[[Floor], None] = lambda floor: None,
    grpc: bool = False,
    **settings: Any,
) -> Iterator[Api]:
    """`grpc`: with that front on the same event loop, as a real server has it."""
    options = Settings(home=home, **{"max_queue": 64, "max_images": 16, **settings})
    floor = Floor(open_store("memory://"), max_batch=max_batch, max_queue=options.max_queue)
    configure(floor)
    jobs = SqliteJobStore(home / "jobs.sqlite")
    ready: dict[str, Any] = {"ready": True}
    services = Services(
        settings=options,
        predictor=floor.predictor,
        batcher=floor.batcher,
        residency=floor.shelf,
        store=floor.store,
        jobs=jobs,
        datasets=DatasetStore(
            options.datasets_dir, max_images=100, max_unpacked_bytes=10_000_000, max_image_pixels=1_000_000
        ),
        uploads=UploadStore(
            options.datasets_dir / "resumable", max_bytes=options.max_dataset_bytes, expiry_s=options.upload_expiry_s
        ),
        feedback=FeedbackStore(
            options.datasets_dir / "feedback", max_images=options.max_feedback_images, max_image_pixels=1_000_000
        ),
        ready=lambda: wire.Ready(**ready),
        rack=lambda: occupied(floor),
        look=floor.engine.look,
        methods=METHODS,
        baselines={"full": ("every weight", "changes every weight of the backbone")},
        check_bundle=check_bundle,
        importer=Importer(BACKBONE, check_bundle),
        export=export,
    )
    authenticator = Authenticator(
        open_keys(options.keys_url), KeysFile(options.keys_file) if options.keys_file else None
    )
    authenticator.load()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only on sockets that name TCP
    port = listener.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(services, authenticator),
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=2,
            http=limited(options.max_connections, options.body_timeout_s),
        )
    )

    grpc_port: Future[int] = Future()

    async def run() -> None:
        async with _front(services, authenticator) if grpc else nullcontext(0) as its_port:
            grpc_port.set_result(its_port)
            await server.serve(sockets=[listener])
        await floor.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="uvicorn")
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=20) as client:
            yield Api(url, port, floor, services, client, ready, grpc_port.result(20))
    finally:
        floor.engine.gate.set()
        server.should_exit = True
        thread.join(20)
        listener.close()
        jobs.close()
        floor.store.close()
    assert not thread.is_alive(), "the server did not stop"


@asynccontextmanager
async def _front(services: Services, authenticator: Authenticator) -> AsyncIterator[int]:
    from server.api.oip.grpc.server import GrpcServer

    front = GrpcServer(services_by_key(services), authenticator, services.settings, 0)
    yield await front.start()
    await front.stop(5)


def assert_refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The same in the words of whoever is asked: a dialect's error body has the code in a header."""
    dialect = response.url.path.split("/")[1]
    if dialect not in ("v1", "v2"):
        return assert_problem(response, status, code)
    assert response.status_code == status, response.text
    assert response.headers["lensrack-code"] == code
    assert response.headers["content-type"] == "application/json"
    told: dict[str, Any] = response.json()
    assert told.keys() == {"error"}
    if dialect == "v1":
        assert told["error"].keys() == {"message", "type", "param", "code"}
        assert told["error"]["code"] == code
    else:
        assert isinstance(told["error"], str)
        assert told["error"]
    assert not any(secret in response.text for secret in ("Traceback", "/work", "/tmp"))
    return told


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The response is an RFC 9457 problem with this status and code, and gives nothing away."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["code"] == code, problem
    assert problem["request_id"] == response.headers["x-request-id"]
    assert {"type", "title", "detail"} <= problem.keys()
    assert "Traceback" not in response.text
    assert "/work" not in response.text
    assert "/tmp" not in response.text
    return problem
