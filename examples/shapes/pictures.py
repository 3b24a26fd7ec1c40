"""Draw the bundled pictures (held-out scenes): python examples/shapes/pictures.py --out assets/pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from questions import list_items
from world import Scene, draw, sample_scene

# file name: (seed, width, height, objects)
PICTURES = {
    "shapes.png": (990_101, 420, 180, 4),
    "shapes_tall.png": (990_102, 140, 360, 3),
    "shapes_square.png": (990_103, 224, 224, 3),
    "shapes_wide.png": (990_104, 330, 110, 2),
    "shapes_single.png": (990_105, 112, 96, 1),
}


def make_scene(name: str) -> Scene:
    seed, width, height, num_items = PICTURES[name]
    return sample_scene(np.random.default_rng(seed), width, height, num_items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        scene = make_scene(name)
        draw(scene).save(args.out / name)
        print(f"{args.out / name}: {scene.width}x{scene.height}, {list_items(scene)}")


if __name__ == "__main__":
    main()
