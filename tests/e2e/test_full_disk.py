"""A disk that fills up under whoever writes: each says so, shows nothing by halves, and goes on when there is room."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from server.cli.keys import cli
from server.keys.sqlite_store import SqliteKeyStore
from tests.datasets.test_dataset_store import noise, write_zip
from tests.e2e.test_kills import WAIT_S, Site, site
from tests.e2e.test_store_faults import ZIP, fill, picture, refused, remount, serving, small_disk

__all__ = ["small_disk"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PIECE = {"content-type": "application/offset+octet-stream"}


def moved_to(disk: Path, home: Path, *names: str) -> None:
    """These folders of a home lie on the small disk, the rest (its log) does not."""
    home.mkdir(exist_ok=True)
    for name in names:
        (disk / name).mkdir(parents=True)
        (home / name).symlink_to(disk / name)


# --- the server -------------------------------------------------------------------------------------------------------


def patch(http: httpx.Client, upload: str, data: bytes, offset: int) -> httpx.Response:
    return http.patch(f"/uploads/{upload}", content=data[offset:], headers={**PIECE, "Upload-Offset": str(offset)})


def offset(http: httpx.Client, upload: str) -> int:
    return int(http.head(f"/uploads/{upload}").headers["Upload-Offset"])


def seen(http: httpx.Client) -> list[str]:
    """All that there is, as anybody sees it."""
    paths = ("/tasks", "/tasks/kept/versions", "/tasks/kept/aliases/live/history", "/datasets", "/train",
             "/tasks/kept/feedback")  # fmt: skip
    return [http.get(path).text for path in paths]


def test_every_writer_of_a_server(small_disk: Path, tmp_path: Path) -> None:
    home, archive = tmp_path / "home", write_zip(tmp_path / "pictures.zip", noise(40)).read_bytes()
    moved_to(small_disk, home, "datasets", "store")
    with serving(home, jobs=f"sqlite://{small_disk / 'jobs.sqlite'}") as client:
        http, png = client.http, {"content-type": "image/png"}
        earlier, kept = client.bundle("kept", 1), client.bundle("kept", 2)
        assert client.put(earlier).status_code == client.put(kept).status_code == 201
        few = write_zip(tmp_path / "few.zip", noise(4)).read_bytes()
        dataset = http.post("/datasets", content=few, headers=ZIP).json()["id"]
        job = {"task": "kept", "dataset": dataset, "method": "linear"}
        assert http.post("/train", json=job).status_code == 202
        upload = http.post("/uploads", headers={"Upload-Length": str(len(archive))}).json()["id"]
        assert patch(http, upload, archive[:1000], 0).status_code == 204
        before = seen(http)

        fill(small_disk / "filler")
        writers: dict[str, Callable[[], httpx.Response]] = {
            "a bundle": lambda: client.put(client.bundle("large", 3, classes=2000)),
            "an alias": lambda: client.move("kept", earlier),
            "a rollback": lambda: http.post("/tasks/kept/rollback", json={}),
            "a data set": lambda: http.post("/datasets", content=archive, headers=ZIP),
            "a new upload": lambda: http.post("/uploads", headers={"Upload-Length": "5000000"}),
            "an upload's next piece": lambda: patch(http, upload, archive, offset(http, upload)),
            "feedback": lambda: http.post("/tasks/kept/feedback?label=label+0", content=picture(), headers=png),
            "a job": lambda: http.post("/train", json=job),
        }
        told = {what: write() for what, write in writers.items()}
        for what, answer in told.items():
            assert refused(answer, "disk_full"), what
            assert answer.status_code == 507, what
        assert seen(http) == before, "nothing is there by halves"
        assert client.answers("kept", kept)
        assert http.get("/readyz").status_code == 200

        (small_disk / "filler").unlink()
        at = offset(http, upload)
        assert at >= 1000, "what was acknowledged is kept"
        assert patch(http, upload, archive, at).status_code == 204
        assert http.post(f"/datasets?upload={upload}").status_code == 201
        for what, write in writers.items():
            if "upload" not in what:
                assert write().status_code in (200, 201, 202), what
        assert client.ask("large").status_code == 200

        leftover = http.post("/uploads", headers={"Upload-Length": "1"}).json()["id"]
        given = http.get("/tasks/kept/feedback").json()["items"][0]["sha256"]
        paths = (f"/tasks/kept/feedback/{given}", f"/uploads/{leftover}", f"/datasets/{dataset}", "/tasks/kept")
        for number, path in enumerate(paths):  # each on a disk that is full again
            fill(small_disk / f"filler-{number}")
            assert http.delete(path).status_code == 204, path
        assert client.ask("kept").status_code == 404
    assert "Traceback" not in (home / "server.log").read_text()


def test_a_server_starts_on_a_store_that_is_read_only(small_disk: Path, tmp_path: Path) -> None:
    """As one that only answers: what is there is served, and whoever writes is told."""
    store = {"store": f"file://{small_disk / 'store'}", "sample_tasks": "true"}
    with serving(tmp_path / "home", **store) as client:
        kept = client.bundle("kept", 1)
        assert client.put(kept).status_code == 201
    remount(small_disk, "ro")
    with serving(tmp_path / "home", **store) as client:
        assert client.answers("kept", kept)
        late = client.bundle("kept", 2)
        deletion = client.http.delete("/tasks/kept")
        for answer in (client.put(late), client.move("kept", kept), deletion):
            assert refused(answer, "store_unavailable")
        assert client.answers("kept", kept)
        remount(small_disk, "rw")
        assert client.put(late).status_code == 201
        assert client.answers("kept", late)


def test_keys(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSRACK_KEYS", f"sqlite://{small_disk / 'keys.sqlite'}")

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, list(arguments))
        return done.exit_code, done.stderr

    assert run("create", "--scope", "admin", "--id", "ops")[0] == 0
    store = SqliteKeyStore(small_disk / "keys.sqlite")
    before = store.list()
    fill(small_disk / "filler")
    for command in (("create", "--scope", "admin"), ("rotate", "ops"), ("revoke", "ops")):
        status, said = run(*command)
        assert (status, said) == (1, "nothing was changed: the disk with the key store is full\n"), command
        assert store.list() == before
    (small_disk / "filler").unlink()
    assert run("revoke", "ops")[0] == 0
    assert store.list()[0].revoked_at is not None


# --- a worker ---------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], place: Site) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, place.log
        time.sleep(0.02)


def test_checkpoints_caches_and_the_store_of_a_worker(
    small_disk: Path, tmp_path: Path, archive: Path, context: ForkServerContext
) -> None:
    """Checkpoints and caches are done without; for the store the worker waits, with its version in hand."""
    moved_to(small_disk, tmp_path / "home", "checkpoints", "cache", "store")
    with site(tmp_path / "home", archive, context) as place:
        fill(small_disk / "filler")
        with place.working() as worker:
            until(lambda: "storing its version is tried again" in place.log, place)
            assert place.store.tasks() == []
            assert place.jobs.get(place.job.id).state == "running"
            assert "a checkpoint could not be written: No space left on device" in place.log
            (small_disk / "filler").unlink()
            job = place.finished(worker)
        assert (job.state, job.attempt, job.failures) == ("succeeded", 1, 0), place.log
        assert [info.version for info in place.store.versions("fruit")] == [job.version]
        assert place.leftovers == []
        assert "Traceback" not in place.log


@pytest.mark.long
def test_the_jobs_of_a_worker(small_disk: Path, tmp_path: Path, archive: Path, context: ForkServerContext) -> None:
    """Nobody can say how far it is; when there is room the job goes on, in this attempt or another, and ends once."""
    url = f"sqlite://{small_disk / 'jobs.sqlite'}"
    with site(tmp_path / "home", archive, context, jobs=url) as place:
        worker = place.start("slow")
        until(lambda: place.epochs() >= 2, place)
        fill(small_disk / "filler")
        until(lambda: "the disk with the job store is full" in place.log, place)
        assert worker.is_alive()
        assert place.jobs.get(place.job.id).state in ("running", "queued")
        (small_disk / "filler").unlink()
        job = place.finished(worker)
        worker.terminate()
        worker.join(WAIT_S)
        assert worker.exitcode == 0
        assert job.state == "succeeded", place.log
        assert [info.version for info in place.store.versions("fruit")] == [job.version]
        assert place.leftovers == []
