"""Held-out pictures and their captions, to be matched: write them, or score how they were matched.

python examples/shapes/pairs.py --write DIR          pictures/*.png and texts.txt, caption i for picture i
python examples/shapes/pairs.py --score SCORES.npz   exit code 1 below the threshold in either direction
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from families import FAMILIES
from questions import list_items
from world import Scene, draw, sample_scene, sample_size

SEED = 990_301  # training uses small seeds


def make_pairs(num: int, seed: int = SEED) -> list[tuple[Scene, str]]:
    """Scenes with captions that name all objects, no caption twice."""
    rng, family, captions = np.random.default_rng(seed), FAMILIES["vlmo"], {}
    while len(captions) < num:
        aspect = family.aspects[len(captions) % len(family.aspects)]
        scene = sample_scene(rng, *sample_size(rng, family.mean_side, aspect))
        captions.setdefault(list_items(scene), scene)
    return [(scene, caption) for caption, scene in captions.items()]


def write_pairs(pairs: list[tuple[Scene, str]], folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i, (scene, _) in enumerate(pairs):
        draw(scene).save(folder / "pictures" / f"{i:04d}.png")
    (folder / "texts.txt").write_text("".join(f"{caption}\n" for _, caption in pairs))
    print(f"{len(pairs)} pictures and captions in {folder}")


def score(logits: np.ndarray) -> float:
    """Recall at 1 in the worse direction; logits (pictures, captions), picture i belongs to caption i."""
    index = np.arange(len(logits))
    recalls = {"captions": (logits.argmax(1) == index).mean(), "pictures": (logits.argmax(0) == index).mean()}
    for name, recall in recalls.items():
        print(f"recall@1 of {name}: {recall:.3f}")
    return min(recalls.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="DIR")
    task.add_argument("--score", type=Path, metavar="SCORES.npz")
    parser.add_argument("--num", type=int, default=50, help="number of pairs")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threshold", type=float, default=0.9, help="recall at 1")
    args = parser.parse_args()
    if args.write:
        write_pairs(make_pairs(args.num, args.seed), args.write)
    else:
        raise SystemExit(0 if score(np.load(args.score)["logits_per_image"]) >= args.threshold else 1)


if __name__ == "__main__":
    main()
