"""What the dashboard stands on: its files, thumbnails, the rack, attention; each for what a browser must never get."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from prompts_store import open_store
from server.api.routes import ui
from server.serving.resolver import Ref
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import zipped
from tests.serving.floor import Floor, png, publish


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as running:
        yield running


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_front_page_is_the_dashboard(api: Api) -> None:
    page = api.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_every_file_of_it_is_served_whole_and_kept_by_its_etag(api: Api) -> None:
    files = [path for path in ui.FOLDER.rglob("*") if path.suffix in ui.TYPES]
    assert len(files) > 5
    for path in files:
        address = f"/ui/{path.relative_to(ui.FOLDER).as_posix()}"
        found = api.http.get(address)
        assert found.content == path.read_bytes()
        assert found.headers["content-type"] == ui.TYPES[path.suffix]
        again = api.http.get(address, headers={"If-None-Match": f'"old", W/{found.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert api.http.head(address).headers["content-length"] == str(len(found.content))


@pytest.mark.parametrize("path", ["../api/ui.py", "..%2fapi%2fui.py", "%2e%2e/api/ui.py", "/etc/passwd", "", "index"])
def test_no_other_file_is(api: Api, path: str) -> None:
    status, got = api.raw(head=f"GET /ui/{path} HTTP/1.1\nHost: localhost\nConnection: close")
    assert status == 404
    assert b"import" not in got


def test_nothing_comes_from_the_network_and_nothing_is_written_as_markup() -> None:
    own = [path for path in ui.FOLDER.rglob("*") if path.suffix in ui.TYPES and "vendor" not in path.parts]
    for path in own:
        text = path.read_text()
        assert not re.findall(r"""(?:src|href|url|from|import)\W{1,3}(?:https?:)?//""", text), path.name
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name
    index = (ui.FOLDER / "index.html").read_text()
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", index)


# --- thumbnails -------------------------------------------------------------------------------------------------------


