"""The few photographs that pretraining crops: those that scikit-image and scikit-learn ship, or a folder of your own.

One large picture holds thousands of different crops; distillation gets remarkably far with them (Asano and Saeed, "The
Augmented Image Prior", ICLR 2023).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SHIPPED = {
    "skimage": (
        "data",
        "astronaut brick camera cell chelsea coffee coins color grass gravel hubble_deep_field ihc moon "
        "motorcycle_left motorcycle_right page retina rocket text",
    ),
    "sklearn": ("datasets/images", "china flower"),
}
HELD_OUT = ("rocket", "chelsea")  # never trained on: the curves show these
LONG_SIDE = 640  # pixels; larger ones are scaled down, so that a crop shows a part of a scene and not a blur
SUFFIXES = (".jpg", ".jpeg", ".png")


class NoPhotos(ValueError):
    """There are no photographs to crop; the message says what to install or to pass."""


def load(folder: Path | None = None, *, held_out: bool = False) -> list[Image.Image]:
    """RGB pictures, ordered by name. `held_out`: only those that are kept from training.

    folder: your own pictures in place of the shipped ones; every tenth of them is held out.
    """
    files = _shipped() if folder is None else sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    kept_back = {path for path in files if path.stem in HELD_OUT} if folder is None else set(files[::10])
    chosen = [path for path in files if (path in kept_back) == held_out]
    if not chosen:
        where = "scikit-image and scikit-learn (`pip install lensrack[pretrain]`)" if folder is None else folder
        raise NoPhotos(f"expected photographs in {where}, found {len(files)}; --photos DIR names a folder of your own")
    return [_read(path) for path in chosen]


def _shipped() -> list[Path]:
    files = []
    for package, (folder, names) in SHIPPED.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent / folder
        files += [path for name in names.split() for path in root.glob(f"{name}.*") if path.suffix in SUFFIXES]
    return sorted(files, key=lambda path: path.name)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return rgb
