"""The pooling that a task's head reads, where its bundle names one: the only path from a method's parameters to a lens.

Methods do not know of it. With `image_and_prompts`, as in the official VPT and SPT code for MAE (`KMnP/vpt`,
vit_mae.py: the mean over all tokens but the class token), the last layer's prompts enter the last block as tokens
instead of keys and values; all layers before it stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from server.engine.backbone import Backbone
from server.engine.lens import Lens
from server.engine.spec import Pool, Spec
from server.errors import Unprocessable

from .method import Method, Params


def unsupported_pool(spec: Spec, pool: Pool | None) -> str | None:
    """Return why no head can read this backbone with `pool`; None if it can."""
    if pool == "cls" and not spec.class_tokens:
        return f"pool 'cls' reads the class token, backbone {spec.arch} has none: expected 'image'"
    return None


def lower_with_pool(
    method: Method, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...], pool: Pool | None
) -> Lens:
    """As `Method.lower`, for a head that reads `pool`; None for the backbone's own. Raises Unprocessable
    (invalid_request)."""
    lens = method.lower(backbone, params, prompt_lengths)
    if pool is None:
        return lens
    if lens.reads_from is not None:
        raise Unprocessable(f"pool {pool!r}: method {method.name} reads with a class token of its own")
    if pool == "image_and_prompts":
        lens = _with_prompts_carried(method, lens, params)
        pool = pool if lens.tokens.shape[-2] else "image"
    return replace(lens, reads=False, pool=None if pool == backbone.spec.pool else pool)


def _with_prompts_carried(method: Method, lens: Lens, params: Params) -> Lens:
    """Carry the last layer's prompts as tokens. Raises Unprocessable (invalid_request) if the parameters do not show
    which they are."""
    count = lens.prefix_lengths[-1]
    if count == 0:
        return lens
    if "prompts" not in params or lens.tokens.shape[-2]:
        raise Unprocessable(
            f"pool 'image_and_prompts': method {method.name} does not say which prompts are its last layer's"
        )
    none = lens.keys[-1][..., :0, :]
    return replace(
        lens,
        keys=(*lens.keys[:-1], none),
        values=(*lens.values[:-1], none),
        tokens=params["prompts"][..., -count:, :],
        enters=len(lens.keys) - 1,
    )
