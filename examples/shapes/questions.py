"""Questions about a `Scene` with exact answers, and one-line captions.

Every kind is a function (scene, rng) -> Question or None; None means that the scene has no clear answer to it (no such
pair, or a difference too small to see). All text is lower case with a blank before the question mark, so splitting at
blanks gives the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from world import COLORS, SHAPES, SIZES, Item, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DIRECTIONS = ("left", "right", "up", "down")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

# Two places differ clearly if they are this part of the picture's side (and of its scale) apart.
MARGIN = 0.12
# In a caption of two objects the direction named must beat the other one by this factor.
DOMINANCE = 1.4


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def find_offset(scene: Scene, axis: str) -> Callable[[Item, Item], float]:
    """Signed distance first - second along "x" or "y" in units of the clear margin: beyond 1 or -1 it is visible."""
    side = scene.width if axis == "x" else scene.height
    margin = MARGIN * max(scene.scale, side)
    return lambda a, b: (getattr(a, axis) - getattr(b, axis)) / margin


def ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = [item.shape for item in scene.items]
    unique = [item for item in scene.items if shapes.count(item.shape) == 1]
    if not unique:
        return None
    item = _pick(rng, unique)
    ask = _pick(rng, ("what color is the {} ?", "what colour is the {} ?", "what is the color of the {} ?"))
    return Question("color", ask.format(item.shape), item.color)


def ask_shape(scene: Scene, rng: np.random.Generator) -> Question:
    item = _pick(rng, scene.items)
    ask = _pick(rng, ("what shape is the {} object ?", "what is the shape of the {} object ?"))
    return Question("shape", ask.format(item.color), item.shape)


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    what = _pick(rng, ("objects", "shape", "shape", "size"))
    if what == "shape":
        shape = str(_pick(rng, SHAPES))
        noun, count = PLURALS[shape], sum(item.shape == shape for item in scene.items)
    elif what == "size":
        size = str(_pick(rng, SIZES))
        noun, count = f"{size} objects", sum(item.size == size for item in scene.items)
    else:
        noun, count = "objects", len(scene.items)
    ask = _pick(rng, ("how many {} are there ?", "how many {} are in the picture ?"))
    return Question("count", ask.format(noun), NUMBERS[count])


def ask_size(scene: Scene, rng: np.random.Generator) -> Question:
    item = _pick(rng, scene.items)
    ask = _pick(rng, ("is the {} small or large ?", "how large is the {} ?"))
    return Question("size", ask.format(item.name), item.size)


def _ask_extreme(
    scene: Scene, rng: np.random.Generator, axis: str, kind: str, ends: tuple[str, str]
) -> Question | None:
    """Which object is at the low or the high end of the axis, if it is clearly ahead of the next."""
    if len(scene.items) < 2:
        return None
    end = int(rng.integers(2))
    ordered = sorted(scene.items, key=lambda item: getattr(item, axis), reverse=bool(end))
    if abs(find_offset(scene, axis)(ordered[0], ordered[1])) < 1:
        return None
    ask = _pick(rng, ("which object is {} ?", "what is {} ?"))
    return Question(kind, ask.format(ends[end]), f"the {ordered[0].name}")


def ask_side(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_extreme(scene, rng, "x", "side", ("on the left", "on the right"))


def ask_level(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_extreme(scene, rng, "y", "level", ("at the top", "at the bottom"))


def _ask_relation(
    scene: Scene, rng: np.random.Generator, axis: str, kind: str, ends: tuple[str, str]
) -> Question | None:
    """A yes/no question on a clear pair; ends[0] is the word for the smaller coordinate."""
    if len(scene.items) < 2:
        return None
    first, second = (scene.items[i] for i in rng.permutation(len(scene.items))[:2])
    offset = find_offset(scene, axis)(first, second)
    if abs(offset) < 1:
        return None
    end = int(rng.integers(2))
    holds = (offset < 0) == (end == 0)
    return Question(kind, f"is the {first.name} {ends[end]} the {second.name} ?", "yes" if holds else "no")


def ask_left_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    ends = _pick(rng, (("left of", "right of"), ("to the left of", "to the right of")))
    return _ask_relation(scene, rng, "x", "left_of", ends)


def ask_above(scene: Scene, rng: np.random.Generator) -> Question | None:
    return _ask_relation(scene, rng, "y", "above", ("above", "below"))


def ask_either(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left or right, above or below: the comparison behind the yes/no kinds without the match of the word asked."""
    axis, ends = _pick(rng, (("x", ("left", "right")), ("y", ("above", "below"))))
    if len(scene.items) < 2:
        return None
    first, second = (scene.items[i] for i in rng.permutation(len(scene.items))[:2])
    offset = find_offset(scene, axis)(first, second)
    if abs(offset) < 1:
        return None
    ask = "is the {} left or right of the {} ?" if axis == "x" else "is the {} above or below the {} ?"
    return Question("either", ask.format(first.name, second.name), ends[0] if offset < 0 else ends[1])


