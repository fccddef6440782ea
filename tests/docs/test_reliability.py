"""Every promise on the page of promises names tests, and every test that it names exists, with the case in brackets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "reliability.md"
FIELD = PAGE.with_name("field-cases.md")
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?(?:\[([^`]+)\])?`")


def rows() -> list[str]:
    """The rows of its tables, without their headings."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith("| ") and not line.endswith("| tests |")]
    assert len(found) > 70
    return found


def test_every_promise_names_tests() -> None:
    for row in rows():
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert NAMED.search(cells[-1]), row
        rest = NAMED.sub("", cells[-1])
        assert not rest.strip(", "), f"not the name of a test: {rest}"


@pytest.mark.parametrize("page", [PAGE, FIELD], ids=lambda page: page.stem)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for file, name, case in NAMED.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^ *(async )?def {name}\(", source, re.MULTILINE), f"{file}::{name}"
        assert not case or f'"{case}"' in source, f"{file}: {case}"


def test_what_takes_long_is_marked_and_nothing_else() -> None:
    """⏱ stands beside tests that `make test` leaves out."""
    for row in rows():
        tests = [(file, name) for file, name, _ in NAMED.findall(row) if name]
        long = [name for file, name in tests if _is_long(ROOT / file, name)]
        assert bool(long) <= ("⏱" in row), row
        assert "⏱" not in row or long or "of twelve" in row, row


def _is_long(file: Path, name: str) -> bool:
    before = file.read_text(encoding="utf-8").split(f"def {name}(")[0]
    decorators = before[before.rfind("\n\n") :]
    return "@pytest.mark.long\n" in decorators
