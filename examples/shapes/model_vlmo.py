"""The small VLMo: its configuration, words, answers, and its files as microsoft/unilm publishes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdist.kernels.kernels import PLAIN
from mmdist.models.vlmo import Vlmo, VlmoConfig
from mmdist.tp import TP
from questions import ANSWERS, WORDS
from squares import Form
from weights_tools.layouts.vlmo import RENAMES

FORM = Form(tile=96, patch=16, fit="squash", aspects=("normal", "odd"))
MEAN = STD = [0.5, 0.5, 0.5]
# The ids of bert-base-uncased, which upstream's code relies on.
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
SPECIALS = {PAD: "[PAD]", UNK: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", MASK: "[MASK]"}
VOCABULARY = [SPECIALS.get(i, f"[unused{i - 1}]") for i in range(MASK + 1)] + list(WORDS)
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
LABELS = {answer: i for i, answer in enumerate(ANSWERS)}

TEXT_LENS = {"vqa": 14, "retrieval": 18}  # the longest in training; places are relative, so longer ones change nothing
TEXT_LEN = 40
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "vlffn_start": 3,
    "image_size": FORM.tile,
    "patch_size": FORM.patch,
}
FILE_NAMES = {"vqa": "vlmo_base_patch16_96_vqa.pt", "retrieval": "vlmo_base_patch16_96_coco.pt"}


def build_model(head: str) -> Vlmo:
    """A model with fresh weights, on one rank."""
    model = Vlmo(VlmoConfig(head=head, num_answers=len(ANSWERS), max_text_len=TEXT_LENS[head], **SIZES), TP())
    for module in model.modules():
        init_module(module)
    assert model.position_bias is not None
    model.position_bias.after_load(PLAIN)
    return model


def init_module(module: nn.Module) -> None:
    """Small random matrices, no biases; layer scale starts at one, since the model is not deep."""
    constants = {"gamma_1": 1.0, "gamma_2": 1.0, "logit_scale": math.log(1 / 0.07)}
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(parameter, float(name == "weight"))
        elif name in constants:
            nn.init.constant_(parameter, constants[name])
        elif name == "weight" and parameter.ndim == 4:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name in ("weight", "cls_token"):
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.zeros_(parameter)


def encode(text: str) -> list[int]:
    """What the WordPiece tokenizer makes of a text of known words."""
    return [CLS, *(WORD_IDS[word] for word in text.split()), SEP]


def save_checkpoint(model: Vlmo, folder: Path) -> None:
    """Upstream's three files, float16."""
    folder.mkdir(parents=True, exist_ok=True)
    head = model.config.head
    torch.save({name: tensor.half() for name, tensor in upstream_tensors(model).items()}, folder / FILE_NAMES[head])
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in VOCABULARY))
    if head == "vqa":
        lines = [json.dumps({"answer": answer, "label": label}) for answer, label in LABELS.items()]
        (folder / "answer2label.txt").write_text("".join(line + "\n" for line in lines))
    for file in folder.iterdir():
        file.chmod(0o644)


def upstream_tensors(model: Vlmo) -> dict[str, torch.Tensor]:
    """The weights under upstream's names, with what its files have although nothing reads it: positions of the text,
    and the experts for text and picture behind vlffn_start (here copies of the one for both)."""
    prefixes = {ours: theirs for theirs, ours in RENAMES.items()}
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        ours = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
        tensors[prefixes[ours] + name.removeprefix(ours)] = tensor
    for name in [name for name in tensors if "_vl." in name]:
        for expert in ("text", "imag"):
            tensors[name.replace("_vl.", f"_{expert}.")] = tensors[name]
    tensors["text_embeddings.position_embeddings.weight"] = torch.zeros(TEXT_LEN, model.hidden_size)
    return tensors
