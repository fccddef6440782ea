"""A front end and the engine over their real socket: what each does when the other leaves, hangs up or says nonsense.

That both pairs of residency and batcher answer alike is `tests/serving/test_predictor.py`'s, which asks both.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompts_store import VersionNotFound, open_store
from server.errors import QueueFull, ServiceError, Unavailable
from server.rpc import protocol
from server.rpc.connection import FROM_ENGINE
from server.rpc.engine_server import FROM_FRONTS, EngineServer
from server.rpc.protocol import Form, Frame, FrameReader, Kind, ProtocolError, Reply, SentRow
from server.rpc.shared_memory import PixelReader, PixelWriter, slot_bytes
from server.serving.resolver import Ref
from tests.rpc.far_floor import LOOK, Front, front, server, settled
from tests.serving.floor import SIZE, Floor, png, publish

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def house(**changes: Any) -> AsyncIterator[tuple[Floor, EngineServer, Path]]:
    floor = Floor(open_store("memory://"), **changes)
    publish(floor.store)
    try:
        async with server(floor) as (opened, path):
            yield floor, opened, path
            floor.engine.gate.set()
            await settled(
                lambda: (
                    not any(session.rows for session in opened.sessions)
                    and not len(floor.batcher)
                    and floor.shelf.in_use == 0
                )
            )
        floor.batcher.check_integrity()
    finally:
        await floor.close()


async def ask(built: Front, grey: int = 7, count: int = 1) -> Any:
    images = [png(grey)] * count
    return await built.predictor.predict((Ref("fish"),), images, 1, key="k", tenant="", timeout_s=60.0)


async def inside(floor: Floor, built: Front) -> asyncio.Task[Any]:
    """A question that the engine is at and does not come to an end with."""
    floor.engine.gate.clear()
    asked = asyncio.create_task(ask(built))
    await asyncio.to_thread(floor.engine.entered.wait, 60)
    return asked


# --- one of the two leaves --------------------------------------------------------------------------------------------


@pytest.fixture
def shared_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, seats are shared."""
    monkeypatch.setattr("server.rpc.seat_cache.SHARED_S", 600.0)


async def test_requests_for_a_task_share_a_seat_and_the_engine_counts_each(shared_long: None):
    async with house(max_batch=1) as (floor, _, path), front(floor, path) as built:
        [version] = [info.version for info in floor.store.versions("fish")]
        asked = [await inside(floor, built), *(asyncio.create_task(ask(built)) for _ in range(3))]
        await settled(lambda: len(floor.batcher) == 3)
        assert floor.shelf.in_use == 1, "they sit on one seat"
        floor.engine.gate.set()
        assert len(await asyncio.gather(*asked)) == 4
        await settled(lambda: floor.shelf.in_use == 0)
        assert floor.shelf.shared == {version: 3}


async def test_what_has_left_the_rack_is_asked_for_anew(shared_long: None):
    async with house() as (floor, _, path), front(floor, path) as built, front(floor, path) as other:
        [version] = [info.version for info in floor.store.versions("fish")]
        asked = await inside(floor, built)
        await other.residency.unload("fish", version)
        await settled(lambda: not built.residency.resident("fish", version))
        again = asyncio.create_task(ask(built))
        await settled(lambda: len(floor.shelf.loads) == 2)
        floor.engine.gate.set()
        assert len(await asyncio.gather(asked, again)) == 2
        await settled(lambda: floor.shelf.in_use == 0)
        assert not floor.shelf.shared.total()


