"""Training rows for the small LLaVA-NeXT: tiles and patch labels of many pictures, and batches of packed questions.

One row is a picture followed by as many questions as fit. A question sees the picture and itself only, and its
positions go on from the picture's, so each is answered as if it stood alone in the prompt.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

import model_llava_next as m
from questions import TRAINING_KINDS, WORDS, Question
from world import COLORS, SHAPES, SIZES, Scene, draw, draw_labels, sample_scene, sample_size

MEAN_SIDE = (88.0, 124.0)  # pixels: three or four tiles and the base tile
ROW_LENGTH = 190  # tokens: at most 88 of the picture, about 100 of questions
CHUNK = 250
WORD_IDS = {word: i for i, word in enumerate((*m.SPECIALS, *WORDS))}
NEWLINE = -1


@dataclass
class Pictures:
    """Tiles of all pictures in one array; picture i owns tiles starts[i] to starts[i + 1], the base tile first."""

    scenes: list[Scene]
    tiles: np.ndarray  # (tiles, 3, 56, 56) uint8
    starts: np.ndarray  # (pictures + 1,)
    packs: list[np.ndarray]  # per picture: patch of its own tiles behind each image token, or NEWLINE
    owner: np.ndarray  # (tiles, 16) uint8: object + 1 that covers most of the patch, 0 if none
    coverage: np.ndarray  # (tiles, 16) float32: part of the patch that it covers
    occupancy: np.ndarray  # (tiles, 16, 49) bool: 2 x 2 pixel cells that belong to any object
    looks: np.ndarray  # (tiles, 16, 3) uint8: colour, shape and size of the owner
    centers: np.ndarray  # (tiles, 16, 2) float32: middle of the owner, (x, y) in tile sides from the tile's corner


@cache
def _image_processor():
    return m.build_image_processor()


@cache
def _packer() -> SimpleNamespace:
    return SimpleNamespace(config=m.build_config())


def cut_tiles(image, **kwargs) -> np.ndarray:
    """PIL picture -> (tiles, 3, 56, 56) uint8, cut by the processor itself, neither scaled nor normalized."""
    found = _image_processor()(images=[image], do_rescale=False, do_normalize=False, return_tensors="np", **kwargs)
    return found["pixel_values"][0].astype(np.uint8)


def find_pack(num_tiles: int, width: int, height: int) -> np.ndarray:
    """Patch index of each image token: transformers' own packing, run on index numbers instead of features."""
    patches = m.SIDE * m.SIDE
    indices = torch.arange(num_tiles * patches, dtype=torch.float32).view(num_tiles, patches, 1)
    packed, _ = LlavaNextModel.pack_image_features(
        _packer(), [indices], torch.tensor([[height, width]]), "default", torch.tensor([float(NEWLINE)])
    )
    return packed[0][:, 0].numpy().astype(np.int32)


def _split_patches(tiles: np.ndarray) -> np.ndarray:
    """(tiles, 56, 56) -> (tiles, 16, 14, 14)."""
    cut = tiles.reshape(-1, m.SIDE, m.PATCH, m.SIDE, m.PATCH)
    return cut.transpose(0, 1, 3, 2, 4).reshape(-1, m.SIDE * m.SIDE, m.PATCH, m.PATCH)


def label_patches(scene: Scene) -> dict[str, np.ndarray]:
    """What each patch of each tile shows: the label picture cut like the picture, but by nearest neighbours."""
    labels = _split_patches(cut_tiles(draw_labels(scene).convert("RGB"), resample=0)[:, 0])
    num_items = len(scene.items)
    shares = np.stack([(labels == i + 1).mean((2, 3)) for i in range(num_items)], -1)  # (tiles, 16, objects)
    best = shares.argmax(-1)
    looks = np.array(
        [(list(COLORS).index(i.color), SHAPES.index(i.shape), SIZES.index(i.size)) for i in scene.items], np.uint8
    )
    cells = (labels > 0).reshape(*labels.shape[:2], 7, 2, 7, 2).mean((3, 5)) >= 0.5
    tile_of = np.arange(len(labels))[:, None].repeat(best.shape[1], 1)
    return {
        "owner": np.where(shares.max(-1) > 0, best + 1, 0).astype(np.uint8),
        "coverage": shares.max(-1).astype(np.float32),
        "occupancy": cells.reshape(*labels.shape[:2], 49),
        "looks": looks[best],
        "centers": find_centers(scene)[tile_of, best],
    }


