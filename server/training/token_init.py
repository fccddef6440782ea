"""Prompts that begin as tokens of the task's own pictures (SPT: Wang et al., Revisiting the Power of Prompt for Visual
Tuning, ICML 2024, section 3).

    pictures ──► patch embeddings, without position ───────► the first layer's prompts
        └──────► the plain backbone, block by block ───────► what enters block l, patches only ─► layer l's prompts

`tokens`          random ones of them: what the official code does, and in the paper as good as the rest
`tokens_mean`     means of equal parts of them; pictures stand in the order of their classes, so a part shows one class,
                  or a few
`tokens_kmeans`   centres of clusters (Lloyd's algorithm, k-means++ seeding)

A few hundred pictures, each class its share, and a few thousand tokens a layer are looked at: seconds, where the paper
clusters all tokens of all pictures for days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Final

import numpy as np
import torch
from torch import Tensor

from server.engine.lens import Plain
from server.engine.spec import Spec
from server.errors import Unprocessable
from server.methods.method import Method

from .co_batching import Fitting, ForwardRequest
from .data import LabelledImages, sample
from .frozen import FrozenFeatures, in_order

MOST_PICTURES: Final = 256
MOST_TOKENS: Final = 8192  # of a layer
MOST_ROUNDS: Final = 25  # of Lloyd's algorithm


def has_prompts(method: Method, spec: Spec) -> bool:
    """Whether it learns prompts as rows [Σp, D] of their own, layer by layer: what can begin as tokens, and be cut."""
    lengths = method.prompt_lengths(spec, 2)
    return method.shapes(spec, lengths, 2).get("prompts") == (sum(lengths), spec.dim)


def refuse_without_prompts(method: Method, spec: Spec, asked: str) -> None:
    """Raises Unprocessable (invalid_request) where what is `asked` for needs prompts and the method has none."""
    if not has_prompts(method, spec):
        raise Unprocessable(f"{asked}: expected a method with prompts, got {method.name}, which has none")


def pictures_for(pictures: LabelledImages, seed: int) -> LabelledImages:
    """Those that tokens are taken from, in the order of their classes."""
    own = sample(pictures, MOST_PICTURES, seed)
    own = own if len(own) else pictures.take(np.arange(MOST_PICTURES))  # of many classes with one picture each
    return own.take(np.argsort(own.targets, kind="stable"))


def token_prompts(
    frozen: FrozenFeatures,
    pictures: LabelledImages,
    lengths: Sequence[int],
    how: str,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Fitting[Tensor]:
    """Prompts [Σp, D] in float32 on the CPU, `lengths` of each layer. `tick` is called after a batch of pictures."""
    found = yield from layer_tokens(frozen, pictures, lengths, generator=generator, tick=tick)
    return torch.cat([CHOICES[how](found[layer], count, generator) for layer, count in enumerate(lengths) if count])


def layer_tokens(
    frozen: FrozenFeatures,
    pictures: LabelledImages,
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Fitting[dict[int, Tensor]]:
    """Of each layer with prompts, tokens [n, D] that enter it: equally many of each picture, in the pictures' order."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer, count in enumerate(lengths) if count}
    each = -(-MOST_TOKENS // len(pictures))
    with closing(in_order(pictures.images)) as batches:
        for pixels in batches:
            if 0 in kept:
                kept[0].append(_some(frozen.patches(pixels), each, generator))
            x, at = frozen.embedded(pixels), 0
            for layer in sorted(kept.keys() - {0}):
                x, at = (yield ForwardRequest(x, Plain(), start=at, until=layer)), layer
                kept[layer].append(_some(x[:, frozen.spec.prefix_tokens :], each, generator))
            tick()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def _some(tokens: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """`each` of a picture's tokens at random places, all of them where they are fewer: [B, N, D] → [B·each, D]."""
    tokens = tokens.detach().float().cpu()
    places = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[:, :each]
    return tokens[torch.arange(len(tokens))[:, None], places].flatten(0, 1)


# --- from tokens [n, D] to `count` prompts [count, D] -----------------------------------------------------------------


def drawn(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random ones; the same one again only where there are fewer."""
    rounds = -(-count // len(tokens))
    order = [torch.randperm(len(tokens), generator=generator) for _ in range(rounds)]
    return tokens[torch.cat(order)[:count]].clone()


def means(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means of `count` equal parts, in the order of the tokens."""
    if len(tokens) < count:
        return drawn(tokens, count, generator)
    return torch.stack([part.mean(0) for part in tokens.tensor_split(count)])


def centres(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means, to its end or `MOST_ROUNDS`; a cluster that falls empty keeps its centre."""
    found, before = _spread(tokens, count, generator), None
    for _ in range(MOST_ROUNDS):
        nearest = _nearest(tokens, found)
        if before is not None and torch.equal(nearest, before):
            break
        member = torch.nn.functional.one_hot(nearest, count).to(tokens.dtype)  # [n, count]
        size = member.sum(0)[:, None]
        found = torch.where(size > 0, member.T @ tokens / size.clamp(min=1), found)
        before = nearest
    return found


def _spread(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens to begin with, each drawn by its squared distance from those before it (k-means++: Arthur & Vassilvitskii,
    SODA 2007): random ones may leave two clusters to one centre."""
    found = drawn(tokens, 1, generator)
    distance = (tokens - found).square().sum(1)
    while len(found) < count:
        weights = distance if distance.any() else torch.ones_like(distance)
        another = tokens[torch.multinomial(weights, 1, generator=generator)]
        found = torch.cat((found, another))
        distance = torch.minimum(distance, (tokens - another).square().sum(1))
    return found


def _nearest(tokens: Tensor, centre: Tensor) -> Tensor:
    """The nearest centre of each token [n]; |t|² is the same for all and left out."""
    return (centre.square().sum(1) - 2 * tokens @ centre.T).argmin(1)


Choice = Callable[[Tensor, int, torch.Generator], Tensor]
CHOICES: Final[Mapping[str, Choice]] = {"tokens": drawn, "tokens_mean": means, "tokens_kmeans": centres}
