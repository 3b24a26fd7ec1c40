"""Draw the bundled pictures and the clip (held-out scenes): python examples/shapes/pictures.py --out assets."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from clips import Clip, sample_clip
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
CLIP = (990_201, 104, 104, 3)  # seed, width, height, objects


def make_scene(name: str) -> Scene:
    seed, width, height, num_items = PICTURES[name]
    return sample_scene(np.random.default_rng(seed), width, height, num_items)


def make_clip() -> Clip:
    seed, width, height, num_items = CLIP
    return sample_clip(np.random.default_rng(seed), width, height, num_items=num_items)


def draw_pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        scene = make_scene(name)
        draw(scene).save(folder / name)
        print(f"{folder / name}: {scene.width}x{scene.height}, {list_items(scene)}")


def draw_clip(folder: Path) -> None:
    """shapes.npy, and shapes.txt with the answer to "Which object moves?"."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = make_clip()
    frames = np.stack([np.asarray(frame) for frame in clip.draw()])
    np.save(folder / "shapes.npy", frames)
    mover = f"the {clip.scenes[0].items[clip.mover].name}"
    (folder / "shapes.txt").write_text(mover + "\n")
    print(f"{folder / 'shapes.npy'}: {frames.shape}, {list_items(clip.scenes[0])}; {mover} moves {clip.direction}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures/ and clips/")
    args = parser.parse_args()
    draw_pictures(args.out / "pictures")
    draw_clip(args.out / "clips")


if __name__ == "__main__":
    main()
