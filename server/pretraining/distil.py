"""Distillation: a student learns to turn pictures into the states of a teacher, block by block and as a whole.

Both are plain timm ViTs of one width and depth; the student starts from random weights. Two objectives:

`blocks`  every block of the student gets the teacher's state before it and must produce the teacher's state behind it.
          Twelve small problems at once, each with a target for every token and channel: this converges within
          thousands of pictures where learning from labels takes millions.
`whole`   the student runs by itself. The loss is the error of every state and of the features, that of the class token
          once more, and the divergence between the teacher's classifier on both networks' tokens, which weighs errors
          by their effect.

An error is measured in units of the teacher's own variance in that channel: residual streams have a few channels that
are a hundred times larger than the others and would otherwise dominate the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

OBJECTIVES = ("blocks", "whole")
STATES_WEIGHT = 4.0  # of the mean error of the states: later blocks cannot repair the errors of early ones
CLASS_TOKEN_WEIGHT = 0.25
HEAD_WEIGHT = 0.25


@dataclass(frozen=True)
class Scale:
    """The teacher's variance of each state's channels: depth + 1 tensors [D]; `features`: that of the normed
    features."""

    states: Sequence[Tensor]
    features: Tensor


def pixels(batch: NDArray[np.uint8], model: VisionTransformer, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] → [B, 3, S, S], normalised as in the model's pretraining."""
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    raw = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 255
    return ((raw - mean) / std).contiguous()


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] → the tokens that enter the first block [B, N, D]."""
    tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    return tokens


def states(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The input of the first block and the output of each: depth + 1 tensors [B, N, D]."""
    states = [embed(model, images)]
    for block in model.blocks:
        states.append(block(states[-1]))
    return states


@torch.no_grad()
def scale(teacher: VisionTransformer, images: Tensor) -> Scale:
    teacher_states = states(teacher, images)
    return Scale([_variance(state) for state in teacher_states], _variance(teacher.norm(teacher_states[-1])))


def _variance(state: Tensor) -> Tensor:
    variance = state.float().var(dim=(0, 1))
    return variance + 0.05 * variance.median()  # a channel that hardly varies must not outweigh the others


def loss(
    objective: str, student: VisionTransformer, teacher: VisionTransformer, images: Tensor, scale: Scale
) -> tuple[Tensor, Tensor]:
    """Mean over the states of the relative squared error, plus the objective's other terms; and the error of each
    state."""
    with torch.no_grad():
        targets = states(teacher, images)
    if objective == "blocks":
        blocks = zip(student.blocks, targets, strict=False)
        outputs = [embed(student, images), *(block(state.float()) for block, state in blocks)]
    else:
        outputs = states(student, images)
    errors = torch.stack(
        [_error(mine, target, unit) for mine, target, unit in zip(outputs, targets, scale.states, strict=True)]
    )
    if objective == "blocks":
        return errors.mean(), errors
    mine, target = student.norm(outputs[-1]), teacher.norm(targets[-1])
    features = _error(mine, target, scale.features)
    token = _error(mine[:, :1], target[:, :1], scale.features)
    total = STATES_WEIGHT * errors.mean() + features + CLASS_TOKEN_WEIGHT * token
    return total + HEAD_WEIGHT * divergence(teacher, mine, target), errors


def _error(mine: Tensor, target: Tensor, unit: Tensor) -> Tensor:
    return ((mine.float() - target.float()).square() / unit).mean()


def divergence(teacher: VisionTransformer, mine: Tensor, target: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the teacher's classifier on normed tokens [B, N, D], averaged over the batch."""
    student_logits, teacher_logits = (
        teacher.forward_head(tokens.to(target.dtype)).float() for tokens in (mine, target)
    )
    return F.kl_div(
        student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )


@torch.no_grad()
def agreement(student: VisionTransformer, teacher: VisionTransformer, images: Tensor, scale: Scale) -> dict[str, float]:
    """Figures on held-out pictures: relative error of the features, their cosine, agreement of the classifier's
    labels."""
    mine, target = student.norm(states(student, images)[-1]), teacher.norm(states(teacher, images)[-1])
    votes = [teacher.forward_head(tokens.to(target.dtype)).argmax(-1) for tokens in (mine, target)]
    return {
        "error": _error(mine, target, scale.features).item(),
        "cosine": F.cosine_similarity(mine[:, 0].float(), target[:, 0].float()).mean().item(),
        "votes": (votes[0] == votes[1]).float().mean().item(),
        "divergence": divergence(teacher, mine, target).item(),
    }