async def test_a_front_end_that_leaves_takes_its_rows_and_seats_along(shared_long: None):
    async with house(max_batch=1) as (floor, opened, path), front(floor, path) as other:
        async with front(floor, path) as built:
            asked = [await inside(floor, built), *(asyncio.create_task(ask(built)) for _ in range(3))]
            await settled(lambda: len(floor.batcher) == 3)
            assert floor.shelf.in_use == 1, "they sit on one seat"
            await built.connection.stop()
            for one in asked:
                with pytest.raises(Unavailable) as caught:
                    await one
                assert caught.value.code == "engine_unavailable"
            await settled(lambda: len(opened.sessions) == 1)
            assert floor.shelf.in_use == 1, "the engine is still at a row of it"
        floor.engine.gate.set()
        await settled(lambda: floor.shelf.in_use == 0)
        assert len(floor.engine.batches) == 1, "what waited was not computed"
        assert (await ask(other)).version


async def test_an_engine_that_leaves_is_told_of_and_found_again():
    floor = Floor(open_store("memory://"), max_batch=1)
    publish(floor.store)
    async with server(floor) as (first, path), front(floor, path) as built:
        asked = await inside(floor, built)
        await first.stop()
        with pytest.raises(Unavailable) as caught:
            await asked
        assert (caught.value.code, caught.value.retry_after_s) == ("engine_unavailable", 5.0)
        with pytest.raises(Unavailable):
            await ask(built)
        assert built.predictor.quarantine.count() == 0, "nothing is known of the version itself"
        assert built.slots.used == 0
        floor.engine.gate.set()
        second = EngineServer(path, first.backend)
        await second.start()
        await settled(lambda: not built.connection.trouble)
        assert (await ask(built)).version
        await second.stop()
    await floor.close()


async def test_seats_of_an_earlier_engine_are_void():
    floor = Floor(open_store("memory://"))
    version = publish(floor.store)
    async with server(floor) as (first, path), front(floor, path) as built:
        old = await built.residency.acquire("fish", version)
        await first.stop()
        second = EngineServer(path, first.backend)
        await second.start()
        await settled(lambda: not built.connection.trouble and built.connection.epoch == 2)
        new = await built.residency.acquire("fish", version)
        built.residency.release(old)  # which is nobody's any more
        assert old.number == new.number
        await built.residency.load("fish", version)
        assert floor.shelf.in_use == 1
        built.residency.release(new)
        await settled(lambda: floor.shelf.in_use == 0)
        await second.stop()
    await floor.close()


async def test_a_seat_that_comes_when_nobody_waits_any_more_is_given_back():
    async with house() as (floor, _, path), front(floor, path) as built:
        [version] = [info.version for info in floor.store.versions("fish")]
        async with floor.shelf.loading:
            waiting = asyncio.create_task(built.residency.acquire("fish", version))
            await settled(lambda: built.connection._calls)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await built.residency.load("fish", version)
        await settled(lambda: floor.shelf.in_use == 0)


# --- the queue --------------------------------------------------------------------------------------------------------


async def test_one_queue_for_all_front_ends():
    """What others have in it is known, and the engine has the last word."""
    async with (
        house(max_batch=1, max_queue=4) as (floor, _, path),
        front(floor, path) as one,
        front(floor, path) as two,
    ):
        asked = [await inside(floor, one), *(asyncio.create_task(ask(one)) for _ in range(4))]
        await settled(lambda: len(floor.batcher) == 4)
        with pytest.raises(QueueFull) as caught:
            await ask(two)
        assert caught.value.retry_after_s >= 1
        await settled(lambda: two.batcher._taken() >= two.batcher.places)
        with pytest.raises(QueueFull):
            two.batcher.require_room(0)
        floor.engine.gate.set()
        assert len({(await answer).version for answer in asked}) == 1


