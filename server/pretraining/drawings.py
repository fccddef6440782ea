"""Pictures drawn from formulas: fractals, contours, textures, dead leaves, and objects on a ground.

Each is identified by its number: the same number gives the same picture on every machine, at any time. Such pictures
teach a network a surprising share of what photographs do (Kataoka et al., "Pre-training without Natural Images", ACCV
2020, for iterated function systems; Kataoka et al., "Replacing Labeled Real-image Datasets", CVPR 2022, for radial
contours; Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021, for dead leaves and spectra).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Random = np.random.Generator
Floats = NDArray[np.float64]
SIDE = 288  # pixels of a drawing

FRACTAL_POINTS, FRACTAL_STEPS = 2_500, 60


class Drawings:
    """`photos` give the textures of leaves and objects; without any, drawn textures do."""

    def __init__(self, photos: Sequence[Image.Image], *, seed: int) -> None:
        self._photos, self._seed = photos, seed

    def draw(self, number: int) -> Image.Image:
        """RGB, SIDE × SIDE."""
        random = np.random.default_rng((self._seed, number))
        kinds: tuple[Callable[[Random], Image.Image], ...] = (fractal, contours, texture, self._leaves, self._things)
        return kinds[number % len(kinds)](random)

    def _leaves(self, random: Random) -> Image.Image:
        """Dead leaves: shapes whose sizes follow a power law, each over the previous ones."""
        surfaces = [self._surface(random) for _ in range(6)]
        image = surfaces[0].copy()
        for leaf in range(int(random.integers(15, 60))):
            radius = SIDE * min(0.5, 0.04 * random.pareto(1.5) + 0.04)
            surface = _gradient(random) if leaf % 2 else surfaces[int(random.integers(len(surfaces)))]
            _paste(image, random, surface, radius, tuple(random.uniform(0, SIDE, 2)))
        return image

    def _things(self, random: Random) -> Image.Image:
        """One to four shaded objects with their shadows, on a calm ground, as in most photographs of objects."""
        image = _gradient(random) if random.random() < 0.6 else self._surface(random)
        for _ in range(int(random.integers(1, 5))):
            radius = SIDE * random.uniform(0.1, 0.35)
            at = tuple(random.uniform(0.2, 0.8, 2) * SIDE)
            _paste(image, random, self._surface(random), radius, at, shaded=True)
        return image

    def _surface(self, random: Random) -> Image.Image:
        """The texture of an object: a piece of a photograph, a drawn texture or one colour."""
        choice = random.random()
        if choice < 0.5 and self._photos:
            photo = self._photos[int(random.integers(len(self._photos)))]
            width = random.uniform(0.15, 0.9) * min(photo.size)
            x, y = (random.uniform(0, side - width) for side in photo.size)
            return photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (x, y, x + width, y + width), reducing_gap=2)
        return texture(random) if choice < 0.75 else _gradient(random)


def _paste(
    image: Image.Image,
    random: Random,
    surface: Image.Image,
    radius: float,
    at: tuple[float, ...],
    *,
    shaded: bool = False,
) -> None:
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(_radial(random, radius, at), fill=255)
    if shaded:
        surface = ImageChops.multiply(surface, _shade(random))
        shadow = ImageChops.offset(mask, int(radius * 0.15), int(radius * 0.15))
        image.paste((20, 20, 24), mask=shadow.filter(ImageFilter.BoxBlur(radius * 0.1)).point(lambda v: v * 0.5))
    image.paste(surface, mask=mask)


def fractal(random: Random) -> Image.Image:
    """An iterated function system of 2–7 affine maps, drawn by many points at once and coloured by density and map."""
    count = int(random.integers(2, 8))
    maps = _contractions(random, count)
    weight = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    points, hue = random.uniform(-1, 1, (FRACTAL_POINTS, 2)), np.zeros(FRACTAL_POINTS)
    seen, hues = [], []
    for step in range(FRACTAL_STEPS):
        chosen = random.choice(count, FRACTAL_POINTS, p=weight / weight.sum())
        points = np.einsum("nij,nj->ni", maps[chosen, :, :2], points) + maps[chosen, :, 2]
        hue = (hue + chosen / count) / 2
        if step > 10:  # the points are on the attractor now
            seen.append(points)
            hues.append(hue)
    return _plot(random, np.concatenate(seen), np.concatenate(hues))


def _contractions(random: Random, count: int) -> Floats:
    """[count, 2, 3]: rotations and scalings by singular values below one, so that the points stay together."""
    turn, other = random.uniform(0, 2 * math.pi, (2, count))
    large = random.uniform(0.35, 0.9, count)
    small = large * random.uniform(0.2, 1, count) * random.choice((-1, 1), count)
    cos, sin, cos2, sin2 = np.cos(turn), np.sin(turn), np.cos(other), np.sin(other)
    left = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    right = np.stack([np.stack([cos2, -sin2], -1), np.stack([sin2, cos2], -1)], -2)
    linear = left * np.stack([large, small], -1)[:, None, :] @ right
    return np.concatenate([linear, random.uniform(-1, 1, (count, 2, 1))], -1)


def _plot(random: Random, points: Floats, hue: Floats) -> Image.Image:
    low, high = np.percentile(points, (1, 99), axis=0)
    bins = ((points - low) / np.maximum(high - low, 1e-6) * 0.9 + 0.05) * SIDE
    inside = ((bins >= 0) & (bins < SIDE)).all(1)
    place = bins[inside].astype(np.int64) @ np.array([SIDE, 1])
    density = np.bincount(place, minlength=SIDE * SIDE)
    mean_hue = np.bincount(place, hue[inside], minlength=SIDE * SIDE) / np.maximum(density, 1)
    light = np.log1p(density) / np.log1p(density.max())
    colours = _colours(random, 3)
    paint = colours[0] + (colours[1] - colours[0]) * mean_hue[:, None]
    mixed = colours[2] + (paint - colours[2]) * np.sqrt(light)[:, None]
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8).reshape(SIDE, SIDE, 3))


def contours(random: Random) -> Image.Image:
    """Nested radial contours (polygons whose radius is noisy), of a few families on one ground."""
    image = _gradient(random)
    pen = ImageDraw.Draw(image)
    for _ in range(int(random.integers(1, 6))):
        radius, at = SIDE * random.uniform(0.1, 0.45), tuple(random.uniform(0.15, 0.85, 2) * SIDE)
        shape = np.asarray(_radial(random, 1.0, (0.0, 0.0)))
        colours, filled = _colours(random, 2), random.random() < 0.4
        rings = int(random.integers(1, 16))
        for ring in range(rings):
            share = 1 - ring / rings
            colour = tuple(int(v) for v in colours[0] * share + colours[1] * (1 - share))
            outline = [tuple(point) for point in shape * radius * share + at]
            if filled:
                pen.polygon(outline, fill=colour)
            else:
                pen.line([*outline, outline[0]], fill=colour, width=int(random.integers(1, 5)))
    return image


def texture(random: Random) -> Image.Image:
    """Two colours mixed by a pattern: noise of a given spectrum, gratings, cells, checks or stripes, slightly bent."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    bend = random.uniform(0, 0.05)
    x, y = x + bend * np.sin(2 * math.pi * (y * random.uniform(1, 4))), y + bend * np.sin(2 * math.pi * x * 3)
    kind = int(random.integers(4))
    if kind == 0:
        pattern = _spectral(random)
    elif kind == 1:
        waves = random.uniform(-30, 30, (int(random.integers(1, 5)), 2))
        pattern = sum(np.sin(2 * math.pi * (wave[0] * x + wave[1] * y)) for wave in waves)
    elif kind == 2:
        pattern = _cells(random, x, y)
    else:
        across, down = random.uniform(2, 24, 2)
        pattern = ((np.floor(x * across) + np.floor(y * down) * random.integers(0, 2)) % 2).astype(np.float64)
    low, high = pattern.min(), pattern.max()
    share = ((pattern - low) / max(high - low, 1e-9))[..., None] ** random.uniform(0.5, 2)
    colours = _colours(random, 2)
    return Image.fromarray((colours[0] * share + colours[1] * (1 - share)).astype(np.uint8))


