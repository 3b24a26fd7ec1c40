"""The small MiniGPT-4: configuration, words, and a warm start of its decoder."""

from __future__ import annotations

import math
from pathlib import Path

import sentencepiece
import torch
from torch import nn

import model_llava_next as base
from llava_parts import read_base
from mmdist.kernels.kernels import PLAIN
from mmdist.models.minigpt4 import MiniGPT4, MiniGPT4Config
from mmdist.models.minigpt4_processor import PLACEHOLDER, SYSTEM, VICUNA
from mmdist.models.original import MEAN, STD
from mmdist.tp import TP
from questions import WORDS
from rows import WORD_IDS
from sentencepieces import BLANK, BOS, UNK, build_tokenizer
from slots import NUM_PROMPTS
from squares import Form

FORM = Form(tile=84, patch=14, fit="squash", aspects=("normal",))
NORMALIZE = (list(MEAN), list(STD))

MARKS = ("?", ".", ",", ":")
END = "###"  # of a turn
HIDDEN_SIZE = base.TEXT["hidden_size"]
BEGINNINGS = ("What", "Which", "How", "Is", "Describe", "List")


def find_words() -> list[str]:
    """Every piece but the letters: conversations, questions and answers consist of them."""
    system = SYSTEM.replace("<Img>ImageContent</Img>", "").replace(":", "").replace(".", "").split()
    spoken = [word for word in WORDS if word not in MARKS]
    words = dict.fromkeys([*spoken, *BEGINNINGS, *system, "<Img>", "</Img>"])
    inside = ("<Img>", "ImageContent", "</Img>", "Human", "Assistant", END, *MARKS)
    return [*inside, *(BLANK + word for word in words)]


TOKENIZER = build_tokenizer(find_words(), [BLANK, *"abcdefghijklmnopqrstuvwxyz", *"'-!"])
PIECES = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER)
IDS = {word: PIECES.piece_to_id(BLANK + word) for word in WORDS if word not in MARKS}
# Tokens of the small LLaVA-NeXT that stand where these do: an answer begins behind the blank and ends before END.
SAME_PLACE = {"<s>": "<s>", BLANK: "ASSISTANT:", "Human": "USER:", END: "</s>"}


def build_config() -> MiniGPT4Config:
    """Vicuna v0's form: one token, [PAD], beyond the tokenizer's pieces. EVA's heads are 88 wide."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # fmt: skip
    return MiniGPT4Config(
        text_config={name: base.TEXT[name] for name in names} | {"vocab_size": PIECES.vocab_size() + 1},
        image_size=FORM.tile,
        patch_size=FORM.patch,
        vision_width=176,
        vision_intermediate_size=220,
        vision_num_layers=3,
        vision_num_heads=2,
        num_query_tokens=NUM_PROMPTS,
        qformer_width=96,
        qformer_intermediate_size=192,
        qformer_num_layers=4,
        qformer_num_heads=6,
    )


def build_model(base_folder: Path) -> MiniGPT4:
    """On one rank; the decoder is the small LLaVA-NeXT's, the rest random."""
    model = MiniGPT4(build_config(), TP())
    for module in model.modules():
        init_module(module)
        if hasattr(module, "after_load"):
            module.after_load(PLAIN)
    model.load_state_dict(warm_start(model.state_dict(), read_base(base_folder)))
    return model


def init_module(module: nn.Module) -> None:
    """Small random matrices, no biases."""
    for name, parameter in module.named_parameters(recurse=False):
        if "norm" in type(module).__name__.lower():
            nn.init.constant_(parameter, float(name == "weight"))
        elif parameter.ndim == 4:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=1.0 if name == "query_tokens" else 0.05)


def warm_start(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pieces of fused matrices are joined, rows of words are copied by word."""
    for name in [name for name in ours if name.startswith("decoder.")]:
        old = name.replace("decoder.", "model.language_model.")
        if "embed_tokens" in name:
            continue
        elif "qkv_proj" in name:
            ours[name] = torch.cat([theirs[old.replace("qkv", piece)] for piece in "qkv"])
        elif "gate_up_proj" in name:
            ours[name] = torch.cat([theirs[old.replace("gate_up", piece)] for piece in ("gate", "up")])
        else:
            ours[name] = theirs[old]
    for i in range(PIECES.vocab_size()):
        piece = PIECES.id_to_piece(i)
        word = SAME_PLACE.get(piece, piece.lstrip(BLANK).lower())
        if word in WORD_IDS:
            ours["decoder.embed_tokens.weight"][i] = theirs["model.language_model.embed_tokens.weight"][WORD_IDS[word]]
            ours["lm_head.weight"][i] = theirs["lm_head.weight"][WORD_IDS[word]]
    return ours


def split_prompt(turns: list[tuple[str, str]], question: str) -> tuple[list[int], list[int]]:
    """Token ids before and behind the picture of a conversation: questions with their answers, and a last question."""
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    for asked, answered in turns:
        messages += [message("user", asked), message("assistant", answered)]
    before, behind = VICUNA.write([*messages, message("user", question)]).split(PLACEHOLDER)
    return [BOS, *PIECES.encode(before)], PIECES.encode(behind)


def message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


PREFIX = [*split_prompt([], "")[0], *[UNK] * NUM_PROMPTS]


def encode_turns(turns: list[tuple[str, str]], question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids behind the picture up to the answer, and of the answer with its end."""
    asked, answered = split_prompt(turns, question)[1], [*PIECES.encode(answer), PIECES.piece_to_id(END)]
    assert UNK not in asked + answered, f"a word is missing: {question} {answer}"
    return asked, answered
