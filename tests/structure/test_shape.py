"""The tree keeps its shape: few loose files, no import cycle, a sentence for each package, tests one can read."""

from __future__ import annotations

import pytest

from tests.structure.shape import ROOT, Shape

LOOSE = {"__init__.py", "__main__.py", "clock.py", "errors.py", "settings.py"}
MOST_LINES_OF_A_TEST = 600


@pytest.fixture(scope="module")
def shape() -> Shape:
    return Shape()


def test_every_file_of_the_server_has_a_room(shape: Shape) -> None:
    assert set(shape.loose) == LOOSE, "a new file belongs into a room of server/: see docs/architecture/00-overview.md"


def test_no_modules_import_each_other_in_a_ring(shape: Shape) -> None:
    assert shape.cycles == []


def test_a_ring_is_seen() -> None:
    shape = Shape()
    shape.imports = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}
    shape.modules = dict.fromkeys(shape.imports)  # type: ignore[arg-type]
    assert shape.cycles == [["b", "c"]]


def test_every_package_says_what_it_is(shape: Shape) -> None:
    assert shape.unexplained == []


def test_no_test_file_is_too_long_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "tests").rglob("*.py")
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MOST_LINES_OF_A_TEST
    }
    assert long == {}
