"""What each patch of a picture shows: labels drawn from the scene, and the loss that teaches them to a vision tower.

Tiles are square and cut into P = (tile / patch)**2 patches, row by row. Labels are arrays over (tiles, P): owner
(uint8: object + 1 that covers most of the patch, 0 if none), coverage (float32: part of the patch that it covers),
occupancy (bool, one per 2 x 2 pixel cell: does it belong to any object), looks (uint8 x 3: colour, shape and size of
the owner) and centers (float32 x 2: middle of the owner, (x, y) in tile sides from the tile's corner).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from world import COLORS, SHAPES, SIZES, Scene

LABELS = ("owner", "coverage", "occupancy", "looks", "centers")
LOOKS = (COLORS, SHAPES, SIZES)
LOOK_WORDS = (*COLORS, *SHAPES, *SIZES)
LOOK_WEIGHTS = (1.0, 2.0, 1.0)
END_WORDS = (("left", "right"), ("top", "bottom"))
ENDS_SLOPE = 8.0  # logits from one side of the picture to the other


def label_tiles(scene: Scene, pixels: np.ndarray, centers: np.ndarray, patch: int) -> dict[str, np.ndarray]:
    """`pixels` (tiles, side, side) is world.draw_labels cut like the picture; `centers` (tiles, objects, 2)."""
    labels = split_patches(pixels, patch)
    num_items, cells = len(scene.items), patch // 2
    shares = np.stack([(labels == i + 1).mean((2, 3)) for i in range(num_items)], -1)  # (tiles, P, objects)
    best = shares.argmax(-1)
    looks = np.array(
        [(list(COLORS).index(i.color), SHAPES.index(i.shape), SIZES.index(i.size)) for i in scene.items], np.uint8
    )
    filled = (labels > 0).reshape(*labels.shape[:2], cells, 2, cells, 2).mean((3, 5)) >= 0.5
    tile_of = np.arange(len(labels))[:, None].repeat(best.shape[1], 1)
    return {
        "owner": np.where(shares.max(-1) > 0, best + 1, 0).astype(np.uint8),
        "coverage": shares.max(-1).astype(np.float32),
        "occupancy": filled.reshape(*labels.shape[:2], cells * cells),
        "looks": looks[best],
        "centers": centers[tile_of, best],
    }


def split_patches(tiles: np.ndarray, patch: int) -> np.ndarray:
    """(tiles, side, side) -> (tiles, P, patch, patch)."""
    side = tiles.shape[-1] // patch
    cut = tiles.reshape(-1, side, patch, side, patch)
    return cut.transpose(0, 1, 3, 2, 4).reshape(-1, side * side, patch, patch)


def pick_labels(pictures: Any, tile_ids: np.ndarray) -> dict[str, torch.Tensor]:
    """The labels of some tiles of a data set that has them as attributes."""
    return {name: torch.from_numpy(getattr(pictures, name)[tile_ids]) for name in LABELS}


def normalize(tiles: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    """(tiles, 3, side, side) uint8 -> float32 as the image processors do it."""
    channel_mean, channel_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (torch.from_numpy(tiles).float() / 255 - channel_mean) / channel_std


class PatchHeads(nn.Module):
    """Training-only readers of the features: object here, middle here, place of the middle, cells of the patch."""

    def __init__(self, hidden_size: int = 128, cells: int = 49, first_size: int | None = None):
        super().__init__()
        self.place = nn.Linear(hidden_size, 4)
        self.cells = nn.Linear(first_size or hidden_size, cells)


class LookHeads(PatchHeads):
    """The same with readers of its own where a word embedding cannot be one."""

    def __init__(self, hidden_size: int = 128, cells: int = 49, first_size: int | None = None):
        super().__init__(hidden_size, cells, first_size)
        self.looks = nn.Linear(hidden_size, len(LOOK_WORDS), bias=False)


def word_readers(embeddings: torch.Tensor, word_ids: dict[str, int]) -> torch.Tensor:
    """(14, hidden) rows that read colour, shape and size: the words' own embeddings, which ties picture to text."""
    return embeddings[[word_ids[word] for word in LOOK_WORDS]]


def word_directions(embeddings: torch.Tensor, word_ids: dict[str, int]) -> torch.Tensor:
    """(2, hidden): left less right, and top less bottom."""
    return torch.stack([embeddings[word_ids[low]] - embeddings[word_ids[high]] for low, high in END_WORDS])


def patch_loss(
    heads: PatchHeads,
    readers: torch.Tensor,
    features: torch.Tensor,
    first: torch.Tensor,
    labels: dict[str, torch.Tensor],
) -> torch.Tensor:
    """What do the patches show? features (tiles, P, hidden) at the end of the tower, first after its first layer."""
    owner, coverage, occupancy, looks, centers = (labels[name] for name in LABELS)
    seen = coverage > 0.15
    loss, begin = features.new_zeros(()), 0
    for i, (words, weight) in enumerate(zip(LOOKS, LOOK_WEIGHTS, strict=True)):
        rows = readers[begin : begin + len(words)]
        loss = loss + weight * F.cross_entropy(features[seen] @ rows.T, looks[..., i][seen].long())
        begin += len(words)
    place = heads.place(features)
    side = round(features.shape[1] ** 0.5)
    index = torch.arange(side * side)
    cell = torch.stack([index % side, index // side], -1)
    here = ((centers * side).floor() == cell).all(-1) & (owner > 0)
    loss = loss + F.binary_cross_entropy_with_logits(place[..., 0], (coverage > 0.3).float())
    loss = loss + 2 * F.binary_cross_entropy_with_logits(place[..., 1], here.float())
    loss = loss + 4 * F.smooth_l1_loss(place[..., 2:][seen], centers[seen], beta=0.1)
    return loss + 3 * F.binary_cross_entropy_with_logits(heads.cells(first), occupancy.float())


def place_loss(directions: torch.Tensor, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far left, and how far up, is the patch's object in a tile that shows the whole picture?

    Read with the words' own embeddings (word_directions). Without it the features hold places faintly: yes/no relations
    were still at chance after 1800 steps of answers.
    """
    seen = labels["coverage"] > 0.15
    features, centers = features[seen], labels["centers"][seen]
    loss = features.new_zeros(())
    for axis, direction in enumerate(directions):
        target = torch.sigmoid(ENDS_SLOPE * (0.5 - centers[:, axis]))
        loss = loss + F.binary_cross_entropy_with_logits(features @ direction, target)
    return loss


@torch.no_grad()
def measure_patches(readers: torch.Tensor, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> str:
    """Accuracy of colour, shape and size on well covered patches."""
    seen = labels["coverage"] > 0.3
    looks, begin, found = labels["looks"][seen].long(), 0, []
    for i, words in enumerate(LOOKS):
        scores = features[seen] @ readers[begin : begin + len(words)].T
        found.append((scores.argmax(-1) == looks[:, i]).float().mean().item())
        begin += len(words)
    return "patches: color {:.3f} shape {:.3f} size {:.3f}".format(*found)