def _spectral(random: Random) -> Floats:
    """Noise whose amplitude falls as 1/f^a, longer along one axis."""
    fy, fx = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :]
    turn, stretch = random.uniform(0, math.pi), random.uniform(1, 4)
    along, across = fx * math.cos(turn) + fy * math.sin(turn), fy * math.cos(turn) - fx * math.sin(turn)
    size = np.hypot(along * stretch, across) + 1 / SIDE
    noise = random.normal(size=(2, *size.shape))
    field: Floats = np.fft.irfft2((noise[0] + 1j * noise[1]) / size ** random.uniform(0.5, 2.2), (SIDE, SIDE))
    return field


def _cells(random: Random, x: Floats, y: Floats) -> Floats:
    """Distance to the nearest of some points: pebbles, foam."""
    nearest = np.full(x.shape, np.inf)
    for at in random.uniform(0, 1, (int(random.integers(5, 40)), 2)):
        nearest = np.minimum(nearest, (x - at[0]) ** 2 + (y - at[1]) ** 2)
    return np.sqrt(nearest)


def _colours(random: Random, count: int) -> Floats:
    """[count, 3], mostly muted, as surfaces are."""
    vivid = 20 if random.random() < 0.5 else 70
    colours: Floats = (random.uniform(0, 255, (count, 1)) + random.normal(0, vivid, (count, 3))).clip(0, 255)
    return colours


def _gradient(random: Random) -> Image.Image:
    """From one colour to a similar one, as light falls on a wall."""
    (first,) = _colours(random, 1)
    second = first + random.normal(0, 25, 3)
    turn, axis = random.uniform(0, 2 * math.pi), np.linspace(-1, 1, SIDE)
    share = (axis[None, :] * math.cos(turn) + axis[:, None] * math.sin(turn))[..., None] / 2 + 0.5
    return Image.fromarray((first + (second - first) * share).clip(0, 255).astype(np.uint8))


def _shade(random: Random) -> Image.Image:
    """Light from one side, as a grey picture to multiply with."""
    turn, axis = random.uniform(0, 2 * math.pi), np.linspace(-1, 1, SIDE)
    light = 200 + 90 * (axis[None, :] * math.cos(turn) + axis[:, None] * math.sin(turn))
    return Image.fromarray(np.repeat(light[..., None], 3, 2).clip(0, 255).astype(np.uint8))


def _radial(random: Random, radius: float, at: tuple[float, ...]) -> list[tuple[float, float]]:
    """The corners of a shape around `at`: circle, polygon or blob, stretched and turned."""
    smooth = random.random() < 0.6
    angles = np.linspace(0, 2 * math.pi, 40 if smooth else int(random.integers(3, 9)), endpoint=False)
    length = np.ones_like(angles)
    for wave in range(1, 6):
        length += random.normal(0, 0.25 / wave) * np.cos(wave * angles + random.uniform(0, 6.3))
    x, y = radius * length * np.cos(angles), radius * length * np.sin(angles) * random.uniform(0.4, 1)
    turn = random.uniform(0, 2 * math.pi)
    turned = zip(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn), strict=True)
    return [(float(u + at[0]), float(v + at[1])) for u, v in turned]
