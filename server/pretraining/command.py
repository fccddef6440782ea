"""`python -m server pretrain`: the bundled backbone, made anew."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import timm.layers
import torch

from server.engine import bundled
from server.engine.backbone import load_weights

from . import photos
from .run import Phase, Run, RunFolder

ARCH = "vit_tiny_patch16_224"
SEEN_AS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # the student keeps the teacher's values
PHASES = ("whole:112:32:3600", "whole:160:32:1000", "whole:224:32:700")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    timm.layers.set_fused_attn(enable=options.device != "cpu")  # on a CPU the fused kernel has no bfloat16 products
    teacher = timm.create_model(options.teacher_arch, dynamic_img_size=True)
    load_weights(teacher, options.teacher)
    student = timm.create_model(ARCH, num_classes=0, dynamic_img_size=True)
    pictures = (photos.load(options.photos), photos.load(options.photos, held_out=True))
    device = torch.device(options.device)
    Run(
        student,
        teacher,
        pictures,
        [Phase.of(text) for text in options.phase or PHASES],
        RunFolder(options.out),
        rate=options.rate,
        seed=options.seed,
        keep_every=options.keep_every,
        device=device,
    ).go(bundled.metadata(ARCH, {key: teacher.pretrained_cfg[key] for key in SEEN_AS}))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server pretrain", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="safetensors file of the teacher, with its head")
    parser.add_argument("--teacher-arch", default="deit_tiny_patch16_224", help="timm architecture of the teacher")
    parser.add_argument("--photos", type=Path, help="folder of pictures to crop, in place of the shipped ones")
    parser.add_argument("--phase", action="append", help="OBJECTIVE:SIZE:BATCH:STEPS, in order; repeatable")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate, of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, default=Path("pretrained"), help="folder of state, curves and weights")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