async def test_a_front_end_knows_who_is_quiet_beside_what_others_have():
    async with (
        house(max_batch=1, max_queue=4) as (floor, _, path),
        front(floor, path) as one,
        front(floor, path) as two,
    ):
        publish(floor.store, "bird")
        asked = [await inside(floor, one), *(asyncio.create_task(ask(one)) for _ in range(4))]
        await settled(lambda: two.batcher.others == 5)
        assert one.batcher.beside == {}
        for flow in (("", "fish"), ("", "")):
            with pytest.raises(QueueFull):
                two.batcher.require_room(0, flow)
        for flow in (("", "bird"), ("quiet", "fish"), ("quiet", "")):
            two.batcher.require_room(100, flow)
        quiet = asyncio.create_task(two.predictor.predict((Ref("bird"),), [png(7)], 1, key="", tenant="", timeout_s=60))
        await settled(lambda: one.batcher.beside == {"": {"bird": 1}})
        floor.engine.gate.set()
        assert {one.task for one in await asyncio.gather(quiet, *asked)} == {"fish", "bird"}
        await settled(lambda: not two.batcher.others)


async def test_the_bound_of_the_queue_in_time_is_known_to_front_ends():
    async with house(max_batch=1, max_queue=9, wait_s=0.001) as (floor, _, path), front(floor, path) as built:
        assert built.batcher.places == 9
        asked = await inside(floor, built)
        await asyncio.sleep(0.2)
        floor.engine.gate.set()
        assert (await asked).version  # it took far more than a millisecond
        await settled(lambda: built.batcher.places == floor.batcher.places == 2)
        floor.engine.gate.clear()
        floor.engine.entered.clear()
        waiting = [await inside(floor, built), *(asyncio.create_task(ask(built)) for _ in range(2))]
        await settled(lambda: len(floor.batcher) == 2)
        with pytest.raises(QueueFull, match="all 2 places"):
            built.batcher.require_room(0)
        floor.engine.gate.set()
        assert all([(await one).version for one in waiting])


async def test_a_full_queue_of_one_tenants_still_lets_another_in():
    async with house(max_batch=1, max_queue=4) as (floor, _, path), front(floor, path) as built:
        asked = [await inside(floor, built), *(asyncio.create_task(ask(built)) for _ in range(4))]
        await settled(lambda: len(floor.batcher) == 4)
        with pytest.raises(QueueFull):
            await ask(built)
        built.batcher.require_room(100, ("quiet", "fish"))
        quiet = asyncio.create_task(
            built.predictor.predict((Ref("fish"),), [png(7)], 1, key="", tenant="quiet", timeout_s=60)
        )
        await settled(lambda: len(floor.batcher) == 5)
        built.batcher.check_integrity()
        floor.batcher.check_integrity()
        floor.engine.gate.set()
        assert len({one.version for one in await asyncio.gather(quiet, *asked)}) == 1


async def test_a_full_queue_of_one_tasks_still_lets_another_of_its_tenant_in():
    async with house(max_batch=1, max_queue=4) as (floor, _, path), front(floor, path) as built:
        publish(floor.store, "bird")
        asked = [await inside(floor, built), *(asyncio.create_task(ask(built)) for _ in range(4))]
        await settled(lambda: len(floor.batcher) == 4)
        with pytest.raises(QueueFull):
            built.batcher.require_room(0, ("", "fish"))
        built.batcher.require_room(100, ("", "bird"))
        quiet = asyncio.create_task(
            built.predictor.predict((Ref("bird"),), [png(7)], 1, key="", tenant="", timeout_s=60)
        )
        await settled(lambda: len(floor.batcher) == 5)
        built.batcher.check_integrity()
        floor.batcher.check_integrity()
        floor.engine.gate.set()
        assert {one.task for one in await asyncio.gather(quiet, *asked)} == {"fish", "bird"}


async def test_a_suspended_engine_answers_those_who_wait_and_keeps_their_pixels():
    async with house(max_batch=1) as (floor, _, path), front(floor, path) as built:
        asked = [await inside(floor, built), asyncio.create_task(ask(built))]
        await settled(lambda: len(floor.batcher) == 1)
        floor.batcher.suspend("it hangs")
        for one in asked:
            with pytest.raises(Unavailable, match="it hangs"):
                await one
        assert built.slots.used == 1, "the engine may still read what it is at"
        await settled(lambda: built.connection.trouble == "it hangs")
        floor.engine.gate.set()
        floor.batcher.resume()
        await settled(lambda: not built.slots.used and not built.connection.trouble)
        assert (await ask(built)).version


