"""No lower bound of pyproject.toml lets a version in that is known to be unsafe.

The table is what was known when it was written, by hand, from the advisories; whoever raises a bound for such a reason
adds a line. Bounds keep out what is old, an audit of the image's list (`lensrack.sbom`) finds what is new.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT: Final = Path(__file__).resolve().parents[2]

# name: the first version without it, and the latest of what was wrong before
SAFE_FROM: Final = {
    "httpx": ("0.23.0", "CVE-2021-41945: URLs taken apart wrongly"),
    "numpy": ("1.22", "CVE-2021-41496: buffer overflow"),
    "onnx": ("1.21.0", "CVE-2026-27489, -34445, -34446, -34447: files outside of the model's folder"),
    "pillow": ("12.3.0", "CVE-2026-59197 to -59205: writing beyond the heap, bombs that are not seen"),
    "pyarrow": ("23.0.1", "CVE-2026-25087: use after free; CVE-2023-47248: code in parquet files"),
    "pydantic": ("2.4.0", "CVE-2024-3772: a slow regular expression"),
    "pydantic-settings": ("2.14.2", "GHSA-4xgf-cpjx-pc3j: links out of the folder of secrets"),
    "pytest": ("9.1.1", "CVE-2025-71176: a folder in /tmp that others can guess; a slow regular expression"),
    "python-multipart": ("0.0.31", "CVE-2026-40347, -42561, -53538 to -53540: bodies that take quadratic time"),
    "redis": ("4.5.5", "CVE-2023-28859: one client's answer to another"),
    "scikit-learn": ("1.5.0", "CVE-2024-5206: words of the training data are kept"),
    "starlette": ("1.3.1", "CVE-2026-54282, -54283: limits of forms ignored; CVE-2025-62727: quadratic Range"),
    "torch": ("2.11", "CVE-2026-24747, -4538: code in files of weights"),
    "tqdm": ("4.66.3", "CVE-2024-34062: arguments run as code"),
    "uvicorn": ("0.11.7", "CVE-2020-7695: headers split"),
}


def asked_for() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(each) for group in groups for each in group]


def bound(requirement: Requirement) -> Version:
    (lowest,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    return lowest


@pytest.mark.parametrize("requirement", asked_for(), ids=str)
def test_nothing_is_asked_for_that_is_known_to_be_unsafe(requirement: Requirement) -> None:
    lowest = bound(requirement)
    safe, why = SAFE_FROM.get(requirement.name, ("0", ""))
    assert lowest >= Version(safe), f"{requirement}: {why}"


def test_the_table_names_what_is_asked_for_only() -> None:
    assert set(SAFE_FROM) <= {each.name for each in asked_for()}


def test_the_tests_run_with_what_is_asked_for() -> None:
    """Or the bounds would be wishes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["server"]):
        requirement = Requirement(text)
        assert version(requirement.name) in requirement.specifier, text