def find_centers(scene: Scene) -> np.ndarray:
    """(tiles, objects, 2): middles of the objects in tile sides from each tile's corner; base tile first."""
    xy = np.array([(item.x, item.y) for item in scene.items])
    target_h, target_w = _best_pinpoint(scene)
    scale = min(target_w / scene.width, target_h / scene.height)
    offset = (np.array([target_w, target_h]) - scale * np.array([scene.width, scene.height])) / 2
    full = (xy * scale + offset) / m.TILE
    corners = [(c, r) for r in range(target_h // m.TILE) for c in range(target_w // m.TILE)]
    base = xy / np.array([scene.width, scene.height])
    return np.stack([base, *(full - np.array(corner) for corner in corners)]).astype(np.float32)


def _best_pinpoint(scene: Scene) -> tuple[int, int]:
    return select_best_resolution((scene.height, scene.width), m.PINPOINTS)


def _make_chunk(seed: tuple[int, int], count: int) -> Pictures:
    rng = np.random.default_rng(seed)
    scenes, tiles, packs, labels = [], [], [], []
    for i in range(count):
        width, height = sample_size(rng, MEAN_SIDE, odd=i % 2 == 0)
        scene = sample_scene(rng, width, height)
        scenes.append(scene)
        tiles.append(cut_tiles(draw(scene)))
        packs.append(find_pack(len(tiles[-1]), width, height))
        labels.append(label_patches(scene))
    starts = np.cumsum([0, *(len(t) for t in tiles)])
    joined = {key: np.concatenate([label[key] for label in labels]) for key in labels[0]}
    return Pictures(scenes=scenes, tiles=np.concatenate(tiles), starts=starts, packs=packs, **joined)


def make_pictures(seed: int, count: int, workers: int = 2) -> Pictures:
    """`count` pictures, half of them with odd aspect ratios; the same for any number of workers."""
    sizes = [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    seeds = [(seed, i) for i in range(len(sizes))]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = list(pool.map(_make_chunk, seeds, sizes))
    shifts = np.cumsum([0, *(chunk.starts[-1] for chunk in chunks)])
    starts = [chunk.starts[:-1] + shift for chunk, shift in zip(chunks, shifts, strict=False)]
    names = ("tiles", "owner", "coverage", "occupancy", "looks", "centers")
    return Pictures(
        scenes=[scene for chunk in chunks for scene in chunk.scenes],
        starts=np.concatenate([*starts, shifts[-1:]]),
        packs=[pack for chunk in chunks for pack in chunk.packs],
        **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names},
    )


@dataclass
class Batch:
    """B rows of ROW_LENGTH tokens; `tile_ids` are the tiles of its pictures, in the order of `patches`."""

    tile_ids: np.ndarray
    ids: torch.Tensor  # (B, L)
    patches: torch.Tensor  # (B, L) patch among the batch's tiles at image tokens, NEWLINE at newlines
    segments: torch.Tensor  # (B, L) 0 picture, 1.. questions, -1 padding
    positions: torch.Tensor  # (B, L)
    targets: torch.Tensor  # (B, L) the next token where it belongs to an answer, else -100
    weights: torch.Tensor  # (B, L) float32, of the targets: every answer weighs one, whatever its length
    kinds: list[list[str]]  # per row, kind of segment 1..


def _encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of one turn, and the same with -100 outside the answer."""
    text = [WORD_IDS[word] for word in question.text.split()] + [m.ASSISTANT]
    answer = [WORD_IDS[word] for word in question.answer.split()] + [m.EOS]
    return text + answer, [-100] * len(text) + answer


def sample_question(scene: Scene, rng: np.random.Generator, weights: dict[str, float]) -> Question:
    names, probabilities = list(weights), np.array(list(weights.values()))
    while True:
        kind = names[int(rng.choice(len(names), p=probabilities / probabilities.sum()))]
        question = TRAINING_KINDS[kind](scene, rng)
        if question is not None:
            return question


def _sample_segment(
    scene: Scene, rng: np.random.Generator, weights: dict[str, float], second_turn: float
) -> tuple[str, list[int], list[int]]:
    """Kind, ids and labels of a segment: one turn, or two of them with probability `second_turn`."""
    question = sample_question(scene, rng, weights)
    ids, labels = _encode(question)
    if rng.random() < second_turn:
        more_ids, more_labels = _encode(sample_question(scene, rng, weights))
        ids, labels = [*ids, m.USER, *more_ids], [*labels, -100, *more_labels]
    return question.kind, ids, labels


def find_weights(targets: np.ndarray) -> np.ndarray:
    """(B, L) float32: one over the length of the answer (a run of targets) that each target belongs to, 0 elsewhere."""
    weights = np.zeros(targets.shape, np.float32)
    for row, answered in enumerate(targets != -100):
        edges = np.flatnonzero(np.diff(answered.astype(np.int8), prepend=0, append=0))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            weights[row, begin:end] = 1 / (end - begin)
    return weights


def make_batch(
    pictures: Pictures,
    picks: np.ndarray,
    rng: np.random.Generator,
    weights: dict[str, float],
    second_turn: float = 0.15,
) -> Batch:
    shape = (len(picks), ROW_LENGTH)
    ids, patches = np.full(shape, m.PAD), np.full(shape, NEWLINE)
    segments, positions, targets = np.full(shape, -1), np.zeros(shape, np.int64), np.full(shape, -100)
    tile_ids, kinds, first_patch = [], [], 0
    for row, pick in enumerate(picks):
        pack, tiles = pictures.packs[pick], np.arange(pictures.starts[pick], pictures.starts[pick + 1])
        start = end = 2 + len(pack)
        ids[row, :end] = [m.BOS, m.USER, *[m.IMAGE] * len(pack)]
        patches[row, 2:end] = np.where(pack == NEWLINE, NEWLINE, pack + first_patch)
        segments[row, :end], positions[row, :end] = 0, np.arange(end)
        kinds.append([])
        kind, new_ids, labels = _sample_segment(pictures.scenes[pick], rng, weights, second_turn)
        while end + len(new_ids) <= ROW_LENGTH:
            span = slice(end, end + len(new_ids))
            kinds[-1].append(kind)
            ids[row, span], segments[row, span] = new_ids, len(kinds[-1])
            positions[row, span] = start + np.arange(len(new_ids))
            targets[row, end : end + len(new_ids) - 1] = labels[1:]
            end += len(new_ids)
            kind, new_ids, labels = _sample_segment(pictures.scenes[pick], rng, weights, second_turn)
        tile_ids.append(tiles)
        first_patch += len(tiles) * m.SIDE * m.SIDE
    tensors = (torch.from_numpy(a) for a in (ids, patches, segments, positions, targets, find_weights(targets)))
    return Batch(np.concatenate(tile_ids), *tensors, kinds)
