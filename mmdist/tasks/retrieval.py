"""Pictures compared with texts: how well each goes with each, and the features behind it, as one .npz."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmdist.config import UserError
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.load import AnyEngine
from mmdist.engine.record import Recorder, record_folder
from mmdist.media import PICTURE_SUFFIXES, find_file, load_image
from mmdist.models.base import EncoderModel, Prompt
from mmdist.models.family import find_model
from mmdist.precision.recall import read_coco_captions
from mmdist.precision.scores import pair_ids
from mmdist.task_config import GenerateConfig

log = logging.getLogger("mmdist.retrieval")


def check(config: GenerateConfig) -> None:
    if not issubclass(find_model(config.model.name), EncoderModel):
        raise UserError(
            f"model={config.model.name}: writes answers and compares nothing; images= and texts= take model=vlmo with "
            "a retrieval checkpoint"
        )
    read_pairs(Path(str(config.images)), Path(str(config.texts)))


def run(config: GenerateConfig, engine: AnyEngine) -> int:
    assert isinstance(engine, EncoderEngine), "check() lets no other model through"
    engine.check_compares()
    pairs = read_pairs(Path(str(config.images)), Path(str(config.texts)))
    images, texts = pairs.images, pairs.texts
    output = Path(config.output) if config.output else Path(str(config.output_dir)) / "scores.npz"
    check_writable(output)
    prompts = [engine.prompts.prompt(images=[], text=text) for text in texts]
    num_truncated = sum(prompt.truncated for prompt in prompts)
    if num_truncated:
        log.warning("%d of %d texts are too long for the model; their ends are left out", num_truncated, len(texts))
    if config.record == "layers":
        engine.recorder = Recorder(record_folder(output), engine.stages())
    names = [name for name, _ in images]
    image_ids, text_ids = pair_ids(names, texts)
    with tqdm(total=len(images) + len(texts), disable=not sys.stderr.isatty()) as bar:
        text_features = gather(engine.features(prompts, text_ids), bar)
        image_features = gather(engine.features(picture_prompts(engine, (file for _, file in images)), image_ids), bar)
    save(
        output,
        logits_per_image=engine.compare(image_features, text_features).numpy(),
        image_features=image_features.numpy(),
        text_features=text_features.numpy(),
        image_names=np.array(names),
        texts=np.array(texts),
        truncated=np.array([prompt.truncated for prompt in prompts]),
    )
    log.info("%d pictures compared with %d texts, scores in %s", len(images), len(texts), output)
    return 0


@dataclass
class Pairs:
    """images: (name, file). image_of_text: the picture each text belongs to, None where that is not known."""

    images: list[tuple[str, Path]]
    texts: list[str]
    image_of_text: list[int] | None


def read_pairs(images: Path, texts: Path) -> Pairs:
    """Of as many texts as pictures each belongs to the picture of its place; COCO's captions say it themselves, and
    only pictures that have captions are taken."""
    listed = list_images(images)
    if texts.suffix != ".json":
        lines = read_lines(texts, "texts")
        return Pairs(listed, lines, list(range(len(lines))) if len(lines) == len(listed) else None)
    names, captions, image_of_text = read_coco_captions(texts)
    files = {file.name: file for _, file in listed}
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(
            f"images={images}: {len(missing)} of the {len(names)} pictures that texts={texts} is about are not there "
            f"(first: {missing[0]})"
        )
    return Pairs([(name, files[name]) for name in names], captions, image_of_text)


def list_images(path: Path) -> list[tuple[str, Path]]:
    """(name, file) of the pictures of a folder, sorted, or of those that a file lists, one a line."""
    if not path.is_dir():
        listed = [(line, find_file(line, path.parent)) for line in read_lines(path, "images")]
        for line, file in listed:
            if not file.exists():
                raise UserError(f"images={path}: {line}: no such picture")
        return listed
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise UserError(f"images={path}: no pictures in it ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return [(file.name, file) for file in files]


def read_lines(path: Path, key: str) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: cannot be read ({error}); give a text file") from error
    if not lines or not all(lines):
        raise UserError(f"{key}={path}: line {len(lines) and lines.index('') + 1} is empty; write one on each line")
    return lines


def check_writable(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial(output).touch()
    except OSError as error:
        raise UserError(f"output={output}: cannot write there ({error.strerror})") from error


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def picture_prompts(engine: EncoderEngine, files: Iterable[Path]) -> Iterator[Prompt]:
    """Read as the engine asks for them, so that no more than a batch of pictures is in memory."""
    for file in files:
        yield engine.prompts.prompt(images=[load_image(file)])


def gather(batches: Iterator[torch.Tensor], bar: tqdm) -> torch.Tensor:
    parts = []
    for batch in batches:
        parts.append(batch)
        bar.update(len(batch))
    return torch.cat(parts)


def save(output: Path, **arrays: np.ndarray) -> None:
    with partial(output).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    partial(output).replace(output)
