"""Cut by the client or by the server: the same pixels, bit for bit, and so the same answers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lensrack import AsyncClient, Client, InvalidInput, LensrackError, _core, wire
from lensrack._resizing import NPY, encode
from server.engine.images import decode as server_images
from server.engine.images.decode import Geometry
from tests.api.api_server import Api, serving
from tests.serving.floor import MANIFEST, png, publish

RNG = np.random.default_rng(11)
SIZE = MANIFEST.preprocess.size


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def here(image: Any, geometry: Geometry) -> np.ndarray | None:
    """The pixels that the client sends, if it does."""
    told = wire.Geometry(
        size=geometry.size,
        interpolation=geometry.interpolation,
        crop_pct=geometry.crop_pct,
        crop_mode=geometry.crop_mode,
        fill=geometry.fill,
    )
    data, kind = encode(image, told)
    return np.load(io.BytesIO(data)) if kind == NPY else None


def there(data: bytes, geometry: Geometry) -> np.ndarray:
    return server_images.pixels(data, geometry, max_pixels=10**8)


geometries = st.builds(
    Geometry.of,
    st.sampled_from([2, 7, 32, 48]),
    st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    st.sampled_from([0.5, 0.875, 0.9, 1.0, 1.3]),
    st.sampled_from(["center", "squash", "border"]),
    st.tuples(*[st.floats(0, 1)] * 3),
)
SQUARE = Geometry(32, "bicubic", 0.875, "center")


@settings(max_examples=120)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), geometries)
def test_every_size_and_geometry(width: int, height: int, kind: str, geometry: Geometry) -> None:
    data = file(noise(width, height), kind)
    ours = here(data, geometry)
    assert ours is not None
    assert np.array_equal(ours, there(data, geometry))


@settings(max_examples=60)
@given(
    st.sampled_from(["RGB", "L", "CMYK", "1", "P", "RGBA", "LA", "I;16"]),
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]),
    st.integers(0, 9),
    st.booleans(),
)
@example("RGBA", "PNG", 6, True)
def test_what_is_cut_is_cut_alike_whatever_the_file(mode: str, kind: str, turn: int, progressive: bool) -> None:
    """Colour modes, transparency, depth and EXIF orientation: the client is right or leaves it to the server."""
    exif = Image.Exif()
    exif[0x0112] = turn
    image = noise(40, 24).convert("L").convert("I;16") if mode == "I;16" else noise(40, 24).convert(mode)
    try:
        data = file(image, kind, exif=exif, **({"progressive": True} if kind == "JPEG" and progressive else {}))
    except (OSError, ValueError, KeyError):  # Pillow does not write this mode in this format
        return
    ours = here(data, SQUARE)
    assert ours is None or np.array_equal(ours, there(data, SQUARE))
    if mode in ("RGB", "L") and kind == "JPEG":
        assert ours is not None


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a",
        b"\xff\xd8\xff but no JPEG",
        file(noise(30, 30), "JPEG")[:-200],
        file(noise(8, 8), "GIF"),
        file(noise(8, 8).convert("RGBA"), "PNG"),
        file(noise(8, 8), "PNG", save_all=True, append_images=[noise(8, 8)]),
        file(noise(8, 8), "WEBP", save_all=True, append_images=[noise(8, 8)]),
        file(Image.new("RGB", (1, 600_000)), "PNG"),
    ],
)
def test_what_is_doubtful_is_left_to_the_server(data: bytes) -> None:
    assert encode(data, wire.Geometry(size=32, interpolation="bicubic", crop_pct=1, crop_mode="center"))[0] == data


def test_arrays_and_opened_images() -> None:
    array = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = there(file(Image.fromarray(array), "PNG"), SQUARE)
    assert np.array_equal(here(array, SQUARE), expected)  # type: ignore[arg-type]
    assert np.array_equal(here(Image.fromarray(array), SQUARE), expected)  # type: ignore[arg-type]
    assert here(np.dstack([array, array[:, :, :1]]), SQUARE) is None
    grey = array[:, :, 0]
    assert np.array_equal(here(grey, SQUARE), there(file(Image.fromarray(grey), "PNG"), SQUARE))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        here(array.astype(np.float32), SQUARE)


# --- through a server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as api:
        publish(api.floor.store)
        publish(api.floor.store, "crab", 1)
        yield api


def bodies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What types of bodies went to a prediction."""
    sent: list[str] = []
    request = _core.Exchange.request

    def noting(self: Any) -> Any:
        made = request(self)
        if made.url.path.startswith("/predict"):
            sent.append(made.headers.get("content-type", "").partition(";")[0])
        return made

    monkeypatch.setattr(_core.Exchange, "request", noting)
    return sent


