"""The sample pictures: the same bytes from the same seed, and classes that coarse colour alone tells apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.cli.sample_pictures import SETS, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("samples")
    draw(target)
    return target


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.png"))
    }


def test_the_same_seed_draws_the_same_pictures_and_no_two_are_alike(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "again", per_class=3)
    draw(tmp_path / "other", per_class=3, seed=1)
    again, other = digests(tmp_path / "again"), digests(tmp_path / "other")
    first = digests(folder)
    assert all(first[name] == digest for name, digest in again.items())
    assert not set(again.values()) & set(other.values())
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("name", SETS)
def test_class_folders_as_the_upload_wants_them(folder: Path, name: str) -> None:
    for split, count in (("train", 24), ("test", 8)):
        found = {path.name: len(list(path.iterdir())) for path in (folder / name / split).iterdir()}
        assert found == dict.fromkeys(SETS[name], count)


@pytest.mark.parametrize("name", SETS)
def test_coarse_colour_tells_the_classes_apart(folder: Path, name: str) -> None:
    """So that even a network with random weights learns them, and the tour shows right answers."""

    def thumbnails(split: str) -> tuple[np.ndarray, np.ndarray]:
        files = sorted((folder / name / split).rglob("*.png"))
        pixels = [np.asarray(Image.open(file).resize((8, 8)), np.float64).ravel() for file in files]
        return np.stack(pixels), np.array([file.parent.name for file in files])

    train, labels = thumbnails("train")
    test, truth = thumbnails("test")
    means = {label: train[labels == label].mean(axis=0) for label in set(labels)}
    guess = [min(means, key=lambda label: float(((x - means[label]) ** 2).sum())) for x in test]
    assert np.mean(np.array(guess) == truth) >= 0.9
