"""SIGKILL to a real server in the middle of what it does for a client. The next one finds nothing by halves, answers
what was answered, and the client's same request then leads to where it would have led, once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompts_store import Bundle
from tests.datasets.test_dataset_store import noise, write_zip
from tests.e2e.forked_server import KILLS, forked
from tests.e2e.test_store_faults import LONG_S, ZIP, Client, picture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
EACH_TIME = {"unpacking", "a version without its alias", "an alias that is about to move", "an eviction"}
OFFSET = {"content-type": "application/offset+octet-stream"}


@dataclass
class House:
    """What was there before, and what the client wants to happen."""

    client: Client
    archive: bytes
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def http(self) -> httpx.Client:
        return self.client.http

    def furnish(self) -> None:
        kept = self.bundle("kept", 1)
        assert self.client.put(kept).status_code == 201
        for number in range(3):
            assert self.client.put(self.bundle(f"crowd-{number}", number)).status_code == 201
        assert self.client.answers("kept", kept)
        self.known["upload"] = self.http.post("/uploads", headers={"Upload-Length": str(len(self.archive))}).json()[
            "id"
        ]
        self.known["dataset"] = self.dataset("few", 4)

    def dataset(self, name: str, count: int) -> str:
        few = write_zip(Path(self.known["folder"]) / f"{name}.zip", noise(count)).read_bytes()
        return str(self.http.post("/datasets", content=few, headers=ZIP).json()["id"])

    def bundle(self, task: str, seed: int) -> Bundle:
        return self.client.bundle(task, seed)

    # --- what is asked for, and asked for again -----------------------------------------------------------------------

    def upload(self) -> httpx.Response:
        """As the SDK does it: from where the upload stands to the end, and then a data set of it."""
        path = f"/uploads/{self.known['upload']}"
        at = self.http.head(path).headers["Upload-Offset"]
        self.http.patch(path, content=self.archive[int(at) :], headers={**OFFSET, "Upload-Offset": at})
        return self.http.post("/datasets", params={"upload": self.known["upload"]})

    def store(self) -> httpx.Response:
        return self.http.post("/datasets", content=self.archive, headers=ZIP)

    def publish(self) -> httpx.Response:
        return self.client.put(self.bundle("kept", 2))

    def delete(self) -> httpx.Response:
        answer = self.http.delete("/tasks/crowd-0")
        return httpx.Response(204) if answer.status_code == 404 else answer

    def train(self) -> httpx.Response:
        asked = {"task": "new", "dataset": self.known["dataset"], "method": "linear"}
        return self.http.post("/train", json=asked, headers={"Idempotency-Key": "once"})

    def say(self) -> httpx.Response:
        png = {"content-type": "image/png"}
        return self.http.post("/tasks/kept/feedback?label=label+0", content=picture(), headers=png)

    def ask_all(self) -> httpx.Response:
        """More tasks than the rack holds."""
        answers = [self.client.ask(f"crowd-{number}") for number in range(3)]
        return max(answers, key=lambda answer: answer.status_code)

    # --- how it stands ------------------------------------------------------------------------------------------------

    def standing(self) -> dict[str, Any]:
        get = lambda path: self.http.get(path).raise_for_status().json()  # noqa: E731
        return {
            "versions": len(get("/tasks/kept/versions")["versions"]),
            "live": self.client.ask("kept").json()["version"],
            "tasks": [one["task"] for one in get("/tasks")["tasks"]],
            "datasets": sorted(one["images"] for one in get("/datasets")["datasets"]),
            "jobs": len(get("/train")["jobs"]),
            "feedback": len(get("/tasks/kept/feedback")["items"]),
        }


DEEDS: dict[str, Callable[[House], httpx.Response]] = {
    "a piece of an upload": House.upload, "unpacking": House.store, "a data set without its answer": House.store,
    "an upload that has become a data set": House.upload, "a version without its alias": House.publish,
    "an alias that is about to move": House.publish, "an alias that has moved": House.publish,
    "a task that is being deleted": House.delete, "a job without its answer": House.train,
    "a picture without its word": House.say, "a lens half written": House.ask_all, "an eviction": House.ask_all,
}  # fmt: skip
CHANGES: dict[Callable[[House], httpx.Response], str] = {
    House.upload: "datasets", House.store: "datasets", House.publish: "versions live", House.delete: "tasks",
    House.train: "jobs", House.say: "feedback", House.ask_all: "",
}  # fmt: skip


@contextmanager
def house(home: Path, fault: str, known: dict[str, Any]):  # type: ignore[no-untyped-def]
    """In one process, which ends as a whole."""
    with (
        forked(
            home, fault=fault, fronts="0", rack_slots="2", watch_s="0.2"
        ) as server,  # one process, which ends as a whole
        httpx.Client(base_url=server.url, timeout=LONG_S) as http,
    ):
        fingerprint = http.get("/readyz").json()["backbone"]["fingerprint"]
        archive = write_zip(home.parent / "pictures.zip", noise(12)) if not known else home.parent / "pictures.zip"
        known.setdefault("folder", home.parent)
        yield server, House(Client(http, fingerprint), archive.read_bytes(), known)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in EACH_TIME else pytest.mark.long) for point in KILLS]
)
def test_a_server_killed_at(point: str, tmp_path: Path) -> None:
    home, deed, known = tmp_path / "home", DEEDS[point], {}
    with house(home, point, known) as (server, place):
        place.furnish()
        before = place.standing()
        (home / "armed").touch()
        with pytest.raises(httpx.TransportError):
            deed(place)
        assert server.process.wait(LONG_S) == -signal.SIGKILL
    with house(home, "", known) as (server, place):
        found = place.standing()
        changed = CHANGES[deed].split()
        for what, now in found.items():
            assert what in changed or now == before[what], f"{what} is not what it was"
        assert leftovers(home) == []
        assert deed(place).status_code in (200, 201, 202, 204), "it can be asked for again"
        once = place.standing()
        assert deed(place).status_code in (200, 201, 202, 204)
        assert place.standing() == once, "and is there once"
        if "live" in changed:
            assert (once["versions"], once["live"]) == (2, place.bundle("kept", 2).version)
        if changed in (["datasets"], ["jobs"], ["feedback"]):
            (what,) = changed
            assert len(once[what] if isinstance(once[what], list) else range(once[what])) == 1 + (what == "datasets")
        assert "Traceback" not in (home / "server.log").read_text()


def leftovers(home: Path) -> list[str]:
    """Whatever is half written: an upload under way is none, and neither is a lock."""
    found = [path for path in home.rglob("*") if path.name.startswith(".new-") or path.suffix in (".tmp", ".new")]
    return [path.name for path in [*found, *(home / "datasets" / "staging").glob("*")]]
