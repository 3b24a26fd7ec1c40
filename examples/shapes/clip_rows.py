"""Clips as the small LLaVA-NeXT-Video sees them: one centre-cropped tile a frame, with the labels of every patch."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from PIL import Image

from clips import CLIP_KINDS, Clip, sample_clip
from patches import LABELS, label_tiles
from questions import TRAINING_KINDS, Question
from squares import CHUNK, Form, cut_pixels, cut_tile, find_centers
from world import draw_labels, sample_size


@dataclass
class Clips:
    """Frame f of clip i is tile i * num_frames + f; the labels are those of patches.py."""

    clips: list[Clip]
    tiles: np.ndarray  # (clips * frames, 3, tile, tile) uint8
    owner: np.ndarray
    coverage: np.ndarray
    occupancy: np.ndarray
    looks: np.ndarray
    centers: np.ndarray

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def num_frames(self) -> int:
        return len(self.tiles) // len(self.clips)

    def tile_ids(self, picks: np.ndarray) -> np.ndarray:
        return (picks[:, None] * self.num_frames + np.arange(self.num_frames)).ravel()


def label_clip(clip: Clip, form: Form) -> dict[str, np.ndarray]:
    images = [draw_labels(scene) for scene in clip.scenes]
    pixels = np.stack([np.asarray(cut_tile(image, form, Image.Resampling.NEAREST)) for image in images])
    pairs = zip(clip.scenes, images, strict=True)
    centers = np.concatenate([find_centers(scene, image, form) for scene, image in pairs])
    return label_tiles(clip.scenes[0], pixels, centers, form.patch)


def _make_chunk(seed: tuple[int, int], count: int, form: Form) -> Clips:
    rng = np.random.default_rng(seed)
    clips, tiles, labels = [], [], []
    for i in range(count):
        clips.append(sample_clip(rng, *sample_size(rng, form.mean_side, form.aspects[i % len(form.aspects)])))
        tiles += [cut_pixels(frame, form) for frame in clips[-1].draw()]
        labels.append(label_clip(clips[-1], form))
    return Clips(clips, np.stack(tiles), *(np.concatenate([label[name] for label in labels]) for name in LABELS))


def make_clips(seed: int, count: int, form: Form, workers: int = 2) -> Clips:
    """`count` clips; the same for any number of workers."""
    sizes = [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    seeds = [(seed, i) for i in range(len(sizes))]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = list(pool.map(partial(_make_chunk, form=form), seeds, sizes))
    names = ("tiles", *LABELS)
    clips = [clip for chunk in chunks for clip in chunk.clips]
    return Clips(clips, *(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names))


def sample_clip_question(clip: Clip, rng: np.random.Generator, weights: dict[str, float]) -> Question:
    """A question about the motion, or about what the first frame shows."""
    names, probabilities = list(weights), np.array(list(weights.values()))
    while True:
        kind = names[int(rng.choice(len(names), p=probabilities / probabilities.sum()))]
        of_motion = CLIP_KINDS.get(kind)
        question = of_motion(clip, rng) if of_motion else TRAINING_KINDS[kind](clip.scenes[0], rng)
        if question is not None:
            return question
