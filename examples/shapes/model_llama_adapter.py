"""The small LLaMA-Adapter: configuration, words, a warm start, and its files in the original layout."""

from __future__ import annotations

import math
from pathlib import Path

import sentencepiece
import torch
from torch import nn

import model_llava_next as base
from llava_parts import read_base, resize_positions
from mmdist.kernels.kernels import PLAIN
from mmdist.models.llama_adapter import LlamaAdapter, LlamaAdapterConfig
from mmdist.models.llama_adapter_processor import PROMPT, PROMPT_WITH_INPUT
from mmdist.models.original import MEAN, STD
from mmdist.tp import TP
from questions import WORDS
from rows import WORD_IDS
from sentencepieces import BLANK, BOS, EOS, UNK, build_tokenizer
from squares import Form

FORM = Form(tile=84, patch=14)
NORMALIZE = (list(MEAN), list(STD))
QUERY_LEN = 10
# LLaMA's rule for the feed-forward width: see weights_tools/layouts/meta_llama.py.
PARAMS = {"dim": 128, "multiple_of": 8, "n_heads": 8, "n_layers": 5, "norm_eps": 1e-5, "vocab_size": -1}
FEED_FORWARD = 344
CLIP = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "projection_dim": 96,
    "image_size": FORM.tile,
    "patch_size": FORM.patch,
}

MARKS = ("?", ".", ",", ":")
HEADINGS = ("Instruction:", "Input:", "Response:")
# Questions begin behind a line break, where no blank stands before the word.
BEGINNINGS = ("What", "Which", "How", "Is", "Describe", "List", "what", "which", "how", "is", "describe", "list")


def find_words() -> list[str]:
    """Every piece but the letters: prompts, questions and answers consist of them."""
    prompt = (PROMPT + PROMPT_WITH_INPUT).format(instruction="", input="").replace("\n", " ")
    found = [word.rstrip(",.") for word in prompt.split() if word not in (*HEADINGS, "###")]
    spoken = [word for word in WORDS if word not in MARKS]
    words = dict.fromkeys([*spoken, *found, *HEADINGS])
    return ["\n", "###", *BEGINNINGS, *MARKS, *(BLANK + word for word in words)]


TOKENIZER = build_tokenizer(find_words(), [BLANK, *"abcdefghijklmnopqrstuvwxyz", *"'-!"])
PIECES = sentencepiece.SentencePieceProcessor(model_proto=TOKENIZER)
IDS = {word: PIECES.piece_to_id(BLANK + word) for word in WORDS if word not in MARKS}
# Tokens of the small LLaVA-NeXT that stand where these do.
SAME_PLACE = {"<s>": "<s>", "</s>": "</s>", BLANK + "Instruction:": "USER:", BLANK + "Response:": "ASSISTANT:"}


def build_config() -> LlamaAdapterConfig:
    text = {
        "hidden_size": PARAMS["dim"],
        "num_attention_heads": PARAMS["n_heads"],
        "num_key_value_heads": PARAMS["n_heads"],
        "num_hidden_layers": PARAMS["n_layers"],
        "intermediate_size": FEED_FORWARD,
        "rms_norm_eps": PARAMS["norm_eps"],
        "vocab_size": PIECES.vocab_size(),
        "attention_bias": True,
        "mlp_bias": True,
    }
    visual = {"v_embed_dim": 80, "v_intermediate_size": 320, "v_depth": 2, "v_num_heads": 16}
    return LlamaAdapterConfig(
        text_config=text, vision_config=dict(CLIP), query_len=QUERY_LEN, query_layer=PARAMS["n_layers"] - 1, **visual
    )


