"""Training rows for the small LLaVA-NeXT: tiles and patch labels of many pictures, and batches of packed questions."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

import model_llava_next as m
from packing import IGNORED, Rows, Segment, draw_turns, pack_rows, sample_question
from patches import LABELS, label_tiles
from questions import WORDS, Question
from world import Scene, draw, draw_labels, sample_scene, sample_size

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
    owner: np.ndarray  # this and the rest: see patches.py
    coverage: np.ndarray
    occupancy: np.ndarray
    looks: np.ndarray
    centers: np.ndarray


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


def label_patches(scene: Scene) -> dict[str, np.ndarray]:
    """What each patch of each tile shows: the label picture cut like the picture, but by nearest neighbours."""
    pixels = cut_tiles(draw_labels(scene).convert("RGB"), resample=0)[:, 0]
    return label_tiles(scene, pixels, find_centers(scene), m.PATCH)


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
        width, height = sample_size(rng, MEAN_SIDE, "odd" if i % 2 == 0 else "normal")
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
    names = ("tiles", *LABELS)
    return Pictures(
        scenes=[scene for chunk in chunks for scene in chunk.scenes],
        starts=np.concatenate([*starts, shifts[-1:]]),
        packs=[pack for chunk in chunks for pack in chunk.packs],
        **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names},
    )


@dataclass
class Batch(Rows):
    """`tile_ids` are the tiles of the rows' pictures, in the order of `patches`."""

    tile_ids: np.ndarray
    patches: torch.Tensor  # (B, L) patch among the batch's tiles at image tokens, NEWLINE at newlines


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of one turn, and the same with IGNORED outside the answer."""
    text = [WORD_IDS[word] for word in question.text.split()] + [m.ASSISTANT]
    answer = [WORD_IDS[word] for word in question.answer.split()] + [m.EOS]
    return text + answer, [IGNORED] * len(text) + answer


def make_batch(
    pictures: Pictures,
    picks: np.ndarray,
    rng: np.random.Generator,
    weights: dict[str, float],
    second_turn: float = 0.15,
) -> Batch:
    packs = [pictures.packs[pick] for pick in picks]
    prefixes = [[m.BOS, m.USER, *[m.IMAGE] * len(pack)] for pack in packs]

    def draw_segment(row: int) -> Segment:
        ask = partial(sample_question, pictures.scenes[picks[row]], rng, weights)
        return draw_turns(ask, encode, [m.USER], rng, second_turn)

    rows = pack_rows(prefixes, draw_segment, length=ROW_LENGTH, pad=m.PAD)
    tile_ids, patches = locate_patches(pictures, picks, ROW_LENGTH)
    return Batch(**vars(rows), tile_ids=tile_ids, patches=patches)


def locate_patches(pictures: Pictures, picks: np.ndarray, length: int) -> tuple[np.ndarray, torch.Tensor]:
    """Tiles of the pictures, and (B, length): which of their patches is behind each image token of the rows."""
    patches, tile_ids, first_patch = np.full((len(picks), length), NEWLINE), [], 0
    for row, pick in enumerate(picks):
        pack = pictures.packs[pick]
        patches[row, 2 : 2 + len(pack)] = np.where(pack == NEWLINE, NEWLINE, pack + first_patch)
        tile_ids.append(np.arange(pictures.starts[pick], pictures.starts[pick + 1]))
        first_patch += len(tile_ids[-1]) * m.SIDE * m.SIDE
    return np.concatenate(tile_ids), torch.from_numpy(patches)
