"""A comparison as a table and as a picture."""

from __future__ import annotations

import sys
from xml.etree import ElementTree as ET

import pytest

from lensrack import InvalidInput
from lensrack.picture import draw, markdown
from lensrack.wire import ComparedMethod, Comparison

ROWS = [
    ComparedMethod(method="linear", fits=2, test_accuracy=0.8, test_accuracy_std=0.011, parameters=1930,
                   bundle_bytes=9_600, lens_bytes=3_000, forward_cost=1.0, fit_s=2.5, cpu_s=7.0),
    ComparedMethod(method="full", servable=False, fits=2, diverged=1, test_accuracy=0.9, parameters=5_500_000,
                   fit_s=2000),
    ComparedMethod(method="lora", fits=2, diverged=2, fit_s=1.0),
]  # fmt: skip
FOUND = Comparison(task="trash", title="trash & co (6, 360 / 150)", dataset_split="test", rows=ROWS)


def test_the_table_has_a_row_a_method_and_the_best_first() -> None:
    assert markdown(FOUND).splitlines()[2:] == [
        "| full | 90.0 (1 of 2 diverged) | 5,500,000 | – | – | – | 2,000 s | 0 s |",
        "| linear | 80.0 ± 1.1 | 1,930 | 10 kB | 3 kB | × 1.00 | 2 s | 7 s |",
        "| lora | diverged | – | – | – | – | 1 s | 0 s |",
    ]


def test_the_picture_names_every_method_that_has_a_place_and_repeats_itself() -> None:
    picture = draw([FOUND, FOUND])
    said = [text.text for text in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert said.count("full") == said.count("linear") == said.count("trash & co (6, 360 / 150)") == 2
    assert "lora" not in said
    assert said.count("test accuracy, %") == 2
    assert draw([FOUND, FOUND]) == picture


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInput, match=r"lensrack\[plot\]"):
        draw([FOUND])