def ask_exists(scene: Scene, rng: np.random.Generator) -> Question:
    """Yes half of the time; a "no" has a colour of the picture with another shape, or a colour that is absent."""
    item = _pick(rng, scene.items)
    color, shape, answer = item.color, item.shape, "yes"
    if rng.random() < 0.5:
        answer = "no"
        if rng.random() < 0.5:
            shape = str(_pick(rng, [s for s in SHAPES if s != item.shape]))
        else:
            present = {other.color for other in scene.items}
            color = str(_pick(rng, [c for c in COLORS if c not in present]))
    return Question("exists", f"is there {with_article(color, shape)} ?", answer)


def with_article(color: str, shape: str) -> str:
    return f"{'an' if color == 'orange' else 'a'} {color} {shape}"


def list_items(scene: Scene) -> str:
    """Every object, in the fixed order of `COLORS`: "a red circle and a blue square"."""
    order = list(COLORS)
    items = sorted(scene.items, key=lambda item: order.index(item.color))
    return " and ".join(with_article(item.color, item.shape) for item in items)


def find_caption(scene: Scene) -> str | None:
    """One line: size and kind of a single object, the relation of two, the list of more; None if two are diagonal."""
    if len(scene.items) == 1:
        return f"a {scene.items[0].size} {scene.items[0].name}"
    if len(scene.items) > 2:
        return list_items(scene)
    first, second = scene.items
    dx, dy = abs(first.x - second.x), abs(first.y - second.y)
    # Some models see the picture squashed to a square: the direction must dominate there too.
    if min(dx, dx / scene.width * scene.height) > DOMINANCE * dy:
        axis, word = "x", "left of"
    elif min(dy, dy / scene.height * scene.width) > DOMINANCE * dx:
        axis, word = "y", "above"
    else:
        return None
    a, b = sorted(scene.items, key=lambda item: getattr(item, axis))
    if abs(find_offset(scene, axis)(a, b)) < 1:
        return None
    return f"{with_article(a.color, a.shape)} {word} {with_article(b.color, b.shape)}"


def ask_caption(scene: Scene, rng: np.random.Generator) -> Question | None:
    caption = find_caption(scene)
    ask = _pick(rng, ("describe the picture .", "what does the picture show ?"))
    return caption and Question("caption", ask, caption)


def ask_list(scene: Scene, rng: np.random.Generator) -> Question:
    ask = _pick(rng, ("what is in the picture ?", "list the objects ."))
    return Question("list", ask, list_items(scene))


def ask_where(scene: Scene, rng: np.random.Generator) -> Question:
    """Cell of an 8 x 8 grid. A helper for training only: objects near a grid line have no clear answer."""
    item = _pick(rng, scene.items)
    column, row = int(item.x / scene.width * 8), int(item.y / scene.height * 8)
    return Question("where", f"where is the {item.name} ?", f"column {NUMBERS[column + 1]} row {NUMBERS[row + 1]}")


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "size": ask_size,
    "side": ask_side,
    "level": ask_level,
    "left_of": ask_left_of,
    "above": ask_above,
    "exists": ask_exists,
    "caption": ask_caption,
    "list": ask_list,
}
TRAINING_KINDS = KINDS | {"where": ask_where, "either": ask_either}

# Every answer to the kinds above but caption and list, and to the clips' motion questions: a classifier's labels.
ANSWERS: tuple[str, ...] = (
    *COLORS,
    *SHAPES,
    *SIZES,
    *NUMBERS[:5],
    "yes",
    "no",
    *DIRECTIONS,
    *(f"the {color} {shape}" for color in COLORS for shape in SHAPES),
)

# Every word that a question, an answer or a caption can hold, in a fixed order: a word-level vocabulary.
WORDS: tuple[str, ...] = (
    *(*COLORS, *SHAPES, *PLURALS.values(), *SIZES, *NUMBERS, *DIRECTIONS, "yes", "no", "?", ".", ","),
    *("what", "which", "how", "many", "where", "is", "are", "there", "the", "a", "an", "of", "in", "on", "at", "to"),
    *("and", "or", "not", "color", "colour", "shape", "size", "object", "objects", "picture", "image", "video"),
    *("above", "below", "top", "bottom", "column", "row", "describe", "list", "show", "does", "do", "it", "this"),
    *("way", "move", "moves", "moving", "frame", "under", "over", "same", "as", "with"),
)