async def test_a_drain_answers_who_waits_or_tells_them():
    async with house(max_batch=1) as (floor, _, path), front(floor, path) as built:
        asked = await inside(floor, built)
        await built.batcher.drain(0.01)
        with pytest.raises(Unavailable) as caught:
            await asked
        assert caught.value.code == "shutting_down"
        with pytest.raises(Unavailable):
            await ask(built)


async def test_works_beside_predictions_are_asked_by_name():
    async with house() as (floor, _, path), front(floor, path) as built:
        version, _, seen = await built.predictor.run_exclusive(
            Ref("fish"), png(9), LOOK, key="", tenant="", timeout_s=60
        )
        assert (len(version), seen) == (64, [9, 0])


# --- strangers and liars ----------------------------------------------------------------------------------------------


async def cut_off(path: Path, said: bytes, descriptors: list[int]) -> None:
    """Whoever says this is hung up on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        await asyncio.to_thread(sock.connect, str(path))
        socket.send_fds(sock, [said], descriptors)
        while await asyncio.to_thread(sock.recv, 65536):
            pass


def hello(slots: Any, **changes: Any) -> bytes:
    return protocol.message(
        Kind.HELLO, 0, {"version": protocol.VERSION, "pid": 1, "slots": slots, "size": SIZE, **changes}
    )


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        hello(4, version=protocol.VERSION + 1),
        hello(4, size=SIZE + 1),
        hello(5),
        hello("4"),
        hello(10**15),
        hello(4) + protocol.message(Kind.CALL, 1, {"do": "load"}),
        protocol.message(Kind.CALL, 1, {"do": "load"}),
        protocol.frame(Kind.HELLO, 0, b"[1]"),
    ],
)
async def test_who_does_not_say_hello_is_not_let_in(said: bytes):
    async with house() as (floor, _, path), front(floor, path) as built:
        shared = PixelWriter(4, SIZE)
        await cut_off(path, said, [shared.descriptor])
        shared.close()
        assert (await ask(built)).version, "nobody else notices"


STRANGER = """
import os, socket, sys
from server.rpc.shared_memory import PixelWriter
folder, name, user, said = sys.argv[1:]
shared = PixelWriter(4, SIZE)
os.chdir(folder)  # the folders above are nobody's business
os.setuid(int(user))
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(60)
    sock.connect(name)
    try:
        socket.send_fds(sock, [bytes.fromhex(said)], [shared.descriptor])
        print(len(sock.recv(1)))
    except ConnectionError:
        print("0")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("user", "told"), [(0, "1"), (65534, "0")])
async def test_another_user_is_not_let_in(user: int, told: str):
    """Not even where somebody has opened the folder and the socket to all."""
    async with house() as (floor, _, path), front(floor, path) as built:
        path.parent.chmod(0o755)
        path.chmod(0o666)
        script = STRANGER.replace("SIZE", str(SIZE))
        command = [sys.executable, "-c", script, str(path.parent), path.name, str(user), hello(4).hex()]
        stranger = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said, _ = await asyncio.wait_for(stranger.communicate(), 120)
        assert (said.decode().strip(), stranger.returncode) == (told, 0)
        assert (await ask(built)).version, "nobody else notices"


async def test_a_memory_that_may_shrink_is_not_taken():
    """Whoever could cut it off would bring the engine down with it."""
    async with house() as (_, _, path):
        unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, 4 * slot_bytes(SIZE))
        await cut_off(path, hello(4), [unsealed])
        os.close(unsealed)
        with socket.socket() as no_memory:
            await cut_off(path, hello(4), [no_memory.fileno()])
        await cut_off(path, hello(4), [])


ROW = SentRow(1, 0, 0, Form.BYTES, 1e9, 0.0, "", "")


