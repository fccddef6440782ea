"""Bytes that nobody thought of, for everything that reads a stranger's bytes; and those that once broke something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.api_server import Api, serving
from tests.fuzz.budget import EXAMPLES, large
from tests.fuzz.readers import READERS, Reader
from tests.serving.floor import png, publish

REGRESSIONS = sorted((Path(__file__).resolve().parents[1] / "security" / "regressions").glob("*/*"))
TRIED = settings(
    max_examples=20 * EXAMPLES, deadline=None, derandomize=not large(), suppress_health_check=list(HealthCheck)
)


def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds, changed in a few places: numbers to their extremes, bytes put in, cut out, copied."""
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        length = draw(st.sampled_from([0, 0, 1, 2, 4, 8, 64]))
        new = draw(st.sampled_from([b"\0", b"\xff", b"\xff" * 4, b"\x7f" * 8, b"9" * 30]) | st.binary(max_size=8))
        raw[at : at + length] = raw[at : at + 64] * 2 if new == b"9" * 30 else new
    return bytes(raw[: draw(st.integers(0, len(raw)))]) if draw(st.booleans()) else bytes(raw)


changed = st.composite(mutated)


@pytest.mark.parametrize("name", READERS)
def test_good_inputs_are_read(name: str) -> None:
    """Else everything below would be refused at its first byte."""
    for seed in READERS[name].seeds():
        READERS[name].read(seed)


@pytest.mark.parametrize("name", READERS)
def test_changed_inputs(name: str) -> None:
    reader: Reader = READERS[name]

    @TRIED
    @given(changed(reader.seeds()) | st.binary(max_size=200))
    def survives(data: bytes) -> None:
        reader.survives(data)

    survives()


@pytest.mark.parametrize("file", REGRESSIONS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_once_broke_something(file: Path) -> None:
    READERS[file.parent.name].survives(file.read_bytes())


# --- forms, which the framework reads ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as made:
        publish(made.floor.store)
        yield made


PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
FORM = PART + png() + b"\r\n" + PART + png(9) + b"\r\n--x--\r\n"


def test_changed_forms(api: Api) -> None:
    kinds = ["multipart/form-data; boundary=x", 'multipart/form-data; boundary="x"', "multipart/form-data; charset=x"]

    @TRIED
    @given(changed([FORM, FORM[:-4], b"--x--"]), st.sampled_from(kinds))
    def is_answered(body: bytes, kind: str) -> None:
        answer: httpx.Response = api.http.post("/predict/fish", content=body, headers={"content-type": kind})
        assert answer.status_code < 500, answer.text

    is_answered()