def build_model(base_folder: Path) -> LlamaAdapter:
    """On one rank; what fits is the small LLaVA-NeXT's, the rest random."""
    model = LlamaAdapter(build_config(), TP())
    for module in model.modules():
        init_module(module)
        if hasattr(module, "after_load"):
            module.after_load(PLAIN)
    model.load_state_dict(warm_start(model.state_dict(), read_base(base_folder)))
    for layer in model.decoder.layers:  # the original has no bias on keys and values
        layer.self_attn.qkv_proj.bias.register_hook(lambda grad: grad * (torch.arange(len(grad)) < PARAMS["dim"]))
    return model


def init_module(module: nn.Module) -> None:
    """Small random matrices, no biases; the gates start well open."""
    for name, parameter in module.named_parameters(recurse=False):
        if "norm" in type(module).__name__.lower():
            nn.init.constant_(parameter, float(name == "weight"))
        elif name == "gate":
            nn.init.constant_(parameter, 1.0)
        elif name == "weight" and parameter.ndim == 4:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name == "bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.05)


def warm_start(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """KV heads are repeated and the feed-forward widened, which changes no output; CLIP's heads are other ones."""
    for layer in range(PARAMS["n_layers"]):
        old, new = f"model.language_model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (theirs[f"{old}self_attn.{name}_proj.weight"] for name in "qkv")
        copies = len(q) // len(k)
        k, v = (
            rows.unflatten(0, (-1, base.TEXT["head_dim"])).repeat_interleave(copies, 0).flatten(0, 1) for rows in (k, v)
        )
        ours[f"{new}self_attn.qkv_proj.weight"] = torch.cat([q, k, v])
        ours[f"{new}self_attn.o_proj.weight"] = theirs[f"{old}self_attn.o_proj.weight"]
        gate, up = (theirs[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        ours[f"{new}mlp.gate_up_proj.weight"].unflatten(0, (2, -1))[:, : len(gate)] = torch.stack([gate, up])
        down = theirs[f"{old}mlp.down_proj.weight"]
        ours[f"{new}mlp.down_proj.weight"].zero_()[:, : down.shape[1]] = down
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ours[f"{new}{norm}.weight"] = theirs[f"{old}{norm}.weight"]
    ours["decoder.norm.weight"] = theirs["model.language_model.norm.weight"]
    warm_words(ours, theirs)
    warm_clip(ours, theirs)
    return ours


def warm_words(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for i in range(PIECES.vocab_size()):
        piece = PIECES.id_to_piece(i)
        word = SAME_PLACE.get(piece, piece.lstrip(BLANK).lower())
        if word in WORD_IDS:
            ours["decoder.embed_tokens.weight"][i] = theirs["model.language_model.embed_tokens.weight"][WORD_IDS[word]]
            ours["lm_head.weight"][i] = theirs["lm_head.weight"][WORD_IDS[word]]


def warm_clip(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Layers up to the one LLaVA looks at; the feed-forward's other half is random and adds nothing at first."""
    for name in [name for name in ours if name.startswith("vision.tower.model.")]:
        value = theirs[name.replace("vision.tower.model.", "model.vision_tower.")]
        if "position_embedding" in name:
            ours[name] = resize_positions(value, FORM.num_patches)
        elif "mlp.fc1" in name:
            ours[name][: len(value)] = value
        elif "mlp.fc2.weight" in name:
            ours[name].zero_()[:, : value.shape[1]] = value
        elif "post_layernorm" not in name:
            ours[name] = value


def encode_prompt(question: str) -> list[int]:
    return [BOS, *PIECES.encode(PROMPT.format(instruction=question))]


def find_prefix() -> list[int]:
    """The prompt's tokens up to the question."""
    whole = encode_prompt("what")
    return whole[: whole.index(PIECES.piece_to_id("what"))]


def encode_turn(question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids behind the prefix: the question with the prompt's end, and the answer."""
    whole, prefix = encode_prompt(question), find_prefix()
    assert whole[: len(prefix)] == prefix, "a question begins with a piece of its own"
    answered = [*PIECES.encode(answer), EOS]
    assert UNK not in whole + answered, f"a word is missing: {question} {answer}"
    return whole[len(prefix) :], answered
