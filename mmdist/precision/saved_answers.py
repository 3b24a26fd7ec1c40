"""Files of answers about pictures: ours, and what the five seeds' own scripts write; joined to pictures by name.

MindIE's LLaVA: predict_result.json {path: answer} and gpu_coco_predict.json {file name: answer}; its MiniGPT-4:
{path of the embeddings' .pt: answer}, earlier {"image_file": [...], "model_answer": [...]} or a list of such objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from mmdist.config import UserError

FORMS = (
    'answers.jsonl of task=generate, {picture: answer}, {"image_file": [...], "model_answer": [...]} or a list of '
    '{"image_file", "model_answer"}'
)


def read_texts(path: Path) -> dict[str, str]:
    """Text by id or picture, as the file names it; UserError for a file of no known form or with failed answers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file of answers") from error
    pairs = parse(path, text)
    answers = dict(pairs)
    if not answers:
        raise UserError(f"{path}: no answers in it")
    for name, answer in pairs:
        if not isinstance(answer, str):
            raise UserError(
                f"{path}: the answer of {name} is {type(answer).__name__}, expected text; known are {FORMS}"
            )
        if answers[name] != answer:
            raise UserError(f"{path}: {name} has two different answers")
    return answers


def is_by_picture(path: Path) -> bool:
    """Whether a file is JSON that names pictures; ours has a line with an id for each answer."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, list) or (isinstance(data, dict) and "id" not in data)


def parse(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        return parse_object(path, json.loads(text))
    except json.JSONDecodeError:
        return parse_lines(path, text)


def parse_object(path: Path, data: Any) -> list[tuple[str, Any]]:
    if isinstance(data, dict) and data.keys() >= {"image_file", "model_answer"}:
        files, answers = data["image_file"], data["model_answer"]
        if not isinstance(files, list):
            return [(str(files), answers)]
        if not isinstance(answers, list) or len(files) != len(answers):
            raise UserError(f"{path}: image_file and model_answer are not lists of one length")
        return list(zip(map(str, files), answers, strict=True))
    if isinstance(data, dict) and "id" in data:
        return [parse_line(path, 1, data)]
    if isinstance(data, dict):
        return list(data.items())
    if isinstance(data, list) and all(isinstance(x, dict) and x.keys() >= {"image_file", "model_answer"} for x in data):
        return [pair for entry in data for pair in parse_object(path, entry)]
    raise UserError(f"{path}: not a file of answers; known are {FORMS}")


def parse_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                pairs.append(parse_line(path, number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON; known are {FORMS}") from error
    return pairs


def parse_line(path: Path, number: int, line: Any) -> tuple[str, Any]:
    """A line of task=generate, which has a text, or of a closed set an answer."""
    if not isinstance(line, dict) or "id" not in line:
        raise UserError(f'{path}: line {number}: expected an object with an "id"; known are {FORMS}')
    if "error" in line:
        raise UserError(f"{path}: {line['id']} was not answered ({line['error']}); run it again")
    return str(line["id"]), line.get("answer", line.get("text"))


def join_pictures(answers: dict[str, str], pictures: Iterable[Path]) -> dict[Path, str]:
    """The answer about each picture, by file name; what could be about two pictures, or is about none, is refused.

    Pictures without an answer are left out. An answer about x.pt or x.jpg.pt
    (MiniGPT-4's embeddings) is about x.jpg.
    """
    by_name: dict[str, list[Path]] = {}
    for picture in pictures:
        for name in (picture.name, picture.stem + ".pt", picture.name + ".pt"):
            by_name.setdefault(name, []).append(picture)
    joined: dict[Path, str] = {}
    for key, answer in answers.items():
        picture = find_picture(key, by_name)
        if picture in joined:
            raise UserError(f"{key}: a second answer about {picture.name}; keep one of them in the file")
        joined[picture] = answer
    return joined


def find_picture(key: str, by_name: dict[str, list[Path]]) -> Path:
    found = by_name.get(base_name(key), [])
    if len(found) > 1:
        raise UserError(f"{key}: may be {found[0]} or {found[1]}; give pictures that differ in their names")
    if not found:
        raise UserError(f"{key}: no picture of this name; give the folder of the pictures that these answers are about")
    return found[0]


def base_name(key: str) -> str:
    """Of a path of this system or of Windows."""
    return (PureWindowsPath(key) if "\\" in key else PurePath(key)).name
