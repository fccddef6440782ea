"""Pixels that a client has cut itself: the same answers as from its pictures, and every wrong array refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from lensrack import wire
from server.api import raw_pixels
from server.errors import ServiceError
from tests.api.api_server import Api, assert_problem, serving
from tests.serving.floor import SIZE, png, publish

NPY = {"content-type": raw_pixels.NPY}
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), max_images=4) as api:
        publish(api.floor.store)
        yield api


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def grey(*levels: int, side: int = SIZE) -> np.ndarray:
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def ask(api: Api, body: bytes, path: str = "/predict/fish", **headers: str) -> httpx.Response:
    return api.http.post(path, content=body, headers={**NPY, **headers})


def predictions(response: httpx.Response) -> list[list[dict[str, object]]]:
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def of_pictures(api: Api, *levels: int) -> list[list[dict[str, object]]]:
    files = [("images", (str(level), png(level), "image/png")) for level in levels]
    return predictions(api.http.post("/predict/fish", files=files))


def test_a_batch_of_pixels_answers_as_its_pictures_do(api: Api):
    assert predictions(ask(api, npy(grey(6, 7, 8)))) == of_pictures(api, 6, 7, 8)


def test_one_picture_needs_no_batch_axis(api: Api):
    assert predictions(ask(api, npy(grey(7)[0]))) == of_pictures(api, 7)


def test_pixels_and_pictures_travel_in_one_form(api: Api):
    files = [
        ("images", ("a", npy(grey(6)[0]), raw_pixels.NPY)),
        ("images", ("b", png(7), "image/png")),
        ("images", ("c", npy(grey(8)), raw_pixels.NPY)),
    ]
    assert predictions(api.http.post("/predict/fish", files=files)) == of_pictures(api, 6, 7, 8)


def test_features_and_many_tasks_take_pixels(api: Api):
    body = npy(grey(7))
    told = api.http.post("/predict?task=fish", content=body, headers=NPY).json()["results"]["fish"]["predictions"]
    assert told == of_pictures(api, 7)
    from_picture = api.http.post("/embed", content=png(7), headers={"content-type": "image/png"}).json()
    assert api.http.post("/embed", content=body, headers=NPY).json() == from_picture


def test_pixels_that_were_cut_otherwise_are_refused_and_told_how(api: Api):
    ours = wire.Geometry(size=SIZE, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
    body = npy(grey(7))
    assert predictions(ask(api, body, **{wire.GEOMETRY_HEADER: ours.header})) == of_pictures(api, 7)
    for change in ({"size": 9}, {"interpolation": "bilinear"}, {"crop_pct": 0.9}, {"crop_mode": "center"}):
        other = ours.model_copy(update=change)
        answer = ask(api, body, **{wire.GEOMETRY_HEADER: other.header})
        problem = assert_problem(answer, 409, "geometry_differs")
        assert wire.Geometry.model_validate(problem["geometry"]) == ours
    many = api.http.post("/predict?task=fish&task=none", content=npy(grey(7, side=9)), headers=NPY)
    assert_problem(many, 422, "bad_pixels")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (grey(7, side=SIZE + 1), r"size, \[8, 8, 3\], got \[9, 9, 3\]"),
        (grey(1, 2, 3, 4, 5), r"n from 1 to 4, got \[5, 8, 8, 3\]"),
        (np.zeros((0, SIZE, SIZE, 3), np.uint8), r"got \[0, 8, 8, 3\]"),
        (np.zeros((1, SIZE, SIZE, 4), np.uint8), r"got \[1, 8, 8, 4\]"),
        (np.zeros((1, SIZE, 2 * SIZE, 3), np.uint8), r"got \[1, 8, 16, 3\]"),
        (np.zeros((SIZE, SIZE), np.uint8), r"got \[8, 8\]"),
        (np.zeros((1, SIZE, SIZE, 3), np.float32), "expected a uint8 array in C order, got '<f4'"),
        (np.asfortranarray(grey(1, 2)), "C order"),
    ],
)
def test_arrays_of_another_kind(api: Api, array: np.ndarray, says: str):
    problem = assert_problem(ask(api, npy(array)), 422, "bad_pixels")
    assert re.search(says, problem["detail"]), problem["detail"]


@pytest.mark.parametrize(
    "claim", ["", "size=8", "size=0; interpolation=bicubic; crop_pct=1; crop_mode=squash", "x" * 999]
)
def test_claims_that_say_nothing(api: Api, claim: str):
    assert_problem(ask(api, npy(grey(7)), **{wire.GEOMETRY_HEADER: claim}), 422, "bad_pixels")


def test_nothing_is_unpickled(api: Api):
    """An array of Python objects, whose bytes are a pickle."""
    assert_problem(ask(api, npy(np.array([print], object))), 422, "bad_pixels")


@pytest.mark.parametrize(
    "body",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x09\x00\x02\x00{}",
        npy(grey(7))[:-1],
        npy(grey(7)) + b"!",
        npy(grey(7)).replace(b"'descr'", b"'DESCR'"),
        npy(grey(7)).replace(b"'shape'", b"'descr'"),
        b"PK\x03\x04",
    ],
)
def test_damaged_files(api: Api, body: bytes):
    assert_problem(ask(api, body), 400, "bad_image")
    assert_problem(ask(api, b""), 400, "bad_image")


def test_where_pictures_are_kept_pixels_are_none(api: Api):
    """Feedback keeps files, which pixels are not."""
    answer = api.http.post("/tasks/fish/feedback?label=a", content=npy(grey(7)), headers=NPY)
    assert_problem(answer, 415, "unsupported_media_type")


@given(st.binary(max_size=300), st.integers(0, 200), st.integers(0, 300))
def test_whatever_comes_is_read_or_refused(noise: bytes, start: int, cut: int):
    """Any bytes in place of any part of a file: images or a ServiceError, nothing else."""
    whole = npy(grey(1, 2, side=4))
    body = whole[:start] + noise + whole[start + cut :]
    try:
        found, code = raw_pixels.read(body, Headers({}), most=8), ""
    except ServiceError as error:
        found, code = [], error.code
    assert code in {"", "bad_image", "bad_pixels"}
    assert all(one.pixels.shape[2] == 3 for one in found)


@given(
    st.integers(1, 4096),
    st.sampled_from(["nearest", "bicubic"]),
    st.floats(1e-3, 10, allow_nan=False),
    st.sampled_from(["center", "squash", "border"]),
    st.tuples(*[st.floats(-1, 2)] * 3),
)
def test_a_geometry_survives_its_header(size: int, how: str, pct: float, mode: str, mean: tuple[float, ...]):
    preprocess = {"size": size, "interpolation": how, "crop_pct": pct, "crop_mode": mode, "mean": list(mean)}
    told = wire.Geometry.of(json.loads(json.dumps(preprocess)))
    assert wire.Geometry.parse(told.header) == told


def test_the_server_and_the_wire_fill_borders_alike(tmp_path: Path):
    from server.engine.images.decode import Geometry

    for mean in RNG.uniform(0, 1, (50, 3)).tolist():
        preprocess = {"size": 8, "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border", "mean": mean}
        ours = Geometry.of(8, "bicubic", 0.9, "border", tuple(mean))
        assert (
            raw_pixels.declared_geometry(Headers({wire.GEOMETRY_HEADER: wire.Geometry.of(preprocess).header})) == ours
        )
