"""Draws small labelled picture sets to try lensrack with, on machines without data.

Classes differ in colour and coarse shape, which even a frozen network with random weights can tell apart; position,
size, light, background and noise vary, so that there is something to learn. The same seed draws the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Random = np.random.Generator
Colour = tuple[int, int, int]
Painter = Callable[[Random, int], Image.Image]

SUPERSAMPLE = 3  # drawn larger and scaled down: smooth edges
TEST_SHARE = 1 / 3


def draw(folder: Path, *, per_class: int = 24, size: int = 96, seed: int = 0) -> None:
    """Write FOLDER/{fruit,weather}/{train,test}/CLASS/NNN.png: `per_class` training pictures, `size` pixels a side."""
    for number, (name, classes) in enumerate(SETS.items()):
        for split, count in (("train", per_class), ("test", max(2, round(per_class * TEST_SHARE)))):
            for label, paint in classes.items():
                target = folder / name / split / label
                target.mkdir(parents=True, exist_ok=True)
                for index in range(count):
                    key = [seed, number, split == "test", sorted(classes).index(label), index]
                    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
                    _finish(paint(random, size * SUPERSAMPLE), size, random).save(target / f"{index:03d}.png")


# --- fruit ------------------------------------------------------------------------------------------------------------


def _fruit(skin: Colour, shade: Colour, *, stretch: float, tips: bool = False, bloom: bool = False) -> Painter:
    def paint(random: Random, size: int) -> Image.Image:
        image = _table(random, size)
        radius = size * random.uniform(0.24, 0.34)
        x, y = (size * random.uniform(0.4, 0.6) for _ in range(2))
        body = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        pen = ImageDraw.Draw(body)
        wide = radius * stretch
        pen.ellipse((x - wide * 0.95, y + radius * 0.55, x + wide * 1.15, y + radius * 1.2), fill=(0, 0, 0, 60))
        if tips:  # under the body, so that only a nub shows at either end
            nub = _mix(shade, skin, 0.4)
            pen.ellipse((x - wide * 1.13, y - radius * 0.24, x + wide * 1.13, y + radius * 0.24), fill=nub)
        _ball(pen, (x, y), (wide, radius), _vary(random, skin), _vary(random, shade))
        if bloom:
            pen.line((x, y - radius, x + radius * 0.1, y - radius * 1.35), fill=(92, 64, 40), width=max(2, size // 40))
            pen.arc((x - wide * 0.35, y - radius, x + wide * 0.35, y + radius), 290, 70, fill=shade, width=size // 60)
        turned = body.rotate(random.uniform(-35, 35), Image.Resampling.BICUBIC, center=(x, y))
        image.paste(turned, (0, 0), turned)
        return image

    return paint


def _table(random: Random, size: int) -> Image.Image:
    """A wooden or cloth ground with light from one side."""
    base = np.array(_vary(random, [(205, 183, 150), (188, 196, 204), (222, 214, 200)][random.integers(3)]), np.float64)
    slope = np.linspace(-1, 1, size)
    angle = random.uniform(0, 2 * math.pi)
    light = math.cos(angle) * slope[None, :] + math.sin(angle) * slope[:, None]
    grain = np.sin(slope[:, None] * random.uniform(20, 50) + random.uniform(0, 6))
    return Image.fromarray((base + (22 * light + 6 * grain)[..., None]).clip(0, 255).astype(np.uint8))


def _ball(
    pen: ImageDraw.ImageDraw, middle: tuple[float, float], radii: tuple[float, float], skin: Colour, shade: Colour
) -> None:
    """An ellipse that is lit from the upper left: rings from shade to skin to a highlight."""
    x, y = middle
    steps = 24
    for step in range(steps):
        share = step / (steps - 1)
        rest = 1 - share * 0.92
        colour = _mix(shade, skin, min(1.0, share * 1.6)) if share < 0.8 else _mix(skin, (255, 255, 250), share - 0.75)
        dx, dy = -radii[0] * 0.35 * share, -radii[1] * 0.4 * share
        box = (x + dx - radii[0] * rest, y + dy - radii[1] * rest, x + dx + radii[0] * rest, y + dy + radii[1] * rest)
        pen.ellipse(box, fill=colour)


# --- weather ----------------------------------------------------------------------------------------------------------


def _sunny(random: Random, size: int) -> Image.Image:
    image = _landscape(random, size, (92, 168, 236), (190, 222, 250), (110, 168, 72))
    pen = ImageDraw.Draw(image)
    x, y, radius = size * random.uniform(0.2, 0.8), size * random.uniform(0.15, 0.35), size * random.uniform(0.08, 0.13)
    for ray in range(12):
        angle = ray * math.pi / 6 + random.uniform(0, 0.2)
        end = (x + math.cos(angle) * radius * 1.9, y + math.sin(angle) * radius * 1.9)
        pen.line((x, y, *end), fill=(255, 226, 110), width=max(2, size // 60))
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 214, 64))
    return image


def _rain(random: Random, size: int) -> Image.Image:
    image = _landscape(random, size, (84, 94, 108), (132, 140, 150), (70, 92, 74))
    pen = ImageDraw.Draw(image)
    _clouds(random, pen, size, (66, 72, 84), 6)
    lean = random.uniform(-0.3, 0.3)
    for _ in range(90):
        x, y, length = random.uniform(0, size), random.uniform(size * 0.25, size), size * random.uniform(0.04, 0.09)
        pen.line((x, y, x + lean * length, y + length), fill=(176, 196, 220), width=max(1, size // 130))
    return image


def _snow(random: Random, size: int) -> Image.Image:
    image = _landscape(random, size, (176, 190, 208), (222, 230, 240), (244, 247, 252))
    pen = ImageDraw.Draw(image)
    _clouds(random, pen, size, (204, 212, 224), 4)
    for _ in range(110):
        x, y, radius = random.uniform(0, size), random.uniform(0, size), size * random.uniform(0.005, 0.016)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return image


def _landscape(random: Random, size: int, above: Colour, below: Colour, ground: Colour) -> Image.Image:
    """A sky that pales towards the horizon, and rolling hills."""
    above, below, ground = _vary(random, above), _vary(random, below), _vary(random, ground)
    share = np.linspace(0, 1, size)[:, None, None]
    sky = np.asarray(above) * (1 - share) + np.asarray(below) * share
    image = Image.fromarray(np.broadcast_to(sky, (size, size, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for layer in range(3):
        top = size * (random.uniform(0.6, 0.7) + 0.1 * layer)
        phase, waves = random.uniform(0, 6), random.uniform(1, 2.5)
        ridge = [
            (x, top + size * 0.05 * math.sin(phase + waves * 2 * math.pi * x / size)) for x in range(0, size + 4, 4)
        ]
        pen.polygon([(0, size), *ridge, (size, size)], fill=_mix(ground, (0, 0, 0), 0.1 * (2 - layer)))
    return image


def _clouds(random: Random, pen: ImageDraw.ImageDraw, size: int, colour: Colour, count: int) -> None:
    for _ in range(count):
        x, y, radius = size * random.uniform(0, 1), size * random.uniform(0.05, 0.25), size * random.uniform(0.08, 0.14)
        for dx, dy, scale in ((-1.1, 0.25, 0.75), (0, 0, 1), (1.1, 0.3, 0.7)):
            r = radius * scale
            pen.ellipse(
                (x + dx * radius - r, y + dy * radius - r, x + dx * radius + r, y + dy * radius + r), fill=colour
            )


# --- paint ------------------------------------------------------------------------------------------------------------


def _finish(image: Image.Image, size: int, random: Random) -> Image.Image:
    """Scale down, expose a little differently, add a camera's softness and noise."""
    small = image.resize((size, size), Image.Resampling.LANCZOS).filter(
        ImageFilter.GaussianBlur(random.uniform(0, 0.7))
    )
    pixels: NDArray[np.float64] = np.asarray(small, np.float64) * random.uniform(0.88, 1.1)
    pixels += random.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _vary(random: Random, colour: Colour) -> Colour:
    red, green, blue = (min(255, max(0, value + int(random.integers(-12, 13)))) for value in colour)
    return red, green, blue


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


SETS: dict[str, dict[str, Painter]] = {
    "fruit": {
        "lemon": _fruit((250, 219, 66), (190, 140, 20), stretch=1.25, tips=True),
        "lime": _fruit((134, 190, 62), (48, 104, 28), stretch=1.1),
        "plum": _fruit((112, 62, 138), (44, 18, 66), stretch=0.92, bloom=True),
    },
    "weather": {"sunny": _sunny, "rain": _rain, "snow": _snow},
}
