"""Short video clips of shapes: one object moves straight, the others stand; questions ask about the motion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from questions import DIRECTIONS, Question
from world import Item, Scene, draw, sample_scene

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = (0.30, 0.45)  # part of the picture's side that the mover crosses


@dataclass(frozen=True)
class Clip:
    """One scene per frame; `mover` is the index of the object that moves, `direction` one of DIRECTIONS."""

    scenes: tuple[Scene, ...]
    mover: int
    direction: str

    def draw(self) -> list[Image.Image]:
        return [draw(scene) for scene in self.scenes]


def sample_clip(
    rng: np.random.Generator, width: int, height: int, num_frames: int = 8, num_items: int | None = None
) -> Clip:
    """A clip of `num_frames` pictures of width x height pixels with one to three objects (or `num_items`)."""
    while True:
        scene = sample_scene(rng, width, height, num_items or int(rng.integers(1, 4)))
        mover, direction = int(rng.integers(len(scene.items))), str(rng.choice(DIRECTIONS))
        side = width if direction in ("left", "right") else height
        length = side * rng.uniform(*TRAVEL)
        if _is_free(scene, mover, _shift(scene.items[mover], direction, length)):
            parts = np.linspace(0, length, num_frames)
            return Clip(tuple(_move(scene, mover, direction, float(part)) for part in parts), mover, direction)


def _shift(item: Item, direction: str, length: float) -> Item:
    dx, dy = STEPS[direction]
    return replace(item, x=item.x + dx * length, y=item.y + dy * length)


def _move(scene: Scene, mover: int, direction: str, length: float) -> Scene:
    items = list(scene.items)
    items[mover] = _shift(items[mover], direction, length)
    return replace(scene, items=tuple(items))


def _is_free(scene: Scene, mover: int, end: Item) -> bool:
    """The mover stays inside the picture and its way (a rectangle) is clear of the others."""
    start, radius = scene.items[mover], end.diameter / 2
    if not (radius < end.x < scene.width - radius and radius < end.y < scene.height - radius):
        return False
    middle_x, middle_y = (start.x + end.x) / 2, (start.y + end.y) / 2
    reach_x, reach_y = abs(start.x - end.x) / 2 + radius, abs(start.y - end.y) / 2 + radius
    others = (item for i, item in enumerate(scene.items) if i != mover)
    return all(
        abs(o.x - middle_x) > reach_x + o.diameter / 2 or abs(o.y - middle_y) > reach_y + o.diameter / 2 for o in others
    )


def ask_direction(clip: Clip, rng: np.random.Generator) -> Question:
    name = clip.scenes[0].items[clip.mover].name
    return Question("direction", f"which way does the {name} move ?", clip.direction)


def ask_mover(clip: Clip, rng: np.random.Generator) -> Question:
    return Question("mover", "which object moves ?", f"the {clip.scenes[0].items[clip.mover].name}")


def ask_moves(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Yes or no with even chances; None for a single object, which always moves."""
    items = clip.scenes[0].items
    if len(items) == 1:
        return None
    answer = "yes" if rng.random() < 0.5 else "no"
    others = [i for i in range(len(items)) if i != clip.mover]
    index = clip.mover if answer == "yes" else int(rng.choice(others))
    return Question("moves", f"does the {items[index].name} move ?", answer)


CLIP_KINDS: dict[str, Callable[[Clip, np.random.Generator], Question | None]] = {
    "direction": ask_direction,
    "mover": ask_mover,
    "moves": ask_moves,
}
