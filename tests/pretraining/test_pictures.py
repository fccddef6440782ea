"""Drawings and views: the same number is the same picture, whatever was asked for before; and no two are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.pretraining import photos
from server.pretraining.drawings import SIDE, Drawings
from server.pretraining.views import Views


@pytest.fixture(scope="module")
def shipped() -> list[Image.Image]:
    return photos.load()


def test_photographs_come_with_the_packages_and_some_are_kept_back(shipped: list[Image.Image]) -> None:
    kept_back = photos.load(held_out=True)
    assert len(shipped) >= 15
    assert len(kept_back) == len(photos.HELD_OUT)
    everything = {image.tobytes() for image in (*shipped, *kept_back)}
    assert len(everything) == len(shipped) + len(kept_back)
    assert all(image.mode == "RGB" and max(image.size) <= photos.LONG_SIDE for image in shipped)


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (40, 30), (number * 20, 0, 0)).save(tmp_path / f"{number:02d}.png")
    assert len(photos.load(tmp_path)) == 10
    assert len(photos.load(tmp_path, held_out=True)) == 2


def test_a_folder_without_photographs_says_so(tmp_path: Path) -> None:
    with pytest.raises(photos.NoPhotos, match=r"expected photographs in .*found 0"):
        photos.load(tmp_path)


@pytest.mark.parametrize("number", range(10))
def test_a_drawing_is_known_by_its_number(number: int, shipped: list[Image.Image]) -> None:
    first, second = Drawings(shipped, seed=3), Drawings(shipped, seed=3)
    second.draw(number + 5)
    drawn = first.draw(number)
    assert drawn.size == (SIDE, SIDE)
    assert drawn.mode == "RGB"
    assert drawn.tobytes() == second.draw(number).tobytes()
    assert drawn.tobytes() != first.draw(number + 5).tobytes()  # the next of its kind
    assert drawn.tobytes() != Drawings(shipped, seed=4).draw(number).tobytes()


def test_drawings_need_no_photographs() -> None:
    assert np.asarray(Drawings([], seed=0).draw(3)).std() > 5


def test_a_view_is_known_by_its_number(shipped: list[Image.Image]) -> None:
    views = Views(shipped, seed=0)
    batch = views.batch(10, 6, 64)
    assert batch.shape == (6, 64, 64, 3)
    assert batch.dtype == np.uint8
    assert np.array_equal(batch[2], Views(shipped, seed=0).view(12, 64))
    assert len({first.tobytes() for first in batch}) == 6


def test_views_are_of_all_kinds_of_light(shipped: list[Image.Image]) -> None:
    batch = Views(shipped, seed=0).batch(0, 64, 32).astype(np.float64)
    assert 80 < batch.mean() < 175
    assert batch.mean((1, 2, 3)).std() > 25
    assert batch.std() > 45