def test_the_same_answers_from_pixels(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [file(noise(60 + number, 40), "JPEG") for number in range(5)]
    sent = bodies(monkeypatch)
    with Client(api.url) as client:
        plain, cutting = client.predict("fish", pictures), client.with_options(client_resize=True)
        assert cutting.predict("fish", pictures) == plain
        assert cutting.predict("fish@live", pictures[0]) == plain[0]
        assert list(cutting.map("fish", pictures, in_flight=2)) == plain
        assert cutting.predict_many(["fish", "crab"], pictures[0]) == client.predict_many(["fish", "crab"], pictures[0])
    assert sent == ["multipart/form-data"] * 2 + [NPY] * 7 + ["image/jpeg"]


def test_the_same_answers_from_pixels_with_await(api: Api) -> None:
    pictures = [file(noise(60, 40 + number), "PNG") for number in range(3)]

    async def ask() -> tuple[Any, Any, Any]:
        async with AsyncClient(api.url, client_resize=True) as client:
            mapped = [one async for one in client.map("fish", pictures)]
            return await client.predict("fish", pictures), mapped, await client.predict_many(["fish"], pictures[0])

    with Client(api.url) as client:
        plain = client.predict("fish", pictures)
    many, mapped, one = asyncio.run(ask())
    assert many == mapped == plain
    assert one["fish"] == plain[0]


def test_a_version_that_cuts_otherwise_goes_live(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client remembers how a task cuts; when that has changed it sends the picture itself, and learns."""
    publish(api.floor.store, "eel")
    picture, sent = file(noise(60, 40), "PNG"), bodies(monkeypatch)
    with Client(api.url, client_resize=True) as client:
        client.predict("eel", picture)
        publish(api.floor.store, "eel", 5, preprocess=replace(MANIFEST.preprocess, crop_mode="center", crop_pct=0.5))
        answer = client.predict("eel", picture)
        assert answer == client.with_options(client_resize=False).predict("eel", picture)
        client.predict_many(["eel"], picture)
        assert sent == [NPY, NPY, "image/png", "image/png", NPY]
        publish(api.floor.store, "eel", 6)
        many = client.predict_many(["eel"], picture)
        assert many["eel"].version == api.floor.store.aliases("eel")["live"].targets[0].version
        both = client.predict_many(["eel", "fish"], picture)
        assert set(both.answers) == {"eel", "fish"}


def test_what_is_not_there_is_told_as_ever(api: Api) -> None:
    with Client(api.url) as client:
        for ref in ("nobody", "fish@nobody", "fish@" + "0" * 64, "UPPER"):
            told = []
            for one in (client, client.with_options(client_resize=True)):
                with pytest.raises(LensrackError) as caught:
                    one.predict(ref, png())
                told.append((type(caught.value), getattr(caught.value, "code", "")))
            assert told[0] == told[1]


def test_without_pillow_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'lensrack\[resize\]'"):
        Client("http://rack", client_resize=True)


def test_a_folder_of_paths(api: Api, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(file(noise(30, 30), "JPEG"))
    with Client(api.url, client_resize=True) as client:
        assert len(list(client.map("fish", sorted(tmp_path.iterdir())))) == 3
