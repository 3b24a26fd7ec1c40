"""VQAv2's own files -> the arrow files that VLMo reads, and answer2label.txt; the same ones at every run.

python examples/vqav2/make_arrow.py --src DIR --dst DIR                     every split
python examples/vqav2/make_arrow.py --src DIR --dst DIR --splits rest_val   what VLMo's evaluation reads

DIR has train2014/, val2014/ and test2015/ with the pictures, v2_OpenEnded_mscoco_*_questions.json and
v2_mscoco_*_annotations.json. The answers are numbered as microsoft/unilm's vlmo/utils/write_vqa.py does: those that are
most people's answer at least nine times in train and val, in the order in which they come; --answers takes a
checkpoint's answer2label.txt instead, and then only the files of the splits asked for are needed. rest_val is the last
thousand pictures of val in an order drawn from --seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from mmdist.config import EXIT_USER_ERROR, UserError
from mmdist.models.vlmo_processor import parse_answer
from mmdist.precision.vqa_answers import normalise

MIN_COUNT = 9
SCORES = (0.0, 0.3, 0.6, 0.9)  # by how many of ten people gave an answer; 1.0 from four on
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
PICTURES_PER_BATCH = 64
SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.list_(pa.string())),
        "answer_labels": pa.list_(pa.list_(pa.int64())),
        "answer_scores": pa.list_(pa.list_(pa.float64())),
        "image_id": pa.int64(),
        "question_id": pa.list_(pa.int64()),
        "split": pa.string(),
    }
)


@dataclass(frozen=True)
class Source:
    """What VQAv2 publishes of a split. part: of its pictures in seeded order, of which `rest` are the last."""

    name: str
    questions: str
    annotations: str | None
    pictures: str
    part: str = "all"


def labelled(name: str, part: str = "all") -> Source:
    files = f"v2_OpenEnded_mscoco_{name}2014_questions.json", f"v2_mscoco_{name}2014_annotations.json"
    return Source(name, *files, f"{name}2014", part)


SPLITS = {
    "train": labelled("train"),
    "val": labelled("val"),
    "trainable_val": labelled("val", "first"),
    "rest_val": labelled("val", "rest"),
    "test": Source("test", "v2_OpenEnded_mscoco_test2015_questions.json", None, "test2015"),
    "test-dev": Source("test-dev", "v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test2015"),
}


def read_entries(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected VQAv2's file with a list of {key} ({type(error).__name__}: {error})"
        ) from error


def count_answers(src: Path) -> dict[str, int]:
    """Label by answer."""
    counts: Counter[str] = Counter()
    for name in ("train", "val"):
        entries = read_entries(src / str(SPLITS[name].annotations), "annotations")
        counts.update(normalise(entry["multiple_choice_answer"]) for entry in tqdm(entries, name, disable=not_shown()))
    return {answer: i for i, answer in enumerate(a for a, count in counts.items() if count >= MIN_COUNT)}


def read_labels(path: Path) -> dict[str, int]:
    """Label by answer; the number of its line, as VLMo reads it."""
    with path.open(encoding="utf-8") as lines:
        return {parse_answer(line, f"{path}: line {i + 1}"): i for i, line in enumerate(lines)}


def write_labels(labels: dict[str, int], path: Path) -> None:
    lines = (json.dumps({"answer": answer, "label": label}) + "\n" for answer, label in labels.items())
    write_whole(path, lambda partial: partial.write_text("".join(lines)))


def read_questions(src: Path, source: Source, labels: dict[str, int]) -> dict[int, list[dict[str, Any]]]:
    """By image_id; of splits with answers only those questions that have one among the labels."""
    answers: dict[int, Counter[str]] = {}
    if source.annotations:
        entries = read_entries(src / source.annotations, "annotations")
        answers = {
            e["question_id"]: Counter(a["answer"] for a in e["answers"] if a["answer"] in labels) for e in entries
        }
    questions = defaultdict(list)
    for entry in read_entries(src / source.questions, "questions"):
        counts = answers.get(entry["question_id"], Counter())
        if counts or not source.annotations:
            questions[entry["image_id"]].append({**entry, "counts": counts})
    return questions


def find_pictures(src: Path, source: Source, wanted: set[int], seed: int, rest: int) -> list[tuple[int, Path]]:
    """(image_id, file) in seeded order; COCO's file names end in _IMAGEID.jpg."""
    folder = src / source.pictures
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    pictures = [(int(path.stem.rpartition("_")[2]), path) for path in files]
    pictures = [picture for picture in pictures if picture[0] in wanted]
    if not pictures:
        raise UserError(f"{folder}: no pictures there that {source.questions} asks about")
    if len(pictures) < len(wanted):
        print(f"{folder}: {len(wanted) - len(pictures)} of {len(wanted)} pictures are not there", file=sys.stderr)
    random.Random(seed).shuffle(pictures)
    if source.part != "all" and len(pictures) <= rest:
        raise UserError(f"{folder}: {len(pictures)} pictures, of which --rest {rest} leaves none; lower it")
    return {"all": pictures, "first": pictures[:-rest], "rest": pictures[-rest:]}[source.part]


def make_row(
    picture: tuple[int, Path], questions: list[dict[str, Any]], source: Source, labels: dict[str, int]
) -> dict:
    image_id, path = picture
    counts = [question["counts"] for question in questions] if source.annotations else []
    return {
        "image": path.read_bytes(),
        "questions": [question["question"] for question in questions],
        "answers": [list(count) for count in counts],
        "answer_labels": [[labels[answer] for answer in count] for count in counts],
        "answer_scores": [[(*SCORES, 1.0)[min(4, n)] for n in count.values()] for count in counts],
        "image_id": image_id,
        "question_id": [question["question_id"] for question in questions],
        "split": source.name,
    }


def batches(rows: Iterator[dict]) -> Iterator[pa.RecordBatch]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == PICTURES_PER_BATCH:
            yield pa.RecordBatch.from_pylist(batch, SCHEMA)
            batch = []
    if batch:
        yield pa.RecordBatch.from_pylist(batch, SCHEMA)


def write_split(args: argparse.Namespace, name: str, labels: dict[str, int]) -> None:
    source, path = SPLITS[name], args.dst / f"vqav2_{name}.arrow"
    questions = read_questions(args.src, source, labels)
    pictures = find_pictures(args.src, source, set(questions), args.seed, args.rest)
    shown = tqdm(pictures, name, unit="picture", disable=not_shown())
    rows = (make_row(picture, questions[picture[0]], source, labels) for picture in shown)

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches(rows):
                writer.write_batch(batch)

    write_whole(path, write)
    print(f"{path}: {len(pictures)} pictures, {sum(len(questions[image]) for image, _ in pictures)} questions")


def write_whole(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    partial.replace(path)


def not_shown() -> bool:
    return not sys.stderr.isatty()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, required=True, help="folder of VQAv2's files")
    parser.add_argument("--dst", type=Path, required=True, help="folder of the arrow files")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--answers", type=Path, help="answer2label.txt of a checkpoint; default: made from train and val"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pictures")
    parser.add_argument("--rest", type=int, default=1000, help="pictures of rest_val")
    args = parser.parse_args()
    try:
        labels = read_labels(args.answers) if args.answers else count_answers(args.src)
        write_labels(labels, args.dst / "answer2label.txt")
        for name in args.splits:
            write_split(args, name, labels)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from error


if __name__ == "__main__":
    main()
