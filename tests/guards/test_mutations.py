"""The mutations still fit the code; that their tests notice them is `make guards`."""

from __future__ import annotations

from pathlib import Path

from tests.guards.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutation_fits_once_and_names_a_test() -> None:
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.file
        file, _, name = mutation.test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), mutation.test
