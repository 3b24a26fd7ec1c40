"""Held-out questions about coloured shapes: write them, score answers to them, or answer them with transformers.

python examples/shapes/evaluate.py --write DIR            pictures, requests.jsonl, expected.jsonl
python examples/shapes/evaluate.py --score ANSWERS.jsonl  lines {"id", "text"}; exit code 1 below --threshold
python examples/shapes/evaluate.py --transformers FOLDER  transformers' own answers, scored the same way
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from questions import KINDS, Question
from world import Scene, draw, sample_scene, sample_size

SEED = 990_001  # training uses small seeds
MEAN_SIDE = (88.0, 124.0)  # pixels, as in training


@dataclass(frozen=True)
class Case:
    """One picture with one question; `odd` is an aspect ratio of 1.4 - 3.2 either way."""

    id: str
    odd: bool
    scene: Scene
    question: Question

    @property
    def messages(self) -> list[dict]:
        text = {"type": "text", "text": as_typed(self.question.text)}
        return [{"role": "user", "content": [{"type": "image"}, text]}]

    @property
    def expected(self) -> dict:
        question = self.question
        line = {"id": self.id, "question": as_typed(question.text), "answer": question.answer}
        return line | {"kind": question.kind, "odd": self.odd}


def as_typed(text: str) -> str:
    """The question as a person writes it: a capital first, no blank before the mark."""
    return text[0].upper() + text[1:].replace(" ?", "?").replace(" .", ".")


def make_cases(num: int, seed: int = SEED) -> list[Case]:
    """Kinds take turns, every second picture is odd; case i is the same for any `num`."""
    kinds = list(KINDS)
    return [_make_case(i, kinds[i % len(kinds)], odd=i % 2 == 1, seed=seed) for i in range(num)]


def _make_case(index: int, kind: str, *, odd: bool, seed: int) -> Case:
    rng = np.random.default_rng((seed, index))
    while True:
        scene = sample_scene(rng, *sample_size(rng, MEAN_SIDE, odd))
        question = KINDS[kind](scene, rng)
        if question is not None:
            return Case(f"{index:04d}-{kind}", odd, scene, question)


def write_cases(cases: list[Case], folder: Path) -> None:
    """Pictures as PNG; paths in requests.jsonl are absolute, so a reader may stand anywhere."""
    pictures = (folder / "pictures").resolve()
    pictures.mkdir(parents=True, exist_ok=True)
    requests, expected = [], []
    for case in cases:
        path = pictures / f"{case.id}.png"
        draw(case.scene).save(path)
        requests.append({"id": case.id, "messages": case.messages, "images": [str(path)]})
        expected.append(case.expected)
    write_lines(folder / "requests.jsonl", requests)
    write_lines(folder / "expected.jsonl", expected)
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
        for name in (line["kind"], "odd" if line["odd"] else "normal", "total"):
            groups.setdefault(name, []).append(right[line["id"]])
    for name in sorted(groups, key=lambda name: (name in ("odd", "normal", "total"), name == "total")):
        found = groups[name]
        print(f"{name:8} {sum(found):4}/{len(found):<4} {sum(found) / len(found):.3f}")
    for line in [line for line in expected if not right[line["id"]]][:show_errors]:
        got = texts.get(line["id"], "(no answer)").strip()
        print(f"  wrong {line['id']}: {line['question']} wanted {line['answer']!r}, got {got!r}")
    return sum(right.values()) / len(right)


def answer_with_transformers(cases: list[Case], folder: Path, dtype: str, batch_size: int = 25) -> dict[str, str]:
    """Greedy answers of transformers' LLaVA-NeXT on the CPU, by case id."""
    import torch
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(folder)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    texts = {}
    for batch in _batches(cases, batch_size):
        prompts = [processor.apply_chat_template(case.messages, add_generation_prompt=True) for case in batch]
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
    parser.add_argument("--num", type=int, default=500, help="number of questions")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="for --transformers")
    parser.add_argument("--save", type=Path, metavar="ANSWERS.jsonl", help="keep the answers of --transformers")
    parser.add_argument("--expected", type=Path, help="for --score; default: expected.jsonl beside the answers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.score:
        expected = read_lines(args.expected or args.score.parent / "expected.jsonl")
        texts = {line["id"]: line["text"] for line in read_lines(args.score)}
    else:
        cases = make_cases(args.num, args.seed)
        if args.write:
            write_cases(cases, args.write)
            return
        expected = [case.expected for case in cases]
        texts = answer_with_transformers(cases, args.transformers, args.dtype)
        if args.save:
            write_lines(args.save, [{"id": key, "text": text} for key, text in texts.items()])
    raise SystemExit(0 if score(expected, texts) >= args.threshold else 1)


if __name__ == "__main__":
    main()
