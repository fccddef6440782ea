"""A key with a prefix, on a real server that is full of somebody else's things: it finds none of them.

Every route of the schema is asked for a thing of the other's and for one that does not exist. Both answers must be the
same, byte for byte but for the name that was asked for, and afterwards the other's things are as they were.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import io
import json
import os
import secrets
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompts_store.memory_store import MemoryStore
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import FeedbackStore
from server.datasets.formats.manifests import Manifests
from server.datasets.upload_store import UploadStore
from server.jobs.job import new_id
from server.jobs.sqlite_store import SqliteJobStore
from server.keys.authenticator import Authenticator
from tests.api.api_server import Api, assert_problem, serving
from tests.serving.floor import Shelf, bundle, png, publish

TOKENS = {name: f"token-of-{name}-{'x' * 20}" for name in ("all", "mine", "theirs", "part")}
PNG = {"content-type": "image/png"}


@dataclass(frozen=True)
class Names:
    """What a path or a query may name."""

    task: str
    version: str
    dataset: str
    job: str
    upload: str
    sha256: str

    def fill(self, template: str) -> str:
        known = {"alias": "live", "number": "0", "path:path": "x", "dataset_id": self.dataset, "job_id": self.job}
        known |= {"upload_id": self.upload, **vars(self)}
        for name, value in known.items():
            template = template.replace(f"{{{name}}}", value)
        return template

    def blank(self, text: str) -> str:
        for name, value in vars(self).items():
            text = text.replace(value, f"<{name}>").replace(value[:12], f"<{name}>")
            text = text.replace(value[:8], f"<{name}>") if name == "dataset" else text
        return text


@dataclass(frozen=True)
class House:
    api: Api
    theirs: Names
    mine: Names

    def client(self, name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKENS[name]}", "X-Request-Id": "same"}
        return httpx.Client(base_url=self.api.url, timeout=20, headers=headers)


def archive(*greys: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for place, grey in enumerate(greys):
            packed.writestr(f"{'ab'[place % 2]}/{place}.png", png(grey))
    return file.getvalue()


def furnish(api: Api, token: str, prefix: str, grey: int) -> Names:
    """One of everything."""
    task = f"{prefix}fish"
    version = publish(api.floor.store, task, seed=grey)
    with httpx.Client(base_url=api.url, timeout=20, headers={"Authorization": f"Bearer {token}"}) as client:
        zipped = {
            "content": archive(grey, grey + 1, grey + 2, grey + 3),
            "headers": {"content-type": "application/zip"},
        }
        dataset = client.post("/datasets", params={"name": f"of {prefix}"}, **zipped).json()["id"]
        job = client.post("/train", json={"task": task, "dataset": dataset, "method": "linear"}).json()["id"]
        upload = client.post("/uploads", headers={"Upload-Length": "5"}).json()["id"]
        said = client.post(f"/tasks/{task}/feedback?label=a", content=png(grey), headers=PNG).json()
        assert client.post(f"/predict/{task}", content=png(grey), headers=PNG).status_code == 200
    return Names(task, version, dataset, job, upload, said["items"][0]["sha256"])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("home")
    prefixes = {"all": "", "mine": "acme-", "theirs": "zeta-", "part": "zeta-eu-"}
    rows = [{"id": one, "scopes": ["admin"], "token": TOKENS[one], "tasks": at} for one, at in prefixes.items()]
    (home / "keys").write_text("\n".join(map(json.dumps, rows)))
    with serving(home, keys_file=home / "keys") as api:
        yield House(api, furnish(api, TOKENS["theirs"], "zeta-", 100), furnish(api, TOKENS["mine"], "acme-", 50))


def nothing() -> Names:
    version, dataset, sha256 = (secrets.token_hex(32) for _ in range(3))
    return Names("zeta-none", version, dataset, new_id(1.0), secrets.token_hex(16), sha256)


def operations(house: House) -> list[tuple[str, str]]:
    with house.client("all") as client:
        paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), template) for template, found in paths.items() for method in found]


def asked(client: httpx.Client, method: str, template: str, names: Names) -> httpx.Response:
    """The request that would do something if the thing were there and the key's."""
    body: dict[str, Any] = {}
    if template.startswith("/predict") or template == "/embed" or template.endswith(("/attention", "/feedback")):
        body = {"content": png(), "headers": PNG} if method == "POST" else {}
    elif method == "PUT" and template.endswith("/aliases/{alias}"):
        body = {"json": {"version": names.version}}
    elif method == "PUT" and template.endswith("/versions"):
        body = {"content": bundle(names.task, 7).data, "headers": {"content-type": "application/octet-stream"}}
    elif template.endswith("/infer"):
        content = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
        body = {"json": {"inputs": [content]}}
    elif method == "PATCH":
        kind = {"content-type": "application/offset+octet-stream", "Upload-Offset": "0"}
        body = {"content": b"xx", "headers": kind}
    params = {"label": "a"} if template.endswith("/feedback") and method == "POST" else None
    return client.request(method, names.fill(template), params=params, **body)


