"""How well captions go with their pictures: the cosine of CLIP's features, as MindIE's clip_score scripts have it.

Hessel et al., CLIPScore, arXiv:2104.08718 (without its factor 2.5 and without clipping at zero, as in those scripts).
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from PIL import Image

from mmdist.config import UserError

HAS_OPEN_CLIP = find_spec("open_clip") is not None
BATCH_SIZE = 16
LONGEST = 100_000  # tokens: longer than any answer


class Judge(ABC):
    """Features are (batch, width); tokens are counted with the text's begin and end."""

    max_tokens: int  # more of a text CLIP does not read

    @abstractmethod
    def count_tokens(self, text: str) -> int: ...

    @abstractmethod
    def image_features(self, images: list[Image.Image]) -> torch.Tensor: ...

    @abstractmethod
    def text_features(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        """The texts are cut after max_tokens."""

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[Image.Image, list[str]]], max_tokens: int) -> Iterator[list[float]]:
        """The cosines of each picture with its captions, batch by batch; equally many captions for each picture."""
        source = iter(pairs)
        while batch := list(islice(source, BATCH_SIZE)):
            images = F.normalize(self.image_features([image for image, _ in batch]).float(), dim=-1)
            texts = [text for _, captions in batch for text in captions]
            features = F.normalize(self.text_features(texts, max_tokens).float(), dim=-1)
            yield from torch.einsum("bw,bcw->bc", images, features.view(len(batch), -1, features.shape[1])).tolist()


class TransformersJudge(Judge):
    """A folder of transformers' CLIPModel."""

    def __init__(self, folder: Path, device: str):
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        try:
            loaded: Any = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            self.processor = transformers.AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"judge_checkpoint={folder}: not a whole folder of a CLIPModel ({first_line(error)})"
            ) from error
        model, report = loaded
        if report["missing_keys"]:  # transformers would draw them at random
            raise UserError(f"judge_checkpoint={folder}: no weights for {min(report['missing_keys'])}")
        self.model = model.to(device).eval()
        self.max_tokens = model.config.text_config.max_position_embeddings

    def count_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"])

    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        inputs = self.processor.image_processor(images, return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output

    def text_features(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        tokens = self.processor.tokenizer(
            texts, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt"
        )
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


class OpenClipJudge(Judge):
    """A weight file of open_clip, of the architecture that its name says (ViT-H-14)."""

    def __init__(self, file: Path, architecture: str, device: str):
        open_clip: Any = import_module("open_clip")
        try:
            model, _, self.transform = open_clip.create_model_and_transforms(
                architecture, pretrained=str(file), device=device
            )
        except (OSError, RuntimeError, ValueError, AssertionError, UnpicklingError) as error:
            raise UserError(
                f"judge_checkpoint={file}: not the weights of judge_model={architecture} ({first_line(error)})"
            ) from error
        self.model, self.device = model.eval(), device
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.max_tokens = self.tokenizer.context_length
        self.pad = int(self.tokenizer([""])[0, -1])

    def count_tokens(self, text: str) -> int:
        return int((self.tokenizer([text], context_length=LONGEST)[0] != self.pad).nonzero()[-1]) + 1

    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.encode_image(torch.stack([self.transform(image) for image in images]).to(self.device))

    def text_features(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        tokens = self.tokenizer(texts, context_length=max_tokens)
        tokens = F.pad(tokens, (0, self.max_tokens - max_tokens), value=self.pad)  # the model takes its full length
        return self.model.encode_text(tokens.to(self.device))


def check_judge(checkpoint: Path, architecture: str) -> None:
    """What can be known before weights are read."""
    path = checkpoint / "config.json"
    if checkpoint.is_file():
        check_open_clip(checkpoint, architecture)
    elif not path.exists():
        raise UserError(
            f"judge_checkpoint={checkpoint}: no config.json there; give a folder of transformers' CLIPModel"
        )
    elif find_model_type(path) != "clip":
        raise UserError(f"{path}: model_type is {find_model_type(path)}; a judge's is clip, transformers' CLIPModel")


def check_open_clip(file: Path, architecture: str) -> None:
    if not HAS_OPEN_CLIP:
        raise UserError(
            f"judge_checkpoint={file}: an open_clip file takes open_clip: pip install open_clip_torch; or give a "
            "folder of transformers' CLIPModel"
        )
    if architecture not in import_module("open_clip").list_models():
        raise UserError(f"judge_model={architecture}: not among open_clip.list_models(), such as ViT-H-14")


def open_judge(checkpoint: Path, architecture: str = "ViT-H-14", device: str = "cpu") -> Judge:
    """A CLIPModel folder, or an open_clip file of an architecture."""
    check_judge(checkpoint, architecture)
    if checkpoint.is_file():
        return OpenClipJudge(checkpoint, architecture, device)
    return TransformersJudge(checkpoint, device)


def find_model_type(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    return config.get("model_type") if isinstance(config, dict) else None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def fair_budget(judge: Judge, sides: list[list[str]]) -> int:
    """Tokens that the captions of all sides are cut to when it is not known how many each side was allowed: the
    longest caption of the side that is shortest so, at most what CLIP reads."""
    longest = [max(judge.count_tokens(text) for text in texts) for texts in sides]
    return min(judge.max_tokens, *longest)


def count_cut(judge: Judge, texts: list[str], max_tokens: int) -> int:
    return sum(judge.count_tokens(text) > max_tokens for text in texts)