def secretive() -> bytes:
    """A JPEG that carries a place, and is turned."""
    image = Image.new("RGB", (60, 40), (250, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "the visitor's garden"
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(api: Api) -> str:
    members = {f"{label}/{n}.png": png(10 * n + len(label)) for label in ("cat", "horse") for n in range(4)}
    members["cat/place.jpg"] = secretive()
    body = zipped(members)
    stored = api.http.post("/datasets", content=body, headers={"Content-Type": "application/zip"})
    assert stored.status_code == 201, stored.text
    return str(stored.json()["id"])


def test_a_few_pictures_of_each_label(api: Api, dataset: str) -> None:
    found = api.http.get(f"/datasets/{dataset}/thumbnails", params={"per_label": 2}).json()["thumbnails"]
    assert [one["label"] for one in found] == ["cat", "cat", "horse", "horse"]
    horses = api.http.get(f"/datasets/{dataset}/thumbnails", params={"label": "horse", "per_label": 9}).json()
    assert [one["name"] for one in horses["thumbnails"]] == [f"horse/{n}.png" for n in range(4)]


def test_a_thumbnail_is_a_new_jpeg_upright_and_without_metadata(api: Api, dataset: str) -> None:
    listed = api.http.get(f"/datasets/{dataset}/thumbnails", params={"label": "cat", "per_label": 9}).json()
    [number] = [one["number"] for one in listed["thumbnails"] if one["name"].endswith("place.jpg")]
    found = api.http.get(f"/datasets/{dataset}/thumbnails/{number}", params={"side": 32})
    assert found.headers["content-type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(found.content))
    assert picture.format == "JPEG"
    assert max(picture.size) == 32
    assert picture.height > picture.width
    assert not picture.getexif()
    assert b"garden" in secretive()
    assert b"garden" not in found.content
    etag = {"If-None-Match": found.headers["etag"]}
    assert api.http.get(f"/datasets/{dataset}/thumbnails/{number}?side=32", headers=etag).status_code == 304
    assert api.http.get(f"/datasets/{dataset}/thumbnails/{number}?side=64", headers=etag).status_code == 200


def test_thumbnails_that_are_not_there(api: Api, dataset: str) -> None:
    assert_problem(api.http.get(f"/datasets/{dataset}/thumbnails/9"), 404, "picture_not_found")
    assert_problem(api.http.get(f"/datasets/{'0' * 64}/thumbnails/0"), 404, "dataset_not_found")
    assert_problem(api.http.get(f"/datasets/{dataset}/thumbnails/-1"), 422, "invalid_request")
    assert_problem(api.http.get(f"/datasets/{dataset}/thumbnails/0?side=9999"), 422, "invalid_request")


def test_a_deleted_datasets_pictures_are_gone(api: Api) -> None:
    members = {f"{label}/{n}.png": png(100 + 10 * n + len(label)) for label in ("a", "bb") for n in range(2)}
    stored = api.http.post("/datasets", content=zipped(members), headers={"Content-Type": "application/zip"}).json()
    address = f"/datasets/{stored['id']}/thumbnails/0"
    assert api.http.get(address).status_code == 200
    api.http.delete(f"/datasets/{stored['id']}")
    assert_problem(api.http.get(address), 404, "dataset_not_found")


# --- the rack ---------------------------------------------------------------------------------------------------------


def ask(api: Api, path: str, image: bytes) -> httpx.Response:
    return api.http.post(path, content=image, headers={"Content-Type": "image/png"})


def test_the_rack_says_who_sits_there_and_how_often_they_were_asked(api: Api) -> None:
    version = publish(api.services.store, "asked", seed=3)
    before = api.http.get("/rack").json()
    for _ in range(3):
        assert ask(api, "/predict/asked", png()).status_code == 200
    now = api.http.get("/rack").json()
    [seat] = [seat for seat in now["seats"] if seat["task"] == "asked"]
    assert (seat["version"], seat["requests"]) == (version, 3)
    assert now["forwards"] == before["forwards"] + 3 == sum(now["batch_rows"].values())
    assert now["rows"]["answered"] == before["rows"].get("answered", 0) + 3
    told = api.http.get("/tasks/asked").json()
    assert (told["requests"], told["classes"], told["method"]) == (3, 3, "linear")
    assert [one for one in api.http.get("/tasks").json()["tasks"] if one["task"] == "asked"] == [told]


def test_the_methods_are_listed_with_their_meaning(api: Api) -> None:
    found = api.http.get("/methods").json()["methods"]
    assert {"name": "linear", "meaning": "a head alone"} in found


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_is_told_of_one_picture_by_the_engines_thread(api: Api) -> None:
    version = publish(api.services.store, "seen", seed=4)
    assert ask(api, "/predict/seen", png()).status_code == 200
    found = ask(api, "/tasks/seen/attention", png(50)).json()
    assert (found["task"], found["version"], found["crop_mode"]) == ("seen", version, "squash")
    assert found["last"]["grid"] == [[0.05, 0.1], [0.1, 0.1]]
    assert found["last"]["prompts"] == 0.25
    assert len(api.floor.engine.threads) == 1
    assert api.floor.shelf.pins[version] == 0


def test_attention_refuses_what_it_cannot_show(api: Api) -> None:
    publish(api.services.store, "seen", seed=4)
    two = [("images", ("a.png", png(), "image/png")), ("images", ("b.png", png(), "image/png"))]
    assert_problem(api.http.post("/tasks/seen/attention", files=two), 422, "invalid_request")
    assert_problem(ask(api, "/tasks/unknown/attention", png()), 404, "task_not_found")
    assert_problem(ask(api, "/tasks/Seen!/attention", png()), 400, "bad_task_name")
    assert_problem(ask(api, "/tasks/seen/attention", b"no picture"), 415, "unsupported_image")


@pytest.mark.anyio
async def test_a_seat_stays_until_the_engine_is_done_although_its_client_has_left() -> None:
    floor = Floor(open_store("memory://"))
    version = publish(floor.store, "left")
    floor.engine.gate.clear()
    work = floor.predictor.run_exclusive(Ref("left"), png(), floor.engine.look, key="", tenant="", timeout_s=20)
    asked = asyncio.ensure_future(work)
    assert await asyncio.to_thread(floor.engine.entered.wait, 10)
    for _ in range(3):  # gone, and gone again
        asked.cancel()
        await asyncio.sleep(0.02)
        assert floor.shelf.pins[version] == 1
    floor.engine.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert floor.shelf.pins[version] == 0
    await floor.close()


def test_predictions_get_their_turn_between_attentions(api: Api) -> None:
    """Four attentions and a prediction that came after them wait for a held engine: it goes second at the latest."""
    publish(api.services.store, "turn", seed=6)
    assert ask(api, "/predict/turn", png()).status_code == 200
    order: list[str] = []

    def note(path: str, name: str) -> None:
        headers = {"Content-Type": "image/png"}
        assert httpx.post(f"{api.url}{path}", content=png(), headers=headers, timeout=20).status_code == 200
        order.append(name)

    api.floor.engine.gate.clear()
    looks = [threading.Thread(target=note, args=("/tasks/turn/attention", "look")) for _ in range(4)]
    for thread in looks:
        thread.start()
    until = time.monotonic() + 10
    while api.floor.shelf.pins.total() < 4 and time.monotonic() < until:
        time.sleep(0.01)
    last = threading.Thread(target=note, args=("/predict/turn", "predict"))
    last.start()
    while len(api.services.batcher) + api.floor.shelf.pins.total() < 5 and time.monotonic() < until:
        time.sleep(0.01)
    api.floor.engine.gate.set()
    for thread in (*looks, last):
        thread.join(20)
    assert order.index("predict") < 4
    assert len(order) == 5
