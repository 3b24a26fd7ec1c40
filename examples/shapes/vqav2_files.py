"""Held-out questions about coloured shapes as VQAv2 publishes its own: pictures, questions, and ten people's answers.

python examples/shapes/vqav2_files.py --out DIR
python examples/vqav2/make_arrow.py --src DIR --dst DIR --splits val --answers assets/vlmo-shapes/answer2label.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from families import CLOSED, FAMILIES, as_typed
from questions import KINDS
from world import draw, sample_scene, sample_size

SEED = 990_401  # training uses small seeds
QUESTIONS_PER_PICTURE = 3
PEOPLE = 10


def write_files(folder: Path, num_pictures: int, seed: int = SEED) -> None:
    """val2014/*.png and the two files of val."""
    pictures, questions, annotations = folder / "val2014", [], []
    pictures.mkdir(parents=True, exist_ok=True)
    for image_id in range(num_pictures):
        rng = np.random.default_rng((seed, image_id))
        aspect = FAMILIES["vlmo"].aspects[image_id % len(FAMILIES["vlmo"].aspects)]
        scene = sample_scene(rng, *sample_size(rng, FAMILIES["vlmo"].mean_side, aspect))
        draw(scene).save(pictures / f"COCO_val2014_{image_id:012d}.png")
        kinds = [CLOSED[(image_id + i) % len(CLOSED)] for i in range(QUESTIONS_PER_PICTURE)]
        asked = [question for kind in kinds if (question := KINDS[kind](scene, rng)) is not None]
        for i, question in enumerate(asked):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + i}
            questions.append({**ids, "question": as_typed(question.text)})
            people = [{"answer_id": n + 1, "answer": question.answer} for n in range(PEOPLE)]
            annotations.append({**ids, "multiple_choice_answer": question.answer, "answers": people})
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    print(f"{len(questions)} questions about {num_pictures} pictures in {folder}")


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=100, help="number of pictures")
    args = parser.parse_args()
    write_files(args.out, args.num)


if __name__ == "__main__":
    main()
