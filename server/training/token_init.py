"""Initial prompts that are tokens of the task's own pictures (SPT: Wang et al., Revisiting the Power of Prompt for
Visual Tuning, ICML 2024, section 3).

    pictures ──► patch embeddings, without position ───────► the first layer's prompts
        └──────► the plain backbone, block by block ───────► patch tokens that enter block l ─► layer l's prompts

`tokens`          random tokens: as the official code; in the paper as good as the others
`tokens_mean`     means of equal parts of the tokens; pictures are sorted by class, so a part shows one class, or a few
`tokens_kmeans`   centres of clusters (Lloyd's algorithm, k-means++ seeding)

A few hundred pictures, sampled by class, and a few thousand tokens a layer are used, which takes seconds; the paper
clusters all tokens of all pictures, which takes days.
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
    """Whether the method's prompts are rows [Σp, D] of one parameter: only these can be initialised from tokens, and
    condensed."""
    lengths = method.prompt_lengths(spec, 2)
    return method.shapes(spec, lengths, 2).get("prompts") == (sum(lengths), spec.dim)


def require_prompts(method: Method, spec: Spec, field: str) -> None:
    """Raises Unprocessable (invalid_request) for a method without prompts. `field`: what needs them in the recipe."""
    if not has_prompts(method, spec):
        raise Unprocessable(f"{field}: expected a method with prompts, got {method.name}, which has none")


def pictures_for(pictures: LabelledImages, seed: int) -> LabelledImages:
    """The pictures that tokens are taken from, sorted by class."""
    sampled = sample(pictures, MOST_PICTURES, seed)
    if not len(sampled):  # many classes with one picture each
        sampled = pictures.take(np.arange(MOST_PICTURES))
    return sampled.take(np.argsort(sampled.targets, kind="stable"))


def token_prompts(
    frozen: FrozenFeatures,
    pictures: LabelledImages,
    lengths: Sequence[int],
    how: str,
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Fitting[Tensor]:
    """Prompts [Σp, D] in float32 on the CPU, `lengths` of each layer. `tick` is called after every batch."""
    tokens = yield from layer_tokens(frozen, pictures, lengths, generator=generator, tick=tick)
    return torch.cat([CHOICES[how](tokens[layer], count, generator) for layer, count in enumerate(lengths) if count])


def layer_tokens(
    frozen: FrozenFeatures,
    pictures: LabelledImages,
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> Fitting[dict[int, Tensor]]:
    """For each layer with prompts, tokens [n, D] that enter it: equally many per picture, in the pictures' order."""
    sampled: dict[int, list[Tensor]] = {layer: [] for layer, count in enumerate(lengths) if count}
    count = -(-MOST_TOKENS // len(pictures))
    with closing(in_order(pictures.images)) as batches:
        for pixels in batches:
            if 0 in sampled:
                sampled[0].append(_sampled(frozen.patches(pixels), count, generator))
            x, at = frozen.embedded(pixels), 0
            for layer in sorted(sampled.keys() - {0}):
                x, at = (yield ForwardRequest(x, Plain(), start=at, until=layer)), layer
                sampled[layer].append(_sampled(x[:, frozen.spec.prefix_tokens :], count, generator))
            tick()
    return {layer: torch.cat(parts) for layer, parts in sampled.items()}


def _sampled(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random tokens of each picture, or all where it has fewer: [B, N, D] → [B·count, D]."""
    tokens = tokens.detach().float().cpu()
    places = torch.rand(tokens.shape[:2], generator=generator).argsort(1)[:, :count]
    return tokens[torch.arange(len(tokens))[:, None], places].flatten(0, 1)


# --- from tokens [n, D] to `count` prompts [count, D] -----------------------------------------------------------------


def drawn(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random tokens, without repetition where there are enough."""
    rounds = -(-count // len(tokens))
    order = [torch.randperm(len(tokens), generator=generator) for _ in range(rounds)]
    return tokens[torch.cat(order)[:count]].clone()


def means(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means of `count` equal parts, in the order of the tokens."""
    if len(tokens) < count:
        return drawn(tokens, count, generator)
    return torch.stack([part.mean(0) for part in tokens.tensor_split(count)])


def centres(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The centres of Lloyd's k-means, at convergence or after `MOST_ROUNDS`. An empty cluster keeps its centre."""
    centre, before = _initial_centres(tokens, count, generator), None
    for _ in range(MOST_ROUNDS):
        nearest = _nearest(tokens, centre)
        if before is not None and torch.equal(nearest, before):
            break
        member = torch.nn.functional.one_hot(nearest, count).to(tokens.dtype)  # [n, count]
        size = member.sum(0)[:, None]
        centre = torch.where(size > 0, member.T @ tokens / size.clamp(min=1), centre)
        before = nearest
    return centre


def _initial_centres(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn with a probability proportional to the squared distance from those before (k-means++: Arthur &
    Vassilvitskii, SODA 2007): with uniformly drawn ones, two clusters may share a centre."""
    centre = drawn(tokens, 1, generator)
    distance = (tokens - centre).square().sum(1)
    while len(centre) < count:
        weights = distance if distance.any() else torch.ones_like(distance)
        another = tokens[torch.multinomial(weights, 1, generator=generator)]
        centre = torch.cat((centre, another))
        distance = torch.minimum(distance, (tokens - another).square().sum(1))
    return centre


def _nearest(tokens: Tensor, centre: Tensor) -> Tensor:
    """The index of the nearest centre of each token [n]; |t|² is the same for all centres and left out."""
    return (centre.square().sum(1) - 2 * tokens @ centre.T).argmin(1)


Choice = Callable[[Tensor, int, torch.Generator], Tensor]
CHOICES: Final[Mapping[str, Choice]] = {"tokens": drawn, "tokens_mean": means, "tokens_kmeans": centres}
