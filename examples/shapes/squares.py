"""Pictures as the models with one square tile a picture see them, with the labels of every patch.

A `Form` says how a family prepares a picture; a seed, a form and a number of pictures are a data set.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from PIL import Image

from patches import LABELS, label_tiles
from world import Scene, draw, draw_labels, sample_scene, sample_size

CHUNK = 250


@dataclass(frozen=True)
class Form:
    """One tile of `tile` x `tile` pixels in patches of `patch` (even), cut bicubically from a picture.

    fit "crop": the short edge becomes `tile`, then the middle is cut out (CLIP); "squash": both edges become `tile`.
    Pictures have `mean_side` pixels and take turns at the `aspects` of world.ASPECTS; "crop" wants square ones.
    """

    tile: int
    patch: int
    fit: str = "crop"
    mean_side: tuple[float, float] = (88.0, 124.0)
    aspects: tuple[str, ...] = ("square",)

    @property
    def num_patches(self) -> int:
        return (self.tile // self.patch) ** 2


@dataclass
class Squares:
    """Picture i is tile i; the labels are those of patches.py."""

    scenes: list[Scene]
    tiles: np.ndarray  # (pictures, 3, tile, tile) uint8
    owner: np.ndarray
    coverage: np.ndarray
    occupancy: np.ndarray
    looks: np.ndarray
    centers: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)


def resize(image: Image.Image, form: Form) -> tuple[int, int]:
    """Width and height before the middle is cut out."""
    if form.fit == "squash":
        return form.tile, form.tile
    short = min(image.size)
    width, height = (int(form.tile * length / short) for length in image.size)
    return width, height


def cut_tile(image: Image.Image, form: Form, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The picture as the family's image processor cuts it, neither scaled to 0..1 nor normalized."""
    width, height = resize(image, form)
    left, top = (width - form.tile) // 2, (height - form.tile) // 2
    return image.resize((width, height), resample).crop((left, top, left + form.tile, top + form.tile))


def find_centers(scene: Scene, image: Image.Image, form: Form) -> np.ndarray:
    """(1, objects, 2): middles of the objects in tile sides from the tile's corner."""
    xy = np.array([(item.x, item.y) for item in scene.items])
    size = np.array(resize(image, form))
    return ((xy / np.array(image.size) * size - (size - form.tile) // 2) / form.tile)[None].astype(np.float32)


def label_scene(scene: Scene, form: Form) -> dict[str, np.ndarray]:
    """Labels of the one tile, each with a leading dim of 1."""
    image = draw_labels(scene)
    pixels = np.asarray(cut_tile(image, form, Image.Resampling.NEAREST))[None]
    return label_tiles(scene, pixels, find_centers(scene, image, form), form.patch)


def cut_pixels(image: Image.Image, form: Form) -> np.ndarray:
    """RGB picture -> (3, tile, tile) uint8."""
    return np.asarray(cut_tile(image, form)).transpose(2, 0, 1)


def _make_chunk(seed: tuple[int, int], count: int, form: Form) -> Squares:
    rng = np.random.default_rng(seed)
    scenes, tiles, labels = [], [], []
    for i in range(count):
        size = sample_size(rng, form.mean_side, form.aspects[i % len(form.aspects)])
        scenes.append(sample_scene(rng, *size))
        tiles.append(cut_pixels(draw(scenes[-1]), form))
        labels.append(label_scene(scenes[-1], form))
    return Squares(scenes, np.stack(tiles), *(np.concatenate([label[name] for label in labels]) for name in LABELS))


def make_squares(seed: int, count: int, form: Form, workers: int = 2) -> Squares:
    """`count` pictures; the same for any number of workers."""
    sizes = [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    seeds = [(seed, i) for i in range(len(sizes))]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = list(pool.map(partial(_make_chunk, form=form), seeds, sizes))
    names = ("tiles", *LABELS)
    scenes = [scene for chunk in chunks for scene in chunk.scenes]
    return Squares(scenes, *(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names))
