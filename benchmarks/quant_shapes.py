"""What quantisation costs the shipped checkpoints: exact answers on held-out questions, plain and in integers.

python benchmarks/quant_shapes.py [--families llava_next ...]   writes nothing outside build/quant_shapes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WORK = REPOSITORY / "build" / "quant_shapes"
EVALUATE = REPOSITORY / "examples" / "shapes" / "evaluate.py"
CALIBRATION_SEED, NUM_CALIBRATION = 77, 40
GROUP_SIZE = 32
WHOLE_ROWS = ("llama_adapter",)  # whose 344 columns no group divides


def run(*command: str | Path) -> str:
    return subprocess.run([sys.executable, *map(str, command)], check=True, text=True, capture_output=True).stdout


def write_questions(family: str, folder: Path, *more: str) -> Path:
    run(EVALUATE, "--family", family, "--write", folder, *more)
    return folder / "requests.jsonl"


def accuracy(family: str, questions: Path, *overrides: str) -> float:
    """Per cent of exact answers."""
    answers = questions.parent / "answers.jsonl"
    answers.unlink(missing_ok=True)
    settings = (f"model={family}", f"input={questions}", f"output={answers}", "world_size=1", "max_new_tokens=40")
    run(REPOSITORY / "launch.py", "task=generate", f"output_dir={WORK / 'job'}", *settings, *overrides)
    expected = [json.loads(line) for line in (questions.parent / "expected.jsonl").read_text().splitlines()]
    found = {}
    for line in map(json.loads, answers.read_text().splitlines()):
        found[line["id"]] = line.get("answer", line.get("text", "")).strip()
    return 100 * sum(found.get(line["id"]) == line["answer"] for line in expected) / len(expected)


def quantise(family: str, name: str, *words: str | Path) -> Path:
    folder = WORK / family / name
    run("-m", "weights_tools", "quantize", family, "--dst", folder, "--force", *words)
    return folder


def measure(family: str) -> dict[str, float]:
    questions = write_questions(family, WORK / family / "held_out")
    seen = write_questions(
        family, WORK / family / "seen", "--seed", str(CALIBRATION_SEED), "--num", str(NUM_CALIBRATION)
    )
    w8 = quantise(family, "w8a16", "--scheme", "w8a16")
    four = ("--scheme", "w4a16", "--group-size", str(0 if family in WHOLE_ROWS else GROUP_SIZE))
    free, calibrated = quantise(family, "w4a16", *four), quantise(family, "w4a16-c", *four, "--calibration", seen)
    return {
        "plain": accuracy(family, questions),
        "w8a16": accuracy(family, questions, f"checkpoint={w8}"),
        "w4a16": accuracy(family, questions, f"checkpoint={free}"),
        "w4a16 calibrated": accuracy(family, questions, f"checkpoint={calibrated}"),
    }


def main() -> None:
    shipped = sorted(path.name.removesuffix("-shapes") for path in REPOSITORY.glob("assets/*-shapes"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=[name for name in shipped if name != "vlmo_retrieval"])
    for family in parser.parse_args().families:
        figures = measure(family)
        print(f"{family:18}" + "  ".join(f"{name} {value:5.1f} %" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
