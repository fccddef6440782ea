"""Readers of the trunk (ours; the idea of read-only prompts: Lee et al., ICCV 2023, applied to serving).

A copy of the class token reads the frozen backbone's keys and values at every layer, together with the layer's prompts;
no image token sees any of it. So the trunk is the plain frozen ViT: many tasks on one picture cost one pass and one
token each, and fitting needs no gradient through the trunk, whose keys and values are the same in every epoch.

All parameters act on one token, so more than prompts costs hardly anything: low-rank changes of its queries, which
decide what it reads, and rows in the MLP that it alone passes, which decide what it makes of that. Both exist in the
layers that have prompts. docs/results/readonly.md reports what helped and what did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from server.engine.additions import Additions, LowRank
from server.engine.backbone import Backbone
from server.engine.lens import Lens
from server.engine.spec import Spec

from .method import Params, Shapes, head_init, head_shapes, prompt_init, rows_init
from .vpt_deep import projected

RANK = 8  # of the change of each layer's queries
ROWS = 8  # of each layer's memory


class Readonly:
    name: ClassVar[str] = "readonly"
    meaning: ClassVar[str] = "its own class token reads the shared trunk: many tasks on one picture, quick to fit"
    defaults: ClassVar[Mapping[str, object]] = {"prompts": 10, "lr": 3e-3, "epochs": 20}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = (
        {"lr": 3e-3},
        {"lr": 1e-3},
        {"lr": 1e-2},
    )

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (prompts,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        rank, rows = (sum(_where_prompts(prompt_lengths, each)) for each in (RANK, ROWS))
        return {
            "prompts": (sum(prompt_lengths), spec.dim),
            "query.down": (rank, spec.dim),
            "query.up": (rank, spec.dim),
            "memory.keys": (rows, spec.dim),
            "memory.values": (rows, spec.dim),
            **head_shapes(spec, classes),
        }

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        """The class token unchanged, except for the prompts."""
        rank, rows = (sum(_where_prompts(prompt_lengths, each)) for each in (RANK, ROWS))
        return {
            "prompts": prompt_init(spec, sum(prompt_lengths), generator),
            "query.down": rows_init(spec, rank, generator),
            "query.up": torch.zeros(rank, spec.dim),
            "memory.keys": rows_init(spec, rows, generator),
            "memory.values": torch.zeros(rows, spec.dim),
            **head_init(spec, classes, generator),
        }

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        keys, values = projected(backbone, params["prompts"], prompt_lengths)
        return Lens(
            keys=keys,
            values=values,
            tokens=params["head.weight"].new_empty(0, backbone.spec.dim),
            head_weight=params["head.weight"],
            head_bias=params["head.bias"],
            additions=_additions(params, prompt_lengths),
            reads=True,
        )


def _where_prompts(prompt_lengths: Sequence[int], count: int) -> list[int]:
    """`count` for each layer that has prompts, 0 for others."""
    return [count if length else 0 for length in prompt_lengths]


def _additions(params: Params, prompt_lengths: Sequence[int]) -> tuple[Additions | None, ...]:
    ranks, rows = _where_prompts(prompt_lengths, RANK), _where_prompts(prompt_lengths, ROWS)
    query = zip(*(params[f"query.{name}"].split(ranks) for name in ("down", "up")), strict=True)
    memory = zip(*(params[f"memory.{name}"].split(rows) for name in ("keys", "values")), strict=True)
    return tuple(
        Additions(query=LowRank(*low_rank), beside=LowRank(*beside)) if length else None
        for length, low_rank, beside in zip(prompt_lengths, query, memory, strict=True)
    )
