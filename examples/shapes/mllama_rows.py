"""Pictures as the small Llama-3.2-Vision sees them: up to four tiles of a canvas, with the labels of every patch."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context

import numpy as np
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

import model_mllama as m
from packing import IGNORED, Rows, Segment, draw_turns, pack_rows, sample_question
from patches import LABELS, label_tiles
from questions import Question
from squares import CHUNK
from world import Scene, draw, draw_labels, sample_scene, sample_size

ROW_LENGTH = 110  # tokens
PREFIX = (m.BEGIN, m.START_HEADER, m.WORD_IDS["user"], m.END_HEADER, m.IMAGE)
ANSWER = (m.END_TURN, m.START_HEADER, m.WORD_IDS["assistant"], m.END_HEADER)
NEXT_TURN = (m.START_HEADER, m.WORD_IDS["user"], m.END_HEADER)


@dataclass
class Canvases:
    """Picture i has the four tile slots tiles[i], the first num_tiles[i] of them used; labels as in patches.py."""

    scenes: list[Scene]
    tiles: np.ndarray  # (pictures, 4, 3, 56, 56) uint8
    ratio_ids: np.ndarray  # (pictures,) int64
    num_tiles: np.ndarray  # (pictures,)
    places: np.ndarray  # (pictures, 4, 16, 2) float32: middle of the patch's object in sides of the whole picture
    owner: np.ndarray  # (pictures, 4, 16), and the others likewise
    coverage: np.ndarray
    occupancy: np.ndarray
    looks: np.ndarray
    centers: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)


@cache
def _image_processor():
    return m.build_image_processor()


def cut_tiles(image, **kwargs) -> tuple[np.ndarray, int, int]:
    """PIL picture -> (4, 3, 56, 56) uint8 as the processor cuts it, its aspect ratio id, its number of tiles."""
    found = _image_processor()(images=[[image]], do_rescale=False, do_normalize=False, return_tensors="np", **kwargs)
    tiles = found["pixel_values"][0, 0].astype(np.uint8)
    return tiles, int(found["aspect_ratio_ids"][0, 0]), int(found["aspect_ratio_mask"].sum())


def find_centers(scene: Scene) -> np.ndarray:
    """(4, objects, 2): middles of the objects in tile sides from each tile's corner; far outside of unused tiles."""
    xy = np.array([(item.x, item.y) for item in scene.items])
    canvas = get_optimal_tiled_canvas(scene.height, scene.width, m.MAX_TILES, m.TILE)
    height, width = get_image_size_fit_to_canvas(scene.height, scene.width, *canvas, m.TILE)
    full = xy * np.array([width / scene.width, height / scene.height]) / m.TILE
    rows, columns = canvas[0] // m.TILE, canvas[1] // m.TILE
    corners = [(column, row) for row in range(rows) for column in range(columns)]
    corners += [(100, 100)] * (m.MAX_TILES - len(corners))
    return np.stack([full - np.array(corner) for corner in corners]).astype(np.float32)


def label_scene(scene: Scene) -> dict[str, np.ndarray]:
    pixels, _, _ = cut_tiles(draw_labels(scene).convert("RGB"), resample=0)
    labels = label_tiles(scene, pixels[:, 0], find_centers(scene), m.PATCH)
    xy = np.array([(item.x / scene.width, item.y / scene.height) for item in scene.items], np.float32)
    return labels | {"places": xy[np.maximum(labels["owner"], 1) - 1]}


def _make_chunk(
    seed: tuple[int, int], count: int, mean_side: tuple[float, float], aspects: tuple[str, ...]
) -> Canvases:
    rng = np.random.default_rng(seed)
    scenes, cuts, labels = [], [], []
    for i in range(count):
        scenes.append(sample_scene(rng, *sample_size(rng, mean_side, aspects[i % len(aspects)])))
        cuts.append(cut_tiles(draw(scenes[-1])))
        labels.append(label_scene(scenes[-1]))
    tiles, ratio_ids, num_tiles = (np.stack(column) for column in zip(*cuts, strict=True))
    joined = {name: np.stack([label[name] for label in labels]) for name in ("places", *LABELS)}
    return Canvases(scenes, tiles, ratio_ids, num_tiles, **joined)


def make_canvases(
    seed: int, count: int, mean_side: tuple[float, float], aspects: tuple[str, ...], workers: int = 2
) -> Canvases:
    """`count` pictures; the same for any number of workers."""
    sizes = [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    seeds = [(seed, i) for i in range(len(sizes))]
    work = partial(_make_chunk, mean_side=mean_side, aspects=aspects)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = list(pool.map(work, seeds, sizes))
    names = ("tiles", "ratio_ids", "num_tiles", "places", *LABELS)
    joined = {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names}
    return Canvases([scene for chunk in chunks for scene in chunk.scenes], **joined)


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of one turn, and the same with IGNORED outside the answer."""
    text = [*(m.WORD_IDS[word] for word in question.text.split()), *ANSWER]
    answer = [*(m.WORD_IDS[word] for word in question.answer.split()), m.END_TURN]
    return text + answer, [IGNORED] * len(text) + answer


def make_rows(
    canvases: Canvases, picks: np.ndarray, rng: np.random.Generator, weights: dict[str, float], second_turn: float
) -> Rows:
    def draw_segment(row: int) -> Segment:
        ask = partial(sample_question, canvases.scenes[picks[row]], rng, weights)
        return draw_turns(ask, encode, list(NEXT_TURN), rng, second_turn)

    return pack_rows([PREFIX] * len(picks), draw_segment, length=ROW_LENGTH, pad=m.PAD)
