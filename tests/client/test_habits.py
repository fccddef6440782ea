"""What people do with clients beside calls: many images, several event loops, closed clients, pickling, looking."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import pydoc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import lensrack
from lensrack import AsyncClient, Client, InvalidInput
from tests.client.scripted_rack import VERSION, Rack, told
from tests.client.ways import PIXELS, Make, over_sockets


def truncated() -> Any:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return Image.open(io.BytesIO(buffer.getvalue()[:-300]))  # Pillow reads its pixels later


class TestMany:
    def test_more_images_than_a_request_takes_are_sent_in_parts(self, make: Make, rack: Rack) -> None:
        images = [PIXELS + bytes([number]) for number in range(130)]
        client = make()
        assert len(client.predict("trash", images)) == 130
        assert len(client.embed(images)) == 130
        assert len(client.feedback("trash", tuple(images), "glass").items) == 130
        assert [asked.body.count(PIXELS) for asked in rack.asked] == [64, 64, 2] * 3
        assert all(asked.body.index(PIXELS + b"\x00") < asked.body.index(PIXELS + b"\x3f") for asked in rack.asked[::3])
        with pytest.raises(InvalidInput, match="at least one image"):
            client.predict("trash", [])

    def test_what_a_picture_raises_takes_its_place(self, make: Make, rack: Rack) -> None:
        closed = io.BytesIO(PIXELS)
        closed.close()
        images = [PIXELS, truncated(), None, closed, b"", [PIXELS], PIXELS]
        got = list(make().map("trash", images, errors="return"))
        assert [type(one) for one in got] == [lensrack.Answer, *[InvalidInput] * 5, lensrack.Answer]
        with pytest.raises(InvalidInput, match="truncated"):
            list(make().map("trash", images))

    def test_what_the_callers_iterator_raises_is_the_callers(self, make: Make) -> None:
        def images() -> Iterator[bytes]:
            yield PIXELS
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            list(make().map("trash", images(), errors="return"))


class TestLife:
    def test_another_event_loop(self, url: str, rack: Rack) -> None:
        client = AsyncClient(url)
        rack.misbehave("/healthz", replace(told({"status": "ok", "version": "9.9.9"}), headers={"Connection": "close"}))
        assert asyncio.run(client.health()).version == "9.9.9"
        with pytest.raises(InvalidInput, match=r"another event loop: make one in each asyncio\.run"):
            asyncio.run(client.health())
        asyncio.run(client.close())
        with pytest.raises(InvalidInput, match="this AsyncClient is closed"):
            asyncio.run(client.health())

    @over_sockets
    def test_a_closed_client(self, make: Make) -> None:
        client = make()
        other = client.with_options(timeout=3)
        client.health()
        client.close()
        for each in (client, other):
            with pytest.raises(InvalidInput, match="is closed: make a new one"):
                each.health()

    @pytest.mark.parametrize("kind", [Client, AsyncClient])
    def test_pickling(self, kind: Any) -> None:
        client = kind("http://rack", "secret")
        for thing in (client, client.tasks, [client]):
            with pytest.raises(InvalidInput, match=f"a {kind.__name__} holds connections and cannot be pickled"):
                pickle.dumps(thing)
        with pytest.raises(InvalidInput, match="make one in each process"):
            copy.deepcopy(client)
        assert repr(copy.copy(client)) == f"{kind.__name__}('http://rack')"


class TestLooking:
    def test_help_shows_the_groups(self) -> None:
        shown = pydoc.render_doc(Client, renderer=pydoc.plaintext)
        for group in ("tasks", "datasets", "jobs"):
            assert f"`client.{group}` " in shown

    def test_a_handle_says_which_job_it_is(self, make: Make) -> None:
        client = make()
        handle = client.train("trash", "d1")
        assert repr(getattr(handle, "inner", handle)).endswith("JobHandle j1 of task trash: queued>")

    def test_an_answer_is_plain_values(self, make: Make) -> None:
        best = {"label": "glass", "index": 0, "score": 0.7}
        plain = {"task": "trash", "version": VERSION, "versions": [VERSION], "predictions": [best]}
        assert make().predict("trash", PIXELS, top_k=1).to_dict() == plain