@pytest.mark.parametrize(
    "said",
    [
        protocol.message(Kind.CALL, 1, {"do": "format the disk"}),
        protocol.message(Kind.CALL, 1, {"do": "acquire", "task": "fish", "version": 1}),
        protocol.message(Kind.CALL, 1, {"do": "aside", "work": "os.system", "seat": 1, "slot": 0, "form": 0}),
        protocol.message(Kind.CALL, 1, {"do": "view", "name": ["rack"]}),
        protocol.frame(Kind.CALL, 1, b"{"),
        protocol.frame(Kind.CALL, 1, b"[" * 100_000),
        protocol.frame(Kind.RETURN, 1, b"{}"),
        protocol.released({1: 0}),
        protocol.frame(Kind.RELEASE, 0, b"\0" * 15),
        protocol.submit([SentRow(1, 99, 0, Form.BYTES, 1e9, 0.0, "", "")]),
        protocol.submit([SentRow(1, 0, 4, Form.BYTES, 1e9, 0.0, "", "")]),
        protocol.submit([ROW, ROW]),
        protocol.frame(Kind.SUBMIT, 2, protocol.submit([ROW])[protocol.HEADER.size :]),
        protocol.frame(Kind.SUBMIT, 1, protocol.submit([ROW])[protocol.HEADER.size :] + b"\0"),
        protocol.HEADER.pack(2**32 - 1, Kind.CALL, 1),
    ],
)
async def test_who_breaks_the_protocol_is_cut_off_alone(said: bytes):
    async with house() as (floor, _, path), front(floor, path) as built:
        shared = PixelWriter(4, SIZE)

        def talk() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(60)
                sock.connect(str(path))
                socket.send_fds(sock, [hello(4)], [shared.descriptor])
                assert sock.recv(65536), "it was let in"
                sock.sendall(said)
                try:
                    while sock.recv(65536):
                        pass
                except ConnectionResetError:
                    pass

        await asyncio.to_thread(talk)
        shared.close()
        assert (await ask(built)).version, "nobody else notices"


async def test_an_engine_that_talks_nonsense_is_hung_up_on(tmp_path: Path):
    floor = Floor(open_store("memory://"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "engine"))
        listener.listen()
        listener.settimeout(60)

        def talk() -> None:
            for said in (protocol.frame(Kind.STATE, 0, b"7"), protocol.frame(Kind.SUBMIT, 0, b"")):
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(60)
                    assert sock.recv(65536)
                    sock.sendall(protocol.message(Kind.STATE, 0, {"waiting": 0}) + said)
                    assert sock.recv(65536) == b""

        talking = asyncio.create_task(asyncio.to_thread(talk))
        async with front(floor, tmp_path / "engine"):
            await talking
    await floor.close()


# --- the protocol by itself -------------------------------------------------------------------------------------------

NAMES = st.text(max_size=60)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.builds(
    SentRow, number=st.integers(0, 2**64 - 1), seat=st.integers(0, 2**32 - 1), slot=st.integers(0, 2**32 - 1),
    form=st.sampled_from([Form.BYTES, Form.FLOATS]), deadline=FINITE, arrived=FINITE, tenant=NAMES, request=NAMES,
)  # fmt: skip


