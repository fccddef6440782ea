"""Every ViT architecture that timm lists: which of them can be a backbone, and why the others cannot.

Each is built without weights on the meta device, one block deep, and checked by `compatibility.incompatibility`;
nothing is downloaded. All blocks of one timm model have the same structure.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import timm
import torch

from .compatibility import incompatibility

PREFIXES: Final = ("vit_*", "deit*")
# The words of a name that give size and resolution; the others are the family.
_SIZE: Final = re.compile(
    r"\d+|patch\d+|so\d+m\d?|\d+b|[sr]\d+|p\d+|tiny|xsmall|small|medium|base|betwixt|large|huge|giant|giantopt|gigantic"
    r"|plus|wee|little|resnet\d+d|r"
)
_HYBRID: Final = re.compile(r"_(r\d*|resnet\d+d)_")


@dataclass(frozen=True)
class Architecture:
    """A timm architecture. `incompatibility`: why it cannot be served, None if it can."""

    name: str
    family: str
    incompatibility: str | None


def architectures(patterns: Iterable[str] = PREFIXES) -> Iterator[Architecture]:
    """Yield all timm architectures that match one of `patterns`, ordered by name."""
    for name in sorted({name for pattern in patterns for name in timm.list_models(pattern)}):
        yield Architecture(name, family(name), _incompatibility(name))


def family(name: str) -> str:
    """`vit_base_patch14_reg4_dinov2` → `vit reg dinov2`."""
    first, *words = name.split("_")
    kept = [re.sub(r"^reg\d+$", "reg", word) for word in words if not _SIZE.fullmatch(word)]
    return " ".join([first, *(["hybrid"] if _HYBRID.search(name) else []), *kept])


def table(items: Iterable[Architecture]) -> str:
    """A Markdown table: per family the number that are served, an example, and why the others are not."""
    rows = ["| family | served | for example | not served | because of |", "| --- | ---: | --- | ---: | --- |"]
    for name, group in groupby(sorted(items, key=lambda a: (a.family, a.name)), key=lambda a: a.family):
        members = list(group)
        served = [member.name for member in members if member.incompatibility is None]
        reasons = sorted({member.incompatibility for member in members if member.incompatibility is not None})
        example = f"`{served[0]}`" if served else ""
        because = "; ".join(f"`{reason}`" for reason in reasons)
        rows.append(f"| {name} | {len(served)} | {example} | {len(members) - len(served)} | {because} |")
    return "\n".join(rows) + "\n"


def _incompatibility(name: str) -> str | None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # deprecated names
        try:
            model = timm.create_model(name, num_classes=0, depth=1)
        except AssertionError:  # its options list one entry per block: build it at full depth
            model = timm.create_model(name, num_classes=0)
    return incompatibility(model)
