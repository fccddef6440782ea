"""JPEGs that come from their decoder at a reduced size: near the exact pixels where asked for, exact where not."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.engine.images import decode
from server.engine.images.decode import Geometry
from server.errors import ServiceError
from server.serving.decoding import ImageBatch
from server.settings import Settings
from tests.engine.test_images import encoded, picture

GEOMETRY = Geometry(64, "bicubic", 0.9, "center")
MAX = 20_000_000


def cut(data: bytes, margin: float = math.inf, geometry: Geometry = GEOMETRY, most: int = MAX) -> np.ndarray[Any, Any]:
    return decode.pixels(data, geometry, max_pixels=most, margin=margin)


def outcome(data: bytes, margin: float, most: int) -> tuple[int, str] | None:
    try:
        cut(data, margin, most=most)
    except ServiceError as error:
        return error.status, error.code
    return None


def off(data: bytes, margin: float, geometry: Geometry = GEOMETRY) -> float:
    return float(np.abs(cut(data, margin, geometry).astype(int) - cut(data, geometry=geometry)).mean())


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    progressive=st.booleans(),
    crop=st.sampled_from(["center", "squash", "border"]),
    orientation=st.sampled_from([1, 3, 6, 8]),
)
def test_it_is_near_the_exact_pixels(
    *, width: int, height: int, mode: str, progressive: bool, crop: str, orientation: int
) -> None:
    if max(width, height) > 20 * min(width, height):
        width = height = min(width, height) + 20
    exif = Image.Exif()
    exif[0x0112] = orientation
    coarse = picture(35, 35).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(coarse, "JPEG", quality=90, progressive=progressive, exif=exif)
    geometry = Geometry(64, "bicubic", 0.9, crop)
    assert off(data, 2, geometry) < 6  # turned or shifted it would be some 60


def test_it_is_another_picture_where_that_is_large_enough_and_the_same_where_not() -> None:
    needed = GEOMETRY.resized
    large, small = (encoded(picture(side, side), "JPEG") for side in (4 * needed, 4 * needed - 8))
    assert off(large, 2) > 0
    assert off(small, 2) == 0
    assert off(small, 1) > 0


def test_the_wider_the_margin_the_nearer() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    assert off(data, 1) > off(data, 2) > off(data, 4) > 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_come_whole(kind: str) -> None:
    assert off(encoded(picture(700, 700), kind), 1) == 0


@pytest.mark.parametrize("length", [0, 3, 20, 200, 2000])
def test_what_is_damaged_is_refused_in_the_same_words(length: int) -> None:
    data = encoded(picture(900, 900), "JPEG", quality=95)
    for damaged in (data[:length], data[:-length] if length else b"\xff\xd8", data[:300] + b"\0" * 50 + data[350:]):
        assert outcome(damaged, 1, MAX) == outcome(damaged, math.inf, MAX)


def test_a_picture_that_is_too_large_stays_so() -> None:
    data = encoded(picture(1000, 1000), "JPEG")
    assert outcome(data, 1, 999_999) == outcome(data, math.inf, 999_999) == (413, "image_too_large")


def test_a_request_is_decoded_as_its_server_says() -> None:
    data = encoded(picture(900, 700), "JPEG")

    async def fitted(margin: float) -> np.ndarray[Any, Any]:
        with ThreadPoolExecutor(1) as pool:
            [result] = await ImageBatch([data], pool, MAX, margin).inputs(GEOMETRY)
        return np.asarray(result)

    np.testing.assert_array_equal(asyncio.run(fitted(2.0)), cut(data, 2))
    np.testing.assert_array_equal(asyncio.run(fitted(math.inf)), cut(data))


def test_readiness_tells_of_it() -> None:
    from server.app.backbone import BackboneInfo
    from server.app.services import readiness
    from server.engine import backbone

    facts = BackboneInfo.of(backbone.load("untrained", device="cpu", packed=False))
    for margin, output in ((0.0, False), (2.0, True)):
        ready = readiness(facts, Settings(workers=1, scaled_decode=margin), "", 1)
        assert ready.ready
        assert any("reduced size" in note for note in ready.notes) is output