@given(st.lists(ROWS, min_size=1, max_size=5), st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_rows_come_as_they_were_sent_however_they_are_cut(rows: list[SentRow], data: st.DataObject):
    whole = protocol.submit(rows) * 2
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    reader, got = FrameReader(FROM_FRONTS, protocol.MOST_TO_ENGINE), []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        got += list(reader.feed(whole[start:end]))
    assert [protocol.read_rows(one) for one in got] == [rows, rows]


@given(st.binary(max_size=300), st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_bytes_that_are_no_frames_are_an_error_of_the_protocol_or_wait_for_more(said: bytes, data: st.DataObject):
    """Also frames with a byte changed, and those with a length that lies."""
    if data.draw(st.booleans()):
        real = bytearray(protocol.submit([ROW]) + protocol.message(Kind.CALL, 1, {"do": "load"}))
        real[data.draw(st.integers(0, len(real) - 1))] ^= data.draw(st.integers(1, 255))
        said = bytes(real)
    for kinds in (FROM_FRONTS, FROM_ENGINE):
        try:
            for one in FrameReader(kinds, 1000).feed(said):
                read(one)
        except ProtocolError:
            pass


def read(one: Frame) -> None:
    if one.kind == Kind.SUBMIT:
        protocol.read_rows(one)
    elif one.kind == Kind.ANSWER:
        protocol.read_answer(one.payload)
    elif one.kind == Kind.CANCEL:
        protocol.read_numbers(one.payload)
    elif one.kind == Kind.RELEASE:
        protocol.read_released(one.payload)
    elif one.kind != Kind.LEFT:
        told = protocol.read_message(one.payload)
        if isinstance(told.get("fault"), dict):
            protocol.failure(told["fault"])


@given(st.lists(st.floats(width=64), max_size=20), st.booleans(), st.sampled_from([np.float32, np.float64]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_answers_keep_every_bit(values: list[float], left: bool, dtype: type):
    with np.errstate(over="ignore"):
        outcome = np.array(values, dtype)
    sent = protocol.answer(7, Reply(outcome, left, 0.1, 0.2))
    [one] = FrameReader(FROM_ENGINE, protocol.MOST_TO_FRONT).feed(sent)
    got = protocol.read_answer(one.payload)
    assert isinstance(got.outcome, np.ndarray)
    assert (one.number, got.left, got.queue_s, got.compute_s) == (7, left, 0.1, 0.2)
    assert (got.outcome.dtype, got.outcome.tobytes()) == (outcome.dtype, outcome.tobytes())


def test_failures_are_of_the_same_class_on_the_other_side():
    full = protocol.failure(protocol.to_wire(QueueFull("no room", retry_after_s=7.0, places=3)))
    assert isinstance(full, QueueFull)
    assert (full.detail, full.retry_after_s, full.extra, full.status) == ("no room", 7.0, {"places": 3}, 429)
    gone = protocol.failure(protocol.to_wire(VersionNotFound("fish", "0" * 64)))
    assert isinstance(gone, VersionNotFound)
    assert gone.code == "version_not_found"
    unforeseen = protocol.failure(protocol.to_wire(RuntimeError("secret path /etc/passwd")))
    assert isinstance(unforeseen, ServiceError)
    assert (unforeseen.status, "secret" in unforeseen.detail) == (500, False)


def test_slots_are_filled_once_for_an_image_and_freed_with_its_last_row():
    slots = PixelWriter(2, SIZE)
    window = PixelReader(slots.descriptor, 2, SIZE)
    one, other = (np.full((SIZE, SIZE, 3), grey, np.uint8) for grey in (1, 2))
    floats = np.full((3, SIZE, SIZE), 0.5, np.float32)
    assert slots.put(one) == slots.put(one)
    at, form = slots.put(other)
    with pytest.raises(QueueFull):
        slots.put(floats)
    assert np.array_equal(window.picture(at, form), other)
    assert window.picture(at, form) is window.picture(at, form)
    slots.drop(other)
    assert slots.put(floats) == (at, Form.FLOATS)
    assert np.array_equal(window.picture(at, Form.FLOATS), floats)
    slots.drop(one)
    assert slots.used == 2
    slots.drop(one)
    assert slots.used == 1
    with pytest.raises(ProtocolError):
        window.picture(2, Form.BYTES)
    with pytest.raises(ValueError, match="expected uint8"):
        slots.put(np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(struct.error):
        protocol.submit([SentRow(-1, 0, 0, Form.BYTES, 0.0, 0.0, "", "")])
    slots.close()
