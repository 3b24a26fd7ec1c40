"""Held-out questions about coloured shapes: write them, score answers to them, or answer them with transformers.

python examples/shapes/evaluate.py --write DIR            pictures, requests.jsonl, expected.jsonl
python examples/shapes/evaluate.py --score ANSWERS.jsonl  lines {"id", "text"}; exit code 1 below the threshold
python examples/shapes/evaluate.py --transformers FOLDER  transformers' own answers, scored the same way

--family NAME (families.py) chooses what is drawn and asked, and how requests and answers look.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clips import CLIP_KINDS, sample_clip
from families import FAMILIES, Case, Family, ask_with_picture
from questions import KINDS
from world import ASPECTS, draw, sample_scene, sample_size

SEED = 990_001  # training uses small seeds


def make_cases(num: int, seed: int = SEED, family: Family = FAMILIES["llava_next"]) -> list[Case]:
    """Kinds and aspects take turns; case i is the same for any `num`."""
    kinds, aspects = family.kinds, family.aspects
    return [_make_case(i, kinds[i % len(kinds)], aspects[i % len(aspects)], seed, family) for i in range(num)]


def _make_case(index: int, kind: str, aspect: str, seed: int, family: Family) -> Case:
    rng = np.random.default_rng((seed, index))
    while True:
        size = sample_size(rng, family.mean_side, aspect)
        scene = sample_clip(rng, *size) if family.is_clip else sample_scene(rng, *size)
        question = (CLIP_KINDS if family.is_clip else KINDS)[kind](scene, rng)
        if question is not None:
            return Case(f"{index:04d}-{kind}", aspect, scene, question)


def write_cases(cases: list[Case], folder: Path, family: Family) -> None:
    """requests.jsonl and expected.jsonl, and the pictures or clips as files."""
    pictures = (folder / "pictures").resolve()
    pictures.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "requests.jsonl", [family.request(case, pictures) for case in cases])
    write_lines(folder / "expected.jsonl", [case.expected for case in cases])
    print(f"{len(cases)} questions in {folder}/requests.jsonl")


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def score(expected: list[dict], texts: dict[str, str], show_errors: int = 10) -> float:
    """Part of exact answers after stripping; prints it per kind. A missing answer is a wrong one."""
    right = {line["id"]: texts.get(line["id"], "").strip() == line["answer"] for line in expected}
    groups: dict[str, list[bool]] = {}
    for line in expected:
        for name in (line["kind"], line["aspect"], "total"):
            groups.setdefault(name, []).append(right[line["id"]])
    for name in sorted(groups, key=lambda name: (name in (*ASPECTS, "total"), name == "total")):
        found = groups[name]
        print(f"{name:9} {sum(found):4}/{len(found):<4} {sum(found) / len(found):.3f}")
    for line in [line for line in expected if not right[line["id"]]][:show_errors]:
        got = texts.get(line["id"], "(no answer)").strip()
        print(f"  wrong {line['id']}: {line['question']} wanted {line['answer']!r}, got {got!r}")
    return sum(right.values()) / len(right)


def answer_with_transformers(cases: list[Case], folder: Path, dtype: str, batch_size: int = 25) -> dict[str, str]:
    """Greedy answers of transformers' own model and processor on the CPU, by case id."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    texts = {}
    for batch in _batches(cases, batch_size):
        messages = [ask_with_picture("image", case.text) for case in batch]
        prompts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
        pictures = [draw(case.scene) for case in batch]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.dtype)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts |= {case.id: text.strip() for case, text in zip(batch, answers, strict=True)}
    return texts


def _batches(cases: list[Case], size: int) -> Iterator[list[Case]]:
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="DIR")
    task.add_argument("--score", type=Path, metavar="ANSWERS.jsonl")
    task.add_argument("--transformers", type=Path, metavar="FOLDER")
    parser.add_argument("--family", choices=FAMILIES, default="llava_next")
    parser.add_argument("--num", type=int, help="number of questions; default: the family's")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threshold", type=float, help="part of exact answers; default: the family's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="for --transformers")
    parser.add_argument("--save", type=Path, metavar="ANSWERS.jsonl", help="keep the answers of --transformers")
    parser.add_argument("--expected", type=Path, help="for --score; default: expected.jsonl beside the answers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    family = FAMILIES[args.family]
    if args.score:
        expected = read_lines(args.expected or args.score.parent / "expected.jsonl")
        texts = {line["id"]: line[family.answer_key] for line in read_lines(args.score)}
    else:
        cases = make_cases(args.num or family.num, args.seed, family)
        if args.write:
            write_cases(cases, args.write, family)
            return
        expected = [case.expected for case in cases]
        texts = answer_with_transformers(cases, args.transformers, args.dtype)
        if args.save:
            write_lines(args.save, [{"id": key, "text": text} for key, text in texts.items()])
    threshold = family.threshold if args.threshold is None else args.threshold
    raise SystemExit(0 if score(expected, texts) >= threshold else 1)


if __name__ == "__main__":
    main()
