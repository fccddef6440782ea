"""Every ViT architecture that timm lists: which of them can be a backbone, and what keeps the others from it.

Each is built without weights on the meta device, one block deep, and looked at by `plain.refusal`; nothing is
downloaded. timm's blocks of one model are all of one kind.
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

from .compatibility import refusal

PREFIXES: Final = ("vit_*", "deit*")
# What a name says of size and resolution; what is left is the family.
_SIZE: Final = re.compile(
    r"\d+|patch\d+|so\d+m\d?|\d+b|[sr]\d+|p\d+|tiny|xsmall|small|medium|base|betwixt|large|huge|giant|giantopt|gigantic"
    r"|plus|wee|little|resnet\d+d|r"
)
_HYBRID: Final = re.compile(r"_(r\d*|resnet\d+d)_")


@dataclass(frozen=True)
class Architecture:
    """`refusal`: why it cannot be served, None where it can."""

    name: str
    family: str
    refusal: str | None


def architectures(patterns: Iterable[str] = PREFIXES) -> Iterator[Architecture]:
    """Of all timm architectures that match one of `patterns`, in order of their names."""
    for name in sorted({name for pattern in patterns for name in timm.list_models(pattern)}):
        yield Architecture(name, family(name), _refusal(name))


def family(name: str) -> str:
    """`vit_base_patch14_reg4_dinov2` → `vit reg dinov2`."""
    first, *words = name.split("_")
    kept = [re.sub(r"^reg\d+$", "reg", word) for word in words if not _SIZE.fullmatch(word)]
    return " ".join([first, *(["hybrid"] if _HYBRID.search(name) else []), *kept])


def table(found: Iterable[Architecture]) -> str:
    """A Markdown table: of each family how many are served and one of them, and why the others are not."""
    rows = ["| family | served | for example | not served | because of |", "| --- | ---: | --- | ---: | --- |"]
    for name, group in groupby(sorted(found, key=lambda one: (one.family, one.name)), key=lambda one: one.family):
        members = list(group)
        served = [one.name for one in members if one.refusal is None]
        reasons = sorted({one.refusal for one in members if one.refusal is not None})
        example = f"`{served[0]}`" if served else ""
        because = "; ".join(f"`{reason}`" for reason in reasons)
        rows.append(f"| {name} | {len(served)} | {example} | {len(members) - len(served)} | {because} |")
    return "\n".join(rows) + "\n"


def _refusal(name: str) -> str | None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # names that timm has given up
        try:
            model = timm.create_model(name, num_classes=0, depth=1)
        except AssertionError:  # a list with an entry a block: whole, then
            model = timm.create_model(name, num_classes=0)
    return refusal(model)
