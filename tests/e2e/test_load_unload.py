"""A whole server with its real engine, on a rack with less room than there are tasks, while everything happens at once:
loads, unloads, pins, publications, deletions of versions and of tasks, clients that leave.

Every answer is the literal forward's of the version that it names, or an error that the reference names; and when all
is over, every seat, place and row has been given back.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from prompts_store import Backbone, Bundle, Manifest, Preprocess
from server.app.server import Server, build_server
from server.engine import reference
from server.engine.backbone import load
from server.engine.batch import normalise
from server.engine.images import decode
from server.engine.images.decode import Geometry
from server.methods.registry import Registry
from server.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(200)]

TASKS, VERSIONS, CLIENTS, QUESTIONS = 5, 2, 8, 40  # questions of each client
METHODS = {"vpt_deep": (2, 0, 4, 1, 3, 2), "linear": (0,) * 6, "vpt_shallow": (5, 0, 0, 0, 0, 0)}
NAMED = {  # what may be answered while versions come and go
    (404, "task_not_found"), (404, "alias_not_found"), (404, "version_not_found"), (409, "version_in_use"),
    (409, "no_history"), (429, "queue_full"), (503, "rack_full"), (412, "alias_conflict"),
}  # fmt: skip
PNG = {"content-type": "image/png"}


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(2)]


@dataclass
class Site:
    """The server, everything that may be published on it, and what each version says of each picture."""

    server: Server
    http: httpx.AsyncClient
    bundles: dict[str, list[Bundle]] = field(default_factory=dict)
    truth: dict[tuple[str, int], list[tuple[str, float]]] = field(default_factory=dict)
    told: Counter[tuple[int, str]] = field(default_factory=Counter)

    def furnish(self) -> None:
        backbone, registry = load("untrained", device="cpu"), Registry.installed()  # the server lets its weights go
        for number in range(TASKS):
            method = list(METHODS)[number % len(METHODS)]
            own = [self._bundle(f"task-{number}", method, 10 * number + one, registry) for one in range(VERSIONS)]
            self.bundles[f"task-{number}"] = own
            for bundle in own:
                params = {name: torch.from_numpy(np.array(value)) for name, value in bundle.tensors.items()}
                for place, data in enumerate(PICTURES):
                    self.truth[bundle.version, place] = self._literal(bundle, params, data, backbone)

    def _bundle(self, task: str, method: str, seed: int, registry: Registry) -> Bundle:
        backbone = self.server.engine.engine.backbone
        spec, lengths, classes = backbone.spec, METHODS[method], 3 + seed % 4
        generator = torch.Generator().manual_seed(seed)
        params = registry.get(method).init(spec, lengths, classes, generator)
        own = {name: torch.randn(value.shape, generator=generator).numpy() for name, value in params.items()}
        how = spec.preprocess
        manifest = Manifest(
            task=task, method=method, backbone=Backbone(spec.arch, spec.fingerprint),
            labels=tuple(f"{task} {seed} {number}" for number in range(classes)), prompt_lengths=lengths,
            preprocess=Preprocess(how.size, how.mean, how.std, how.interpolation, how.crop_pct, how.crop_mode),
            metrics={}, recipe={}, dataset=None, parent=None, created_at=float(seed), lensrack_version="0.1.0",
        )  # fmt: skip
        return Bundle.build(manifest, own)

    def _literal(self, bundle: Bundle, params: dict[str, Any], data: bytes, backbone: Any) -> list[tuple[str, float]]:
        """Labels and scores, best first, by the slow forward of this version alone."""
        how = bundle.manifest.preprocess
        geometry = Geometry.of(how.size, how.interpolation, how.crop_pct, how.crop_mode, how.mean)
        stack = torch.from_numpy(decode.pixels(data, geometry, max_pixels=10**6)[None])
        pixels = normalise(stack, torch.tensor([how.mean]), torch.tensor([how.std]), torch.float32)
        with torch.inference_mode():
            logits = reference.logits(
                bundle.manifest.method, backbone, pixels, params, bundle.manifest.prompt_lengths
            )[0].double()  # fmt: skip
        scores = torch.softmax(logits, 0).tolist()
        return sorted(zip(bundle.manifest.labels, scores, strict=True), key=lambda pair: -pair[1])

    # --- who does something -------------------------------------------------------------------------------------------

    def nothing_is_loading(self) -> bool:
        residency = self.server.engine.residency
        known = sum(len(residency.resident_versions(task)) for task in self.bundles)  # those under way among them
        return known == len(residency.occupants())

    async def publish(self, task: str, seed: int) -> None:
        bundle = self.bundles[task][seed % VERSIONS]
        headers = {"content-type": "application/octet-stream"}
        self.hear(await self.http.put(f"/tasks/{task}/versions?alias=live", content=bundle.data, headers=headers))

    async def ask(self, chance: random.Random) -> None:
        """By alias or by version; now and then the client leaves before the answer."""
        task, place = chance.choice(list(self.bundles)), chance.randrange(len(PICTURES))
        name = chance.choice(["", "@live", f"@{chance.choice(self.bundles[task]).version}"])
        asking = asyncio.ensure_future(
            self.http.post(f"/predict/{task}{name}?top_k=9", content=PICTURES[place], headers=PNG)
        )
        if chance.random() < 0.1:
            await asyncio.sleep(chance.random() / 50)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return
        answer = await asking
        if self.hear(answer):
            self.check(answer, place)
            assert len(name) < 20 or answer.json()["version"] == name[1:], "asked for by its own name"

    async def ask_about(self, task: str, place: int) -> str:
        """The version that answered, truly."""
        answer = await self.http.post(f"/predict/{task}?top_k=9", content=PICTURES[place], headers=PNG)
        self.check(answer.raise_for_status(), place)
        return str(answer.json()["version"])

    def check(self, answer: httpx.Response, place: int) -> None:
        told, expected = answer.json(), self.truth[answer.json()["version"], place]
        got = [(one["label"], one["score"]) for one in told["predictions"][0]]
        assert [label for label, _ in got] == [label for label, _ in expected]
        np.testing.assert_allclose([score for _, score in got], [score for _, score in expected], atol=2e-5, rtol=0)

    async def meddle(self, chance: random.Random) -> None:
        task = chance.choice(list(self.bundles))
        version = chance.choice(self.bundles[task]).version
        http, at = self.http, f"{task}@{version}"
        held = f"task-0@{self.bundles['task-0'][0].version}"
        deeds: list[Callable[[], Awaitable[httpx.Response]]] = [
            *[lambda: http.post(f"/tasks/{at}/load")] * 4,
            *[lambda: http.post(f"/tasks/{at}/unload")] * 4,
            lambda: http.post(f"/tasks/{held}/pin", json={"pinned": True}),
            lambda: http.post(f"/tasks/{held}/pin", json={"pinned": False}),
            lambda: http.put(f"/tasks/{task}/aliases/live", json={"version": version}),
            lambda: http.post(f"/tasks/{task}/rollback", json={}),
            lambda: http.delete(f"/tasks/{task}/versions/{version}"),
        ]
        self.hear(await chance.choice(deeds)())
        if chance.random() < 0.08:
            self.hear(await http.delete(f"/tasks/{task}"))
        if chance.random() < 0.4:
            await self.publish(task, chance.randrange(VERSIONS))

    def hear(self, answer: httpx.Response) -> bool:
        good = answer.status_code in (200, 201, 204)
        code = "" if good else str(answer.json()["code"])
        self.told[answer.status_code, code] += 1
        assert good or (answer.status_code, code) in NAMED, answer.text
        return answer.status_code == 200

    @property
    def left(self) -> dict[str, int]:
        batcher, residency = self.server.engine.batcher, self.server.engine.residency
        return {
            "rows": len(batcher), "promises": len(batcher._reservations), "inside": len(batcher._inside),
            "loads": sum(not entry.ready.done() for entry in residency._entries.values()),
            "seats in use": sum(entry.pins for entry in residency._occupied.values()),
        }  # fmt: skip


@asynccontextmanager
async def site(home: Path, **settings: Any) -> AsyncIterator[Site]:
    """In this process and on this event loop, so that its books can be read; stopped as a real one is."""
    own = {"backbone": "untrained", "workers": 0, "rack_slots": 4, "max_batch": 8, "threads": 1, "watch_s": 5}
    server = build_server(Settings(home=home, **{**own, **settings}))
    async with server.running():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http:
            yield Site(server, http)


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # nobody would set an event
            await asyncio.sleep(0.01)
    assert condition(), what


async def test_everything_at_once(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        place.furnish()
        for task in place.bundles:
            await place.publish(task, 0)
        asking = [_many(QUESTIONS, place.ask, seed) for seed in range(CLIENTS)]
        async with asyncio.TaskGroup() as group:
            meddling = [group.create_task(_until_told(place.meddle, 100 + seed)) for seed in range(3)]
            await asyncio.gather(*asking)
            for one in meddling:
                one.cancel()
        print(dict(place.told))
        answered = place.told[200, ""]
        assert answered > CLIENTS * QUESTIONS // 3, "hardly anything was asked of what is there"
        assert place.server.engine.residency.counts.evictions > 0, "the rack was never full"
        await place.server.engine.preloader.stop()
        await until(lambda: not any(place.left.values()), f"something is left: {place.left}")
        await until(place.nothing_is_loading, "a load ahead goes on when its succession has been stopped")
        place.server.engine.residency.check_integrity()
        place.server.engine.batcher.check_integrity()
        for occupant in place.server.engine.residency.occupants():
            await place.server.engine.residency.unload(occupant.seat.task, occupant.seat.version)
        rack = place.server.engine.engine.rack
        assert (rack.used_slots, rack.used_vectors) == (0, 0)
        rack.check_integrity()


async def test_the_next_version_is_on_the_rack_before_anybody_asks_for_it(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        place.furnish()
        await place.publish("task-0", 0)
        await place.ask_about("task-0", 0)
        await place.publish("task-0", 1)
        old, new = (bundle.version for bundle in place.bundles["task-0"])
        await until(lambda: place.server.engine.residency.resident("task-0", new), "it was not loaded ahead")
        assert await place.ask_about("task-0", 0) == new
        assert place.server.engine.residency.resident("task-0", old)


async def test_a_damaged_version_leaves_the_old_one_serving_and_is_told_aloud(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        place.furnish()
        await place.publish("task-0", 0)
        await place.ask_about("task-0", 0)
        old, new = (bundle.version for bundle in place.bundles["task-0"])
        await place.publish("task-0", 1)
        file = tmp_path / "store" / "tasks" / "task-0" / "versions" / f"{new}.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\0bad")
        place.server.store.close()  # what it remembers is gone, as after a restart
    async with site(tmp_path) as place:
        place.furnish()
        assert await place.ask_about("task-0", 0) == old
        gauge = "lensrack_quarantined_versions 1.0"
        assert gauge in (await place.http.get("/metrics")).text
        refused = await place.http.post(f"/predict/task-0@{new}", content=PICTURES[0], headers=PNG)
        assert (refused.status_code, refused.json()["code"]) == (500, "corrupt_bundle")


async def _many(count: int, deed: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        await deed(chance)


async def _until_told(deed: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
    chance = random.Random(seed)
    while True:
        await deed(chance)
        await asyncio.sleep(0)
