"""The network's training views: crops of photographs and drawings, varied in light, colour, sharpness and mixture.

A view is identified by its number: everything random in it is drawn from the seed and that number, so that a run that
was interrupted continues with exactly the same pictures.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .drawings import Drawings

Random = np.random.Generator
Bytes = NDArray[np.uint8]

DRAWINGS = 4_000  # different drawings in a run
PHOTO_SHARE = 0.6
MIXED_SHARE = 0.3  # share of views with a piece of another pasted in (Yun et al., "CutMix", ICCV 2019)
GREY = (0.299, 0.587, 0.114)


class Views:
    """`photos` are RGB pictures of any size. `first_drawing`: the number of the first drawing, so that other uses get
    others."""

    def __init__(self, photos: Sequence[Image.Image], *, seed: int, first_drawing: int = 0) -> None:
        self._photos, self._seed, self._first = photos, seed, first_drawing
        self._drawings = Drawings(photos, seed=seed)
        self._drawn: OrderedDict[int, Image.Image] = OrderedDict()

    def view(self, number: int, size: int) -> Bytes:
        """View `number`: [size, size, 3]."""
        random = np.random.default_rng((self._seed, number, 1))
        pixels = self._crop(random, size)
        if random.random() < MIXED_SHARE:
            _paste(random, pixels, self._crop(random, size))
        return pixels

    def batch(self, first: int, count: int, size: int) -> Bytes:
        """Views `first` … `first + count - 1`: [count, size, size, 3]."""
        return np.stack([self.view(first + index, size) for index in range(count)])

    def _crop(self, random: Random, size: int) -> Bytes:
        image = self._picture(random)
        area = image.width * image.height * math.exp(random.uniform(math.log(0.03), 0))
        aspect = math.exp(random.uniform(-0.35, 0.35))
        width, height = min(image.width, math.sqrt(area * aspect)), min(image.height, math.sqrt(area / aspect))
        x, y = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        box, turned = (x, y, x + width, y + height), random.random() < 0.2
        side = round(size * 1.3) if turned else size
        crop = image.resize((side, side), Image.Resampling.BICUBIC, box, reducing_gap=2)
        if turned:
            crop = crop.rotate(random.uniform(-45, 45), Image.Resampling.BILINEAR)
            margin = (side - size) // 2
            crop = crop.crop((margin, margin, margin + size, margin + size))
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(_coloured(random, crop))

    def _picture(self, random: Random) -> Image.Image:
        if random.random() < PHOTO_SHARE:
            return self._photos[int(random.integers(len(self._photos)))]
        number = self._first + int(random.integers(DRAWINGS))
        if number not in self._drawn:
            self._drawn[number] = self._drawings.draw(number)
        return self._drawn[number]


def _coloured(random: Random, image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and white balance in one matrix; sometimes blurred, sometimes sharpened."""
    if random.random() < 0.8:
        contrast, saturation = math.exp(random.normal(0, 0.25)), max(0.0, random.normal(1, 0.4))
        if random.random() < 0.15:
            saturation = 0.0
        grey = np.tile(GREY, (3, 1))
        matrix = (grey + saturation * (np.eye(3) - grey)) * (contrast * np.exp(random.normal(0, 0.08, 3)))[:, None]
        shift = random.normal(0, 25) + 128 * (1 - contrast)
        image = image.convert("RGB", tuple(np.concatenate([matrix, np.full((3, 1), shift)], 1).ravel()))
    softness = random.random()
    if softness < 0.1:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 2) * image.width / 224))
    return image.filter(ImageFilter.SHARPEN) if softness > 0.95 else image


def _paste(random: Random, pixels: Bytes, other: Bytes) -> None:
    size = len(pixels)
    height, width = (random.uniform(0.2, 0.7, 2) * size).astype(int)
    y, x = int(random.integers(size - height)), int(random.integers(size - width))
    pixels[y : y + height, x : x + width] = other[y : y + height, x : x + width]