def same(theirs: httpx.Response, none: httpx.Response, names: Names, others: Names) -> None:
    assert theirs.status_code == none.status_code, (theirs.text, none.text)
    assert names.blank(theirs.text) == others.blank(none.text)
    kept = ("date", "content-length", "upload-expires")
    told = [{key: value for key, value in one.headers.items() if key not in kept} for one in (theirs, none)]
    assert told[0] == told[1]


def state(house: House) -> dict[str, Any]:
    """Everything of theirs, as they see it."""
    names = house.theirs
    with house.client("theirs") as client:
        paths = ("/tasks", f"/tasks/{names.task}", f"/tasks/{names.task}/versions", f"/tasks/{names.task}/feedback")
        more = ("/datasets", f"/train/{names.job}", "/train", f"/tasks/{names.task}/aliases/live/history", "/rack")
        seen = {path: client.get(path).json() for path in paths + more}
        seen["upload"] = client.head(f"/uploads/{names.upload}").headers["upload-offset"]
    return seen


def test_no_route_tells_what_is_theirs_from_what_does_not_exist(house: House) -> None:
    before, seen = state(house), 0
    with house.client("mine") as client:
        for method, template in operations(house):
            if "{" not in template:
                continue
            none = nothing()
            theirs = asked(client, method, template, house.theirs)
            same(theirs, asked(client, method, template, none), house.theirs, none)
            made = (method, template) == ("PUT", "/tasks/{task}/versions")
            assert theirs.status_code == (403 if made else 404), (method, template, theirs.text)
            seen += 1
    assert seen > 30
    assert state(house) == before


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is asked of every store, within them too, and which folders and files are looked at."""
    done: Counter[str] = Counter()
    monkeypatch.setattr(Authenticator, "refresh", keys_stay)  # it looks at the keys once a second, whoever asks then
    for store in (MemoryStore, SqliteJobStore, DatasetStore, Manifests, UploadStore, FeedbackStore, Shelf):
        for name, method in list(vars(store).items()):
            if inspect.isfunction(method) and not name.startswith("__"):
                monkeypatch.setattr(store, name, counting(method, f"{store.__name__}.{name}", done))
    for owner, name in ((os, "stat"), (os, "scandir"), (os, "open"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), f"{owner.__name__}.{name}", done))
    return done


async def keys_stay(authenticator: Authenticator, max_age_s: float = 0) -> None:
    """Instead of `Authenticator.refresh`."""


def counting(method: Callable[..., Any], name: str, done: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(*arguments: Any, **options: Any) -> Any:
        done[name] += 1
        return method(*arguments, **options)

    return counted


def test_theirs_costs_the_same_work_as_what_does_not_exist(house: House, work: Counter[str]) -> None:
    """How long an answer takes tells nothing either, for the same is done: the same questions to the same stores."""
    counted = 0
    with house.client("mine") as client:
        for method, template in operations(house):
            if "{" not in template:
                continue
            done = []
            for names in (nothing(), house.theirs, nothing()):  # the first one pays for what is imported late
                work.clear()
                asked(client, method, template, names)
                done.append(dict(work))
            assert done[1] == done[2], (method, template)
            counted += sum(done[1].values())
    assert counted > 50, "nothing was counted"


@pytest.mark.parametrize("suffix", ["@live", "@VERSION", "@PREFIX"])
@pytest.mark.parametrize(
    "line", ["/predict/{}", "/tasks/{}/load", "/tasks/{}/unload", "/tasks/{}/pin", "/tasks/{}/attention"]
)
def test_nor_by_any_way_to_name_a_version(house: House, line: str, suffix: str) -> None:
    """Their version sits on the device already; whoever knows its digest must not get an answer from there."""
    none = nothing()
    with house.client("mine") as client:

        def ask(names: Names) -> httpx.Response:
            at = suffix.replace("VERSION", names.version).replace("PREFIX", names.version[:12])
            content = {"content": png(), "headers": PNG} if "predict" in line or "attention" in line else {}
            return client.post(line.format(names.task + at), **content)

        theirs = ask(house.theirs)
        same(theirs, ask(none), house.theirs, none)
        assert theirs.status_code == 404


def test_nor_where_a_query_or_a_body_names_it(house: House) -> None:
    zipped = {"content": archive(1, 2, 3, 4), "headers": {"content-type": "application/zip"}}
    with house.client("mine") as client:
        for ask in (
            lambda names: client.post("/predict", params={"task": names.task}, content=png(), headers=PNG),
            lambda names: client.post("/datasets", params={"parent": names.dataset}, **zipped),
            lambda names: client.post("/datasets", params={"upload": names.upload}),
            lambda names: client.post(f"/tasks/{house.mine.task}/feedback/dataset", params={"parent": names.dataset}),
            lambda names: client.post("/train", json={"task": house.mine.task, "dataset": names.dataset}),
            lambda names: client.post("/train", json={"task": house.mine.task, "dataset": names.dataset[:8]}),
            lambda names: client.get(
                f"/train/{names.job}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "0"}
            ),
        ):
            none = nothing()
            theirs = ask(house.theirs)
            same(theirs, ask(none), house.theirs, none)
            assert theirs.status_code == 404, theirs.text
        for path in ("/train?task={}", "/train?task={}&state=queued"):
            assert client.get(path.format(house.theirs.task)).json() == {"jobs": [], "next": None}
        both = client.post(
            "/predict", params={"task": [house.mine.task, house.theirs.task]}, content=png(), headers=PNG
        )
        results = both.json()["results"]
        assert results[house.mine.task]["version"] == house.mine.version
        assert results[house.theirs.task]["error"]["code"] == "task_not_found"


def test_names_beyond_the_prefix_are_refused_alike(house: House) -> None:
    with house.client("mine") as client:
        for task in (house.theirs.task, "zeta-none", "acme", "fish"):
            ask = {"task": task, "dataset": house.mine.dataset, "method": "linear"}
            problem = assert_problem(client.post("/train", json=ask), 403, "forbidden")
            assert problem["detail"] == f"the names of this key's tasks begin with 'acme-', got '{task}'"


def test_lists_hold_what_is_the_keys_alone(house: House) -> None:
    def lists(name: str) -> tuple[list[str], ...]:
        with house.client(name) as client:
            tasks = [one["task"] for one in client.get("/tasks").json()["tasks"]]
            datasets = [one["id"] for one in client.get("/datasets").json()["datasets"]]
            jobs = [one["id"] for one in client.get("/train").json()["jobs"]]
            seats = [one["task"] for one in client.get("/rack").json()["seats"]]
        return tasks, datasets, jobs, sorted(seats)

    mine, theirs = house.mine, house.theirs
    assert lists("mine") == ([mine.task], [mine.dataset], [mine.job], [mine.task])
    assert lists("part") == ([], [], [], [])
    tasks, datasets, jobs, seats = lists("all")
    assert {mine.task, theirs.task} <= set(tasks)
    assert {mine.dataset, theirs.dataset} <= set(datasets)
    assert {mine.job, theirs.job} <= set(jobs)
    assert {mine.task, theirs.task} <= set(seats)


def test_what_is_counted_over_all_is_told_to_keys_of_all(house: House) -> None:
    with house.client("mine") as mine, house.client("all") as all_:
        own, whole = mine.get("/rack").json(), all_.get("/rack").json()
    assert whole["forwards"] > 0
    for name in ("forwards", "hits", "loads", "evictions", "queued"):
        assert own[name] == 0
    assert own["rows"] == own["batch_rows"] == own["batch_tasks"] == {}
    assert own["used_slots"] == len(own["seats"]) == 1


def test_the_same_pictures_are_two_data_sets(house: House) -> None:
    """Content has one digest, whoever stores it. Neither owner learns from it that the other exists."""
    zipped = {"content": archive(200, 201, 202, 203), "headers": {"content-type": "application/zip"}}
    with house.client("theirs") as theirs, house.client("mine") as mine:
        first = theirs.post("/datasets", params={"name": "first"}, **zipped).json()
        where = f"/datasets/{first['id']}"
        assert mine.get(where).status_code == 404
        second = mine.post("/datasets", params={"name": "second"}, **zipped).json()
        assert second["id"] == first["id"]
        assert (second["name"], second["created_at"] > first["created_at"]) == ("second", True)
        assert theirs.get(where).json() == first
        shown = f"{where}/thumbnails/0"
        assert mine.get(shown).status_code == theirs.get(shown).status_code == 200
        assert mine.delete(where).status_code == 204
        assert mine.get(where).status_code == mine.get(shown).status_code == 404
        assert theirs.get(where).json() == first
        assert theirs.get(shown).status_code == 200
        with house.client("all") as all_:
            assert all_.delete(where).status_code == 204
        assert theirs.get(where).status_code == theirs.get(shown).status_code == 404


def test_an_idempotency_key_is_the_tenants_own(house: House) -> None:
    found = set()
    for name, names in (("mine", house.mine), ("theirs", house.theirs)):
        with house.client(name) as client:
            ask = {"task": names.task, "dataset": names.dataset, "method": "linear"}
            answer = client.post("/train", json=ask, headers={"Idempotency-Key": "the-same"})
            assert answer.status_code == 202, answer.text
            found.add(answer.json()["id"])
    assert len(found) == 2


def test_no_route_takes_services_past_the_key() -> None:
    """What a route is given is narrowed to the key; the state behind it is for `services` and `app` alone."""
    folder = Path(__file__).resolve().parents[2] / "server" / "api"
    for path in folder.rglob("*.py"):
        if path.name not in ("app.py", "services.py"):
            assert "state.services" not in path.read_text(), path.name
