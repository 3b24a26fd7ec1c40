"""What each of a picture's ten prompts is to say, so that a decoder which sees nothing else can answer.

Prompt i < 8 is about the object of the i-th colour, of which a picture has one at most; prompt 8 counts; prompt 9 says
what is at the left, right, top and bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from packing import IGNORED
from patches import ENDS_SLOPE, LookHeads
from questions import find_offset
from world import COLORS, SHAPES, SIZES, Scene

COUNTS, ENDS = len(COLORS), len(COLORS) + 1  # the prompts behind the colours'
NUM_PROMPTS = ENDS + 1
NUM_COUNTS, MAX_COUNT = 1 + len(SHAPES) + len(SIZES), 4


@dataclass
class SlotLabels:
    """Of B pictures; IGNORED where there is nothing to say."""

    present: torch.Tensor  # (B, 8) float32
    shapes: torch.Tensor  # (B, 8)
    sizes: torch.Tensor  # (B, 8)
    places: torch.Tensor  # (B, 8, 2) middle of the object, in sides of the picture
    counts: torch.Tensor  # (B, 7): all objects, of each shape, of each size
    ends: torch.Tensor  # (B, 4, 2): colour and shape of the object at each end, where one is clearly ahead


def label_slots(scenes: Sequence[Scene]) -> SlotLabels:
    num = len(scenes)
    labels = SlotLabels(
        torch.zeros(num, len(COLORS)),
        torch.full((num, len(COLORS)), IGNORED),
        torch.full((num, len(COLORS)), IGNORED),
        torch.zeros(num, len(COLORS), 2),
        torch.zeros(num, NUM_COUNTS, dtype=torch.long),
        torch.full((num, 4, 2), IGNORED),
    )
    for i, scene in enumerate(scenes):
        for item in scene.items:
            slot = list(COLORS).index(item.color)
            shape, size = SHAPES.index(item.shape), SIZES.index(item.size)
            labels.present[i, slot] = 1
            labels.shapes[i, slot], labels.sizes[i, slot] = shape, size
            labels.places[i, slot] = torch.tensor([item.x / scene.width, item.y / scene.height])
            labels.counts[i, [0, 1 + shape, 1 + len(SHAPES) + size]] += 1
        label_ends(scene, labels.ends[i])
    return labels


def label_ends(scene: Scene, ends: torch.Tensor) -> None:
    """Fill (4, 2) for left, right, top, bottom."""
    for end in range(4 if len(scene.items) > 1 else 0):
        axis = "xy"[end // 2]
        first, second = sorted(scene.items, key=lambda item: getattr(item, axis), reverse=bool(end % 2))[:2]
        if abs(find_offset(scene, axis)(first, second)) >= 1:
            ends[end] = torch.tensor([list(COLORS).index(first.color), SHAPES.index(first.shape)])


class SlotHeads(LookHeads):
    """Training-only readers of CLIP's features and of the prompts."""

    def __init__(self, clip_size: int, first_size: int, cells: int, hidden_size: int):
        super().__init__(clip_size, cells, first_size)
        self.directions = nn.Linear(clip_size, 2, bias=False)
        self.present = nn.Linear(hidden_size, 1)
        self.spot = nn.Linear(hidden_size, 2)
        self.counts = nn.Linear(hidden_size, NUM_COUNTS * (MAX_COUNT + 1))
        self.ends = nn.Linear(hidden_size, 4 * (len(COLORS) + len(SHAPES)))


def slot_loss(
    heads: SlotHeads, readers: torch.Tensor, directions: torch.Tensor, prompts: torch.Tensor, labels: SlotLabels
) -> torch.Tensor:
    """prompts (B, 10, hidden); readers and directions: patches.word_readers and word_directions."""
    slots, there = prompts[:, :COUNTS], labels.present > 0
    colors, shapes, sizes = (slots[there] @ readers.T).split([len(COLORS), len(SHAPES), len(SIZES)], dim=-1)
    loss = 2 * F.binary_cross_entropy_with_logits(heads.present(slots)[..., 0], labels.present)
    loss = loss + 0.5 * F.cross_entropy(colors, there.nonzero()[:, 1])
    loss = loss + 2 * F.cross_entropy(shapes, labels.shapes[there]) + F.cross_entropy(sizes, labels.sizes[there])
    wanted = torch.sigmoid(ENDS_SLOPE * (0.5 - labels.places[there]))
    loss = loss + 2 * F.binary_cross_entropy_with_logits(slots[there] @ directions.T, wanted)
    loss = loss + 4 * F.smooth_l1_loss(heads.spot(slots[there]), labels.places[there], beta=0.1)
    counts, ends = read_counts(heads, prompts), read_ends(heads, prompts)
    loss = loss + F.cross_entropy(counts.flatten(0, 1), labels.counts.flatten())
    parts = ends.split([len(COLORS), len(SHAPES)], dim=-1)
    for i, part in enumerate(parts):
        loss = loss + F.cross_entropy(part.flatten(0, 1), labels.ends[..., i].flatten(), ignore_index=IGNORED)
    return loss


def read_counts(heads: SlotHeads, prompts: torch.Tensor) -> torch.Tensor:
    """-> (B, 7, 5)"""
    return heads.counts(prompts[:, COUNTS]).unflatten(-1, (NUM_COUNTS, -1))


def read_ends(heads: SlotHeads, prompts: torch.Tensor) -> torch.Tensor:
    """-> (B, 4, 12)"""
    return heads.ends(prompts[:, ENDS]).unflatten(-1, (4, -1))


@torch.no_grad()
def measure_slots(heads: SlotHeads, readers: torch.Tensor, prompts: torch.Tensor, labels: SlotLabels) -> str:
    """Parts of right readings."""
    slots, there = prompts[:, :COUNTS], labels.present > 0
    _, shapes, sizes = (slots[there] @ readers.T).split([len(COLORS), len(SHAPES), len(SIZES)], dim=-1)
    clear = labels.ends[..., 0] != IGNORED
    ends = read_ends(heads, prompts)[clear].split([len(COLORS), len(SHAPES)], dim=-1)
    right = {
        "present": (heads.present(slots)[..., 0] > 0) == there,
        "shape": shapes.argmax(-1) == labels.shapes[there],
        "size": sizes.argmax(-1) == labels.sizes[there],
        "counts": read_counts(heads, prompts).argmax(-1) == labels.counts,
        "ends": ends[0].argmax(-1) == labels.ends[clear][:, 0],
    }
    return "prompts: " + " ".join(f"{name} {np.mean(values.numpy()):.3f}" for name, values in right.items())
