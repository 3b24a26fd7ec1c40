"""A synthetic world: pictures of coloured shapes whose contents are known exactly.

A `Scene` says what is in a picture; `draw` paints it and `draw_labels` paints which object owns each pixel.
Questions about scenes are in `questions.py`, short video clips in `clips.py`.
All lengths are pixels of the picture, x to the right and y downwards; every random choice comes from the Generator
that is passed in, so a seed is a data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
    "cyan": (50, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")

# Diameter as a part of sqrt(width * height). The gap between the two ranges keeps "small or large ?" decidable.
DIAMETERS = {"small": (0.20, 0.24), "large": (0.36, 0.40)}
COUNT_WEIGHTS = (0.12, 0.38, 0.25, 0.25)  # of one, two, three and four objects
SUPERSAMPLING = 3
ASPECTS = {"square": (1.0, 1.0), "normal": (1.0, 1.4), "odd": (1.4, 3.2)}


@dataclass(frozen=True)
class Item:
    """One object; (x, y) is the middle of its bounding square of side `diameter`."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture of width x height pixels with objects that do not touch and have distinct colours."""

    width: int
    height: int
    background: tuple[int, int, int]
    items: tuple[Item, ...]

    @property
    def scale(self) -> float:
        """Side of the square with the picture's area, the unit in which sizes and distances are judged."""
        return math.sqrt(self.width * self.height)


def sample_size(rng: np.random.Generator, mean_side: tuple[float, float], aspect_kind: str) -> tuple[int, int]:
    """Width and height: their geometric mean is in `mean_side`, the aspect ratio as ASPECTS says, either way."""
    low, high = ASPECTS[aspect_kind]
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    side = rng.uniform(*mean_side)
    long, short = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    return (long, short) if rng.random() < 0.5 else (short, long)


def sample_scene(rng: np.random.Generator, width: int, height: int, num_items: int | None = None) -> Scene:
    """A scene of `num_items` objects (one to four when None). Colours are distinct, shapes may repeat."""
    count = num_items or int(rng.choice(4, p=COUNT_WEIGHTS)) + 1
    items: list[Item] | None = None
    while items is None:
        items = _place_items(rng, width, height, sample_kinds(rng, count))
    base = rng.integers(8, 31)
    background = tuple(int(v) for v in np.clip(base + rng.integers(-8, 9, size=3), 0, 255))
    return Scene(width, height, background, tuple(items))


def sample_kinds(rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """`count` triples (color, shape, size)."""
    colors = rng.permutation(list(COLORS))[:count]
    # A quarter of the scenes lean to one shape, or "three" and "four" circles would hardly ever be seen.
    favourite = str(rng.choice(SHAPES)) if rng.random() < 0.25 else None
    kinds = []
    for color in colors:
        shape = favourite if favourite and rng.random() < 0.8 else str(rng.choice(SHAPES))
        kinds.append((str(color), shape, str(rng.choice(SIZES))))
    return kinds


def _place_items(
    rng: np.random.Generator, width: int, height: int, kinds: list[tuple[str, str, str]]
) -> list[Item] | None:
    """The objects at free places, or None if they did not fit."""
    scale = math.sqrt(width * height)
    items: list[Item] = []
    for color, shape, size in kinds:
        diameter = scale * rng.uniform(*DIAMETERS[size])
        place = find_place(rng, width, height, diameter, items)
        if place is None:
            return None
        rgb = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-12, 13, size=3), 0, 255))
        items.append(Item(color, shape, size, *place, diameter, rgb))
    return items


def find_place(
    rng: np.random.Generator, width: int, height: int, diameter: float, others: list[Item], tries: int = 30
) -> tuple[float, float] | None:
    """A middle at which a square of side `diameter` lies inside the picture and clear of the others."""
    gap, margin = 0.03 * math.sqrt(width * height), diameter / 2 + 1
    if 2 * margin >= min(width, height):
        return None
    for _ in range(tries):
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        if all(max(abs(x - o.x), abs(y - o.y)) > (diameter + o.diameter) / 2 + gap for o in others):
            return float(x), float(y)
    return None


def _outline(item: Item) -> list[tuple[float, float]]:
    """Corner points of a shape that is not a circle."""
    r, x, y = item.diameter / 2, item.x, item.y
    arm = r * 0.36
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r), (r, r), (-r, r)],
        "cross": [
            *((-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)),
            *((arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)),
        ],
    }[item.shape]
    return [(x + dx, y + dy) for dx, dy in corners]


def _paint(scene: Scene, mode: str, background, fills: list, factor: int) -> Image.Image:
    """The scene painted `factor` times as large, object i in fills[i]."""
    image = Image.new(mode, (scene.width * factor, scene.height * factor), background)
    pen = ImageDraw.Draw(image)
    for item, fill in zip(scene.items, fills, strict=True):
        if item.shape == "circle":
            r = item.diameter / 2
            box = [item.x - r, item.y - r, item.x + r, item.y + r]
            pen.ellipse([factor * v for v in box], fill=fill)
        else:
            pen.polygon([(factor * x, factor * y) for x, y in _outline(item)], fill=fill)
    return image


def draw(scene: Scene) -> Image.Image:
    """The RGB picture, width x height, with smooth edges."""
    fills = [item.rgb for item in scene.items]
    return _paint(scene, "RGB", scene.background, fills, SUPERSAMPLING).reduce(SUPERSAMPLING)


def draw_labels(scene: Scene) -> Image.Image:
    """A picture in mode L of the same size: 0 is background, i + 1 belongs to object i."""
    return _paint(scene, "L", 0, list(range(1, len(scene.items) + 1)), 1)
