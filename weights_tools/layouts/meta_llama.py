"""Llama as Meta distributes it: params.json, consolidated.NN.pth (model-parallel parts of one model), tokenizer.model.

Names and the order of rope's rows are brought to Hugging Face's: Meta turns neighbouring pairs of a head's numbers,
our decoder pairs each number with the one half a head further on.
Sources: llama/model.py and llama/generation.py of https://github.com/meta-llama/llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.models.original import TOKENIZER, load_pieces
from weights_tools.layouts.source import Deferred, Source, Stored, Tensors

# Meta's name -> (ours, its shape, the dim along which model-parallel files have it cut; None: each has the whole)
Names = dict[str, tuple[str, tuple[str, ...], int | None]]
OUTER: Names = {
    "tok_embeddings": ("decoder.embed_tokens", ("vocab", "hidden"), 1),
    "norm": ("decoder.norm", ("hidden",), None),
    "output": ("lm_head", ("vocab", "hidden"), 0),
}
LAYER: Names = {
    "attention.wq": ("self_attn.q_proj", ("q", "hidden"), 0),
    "attention.wk": ("self_attn.k_proj", ("kv", "hidden"), 0),
    "attention.wv": ("self_attn.v_proj", ("kv", "hidden"), 0),
    "attention.wo": ("self_attn.o_proj", ("hidden", "q"), 1),
    "feed_forward.w1": ("mlp.gate_proj", ("ffn", "hidden"), 0),
    "feed_forward.w2": ("mlp.down_proj", ("hidden", "ffn"), 1),
    "feed_forward.w3": ("mlp.up_proj", ("ffn", "hidden"), 0),
    "attention_norm": ("input_layernorm", ("hidden",), None),
    "ffn_norm": ("post_attention_layernorm", ("hidden",), None),
}
ROTARY = ("attention.wq", "attention.wk")
UNUSED = "rope.freqs"  # a table that follows from the dims
COUNTS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"}
FRACTIONS = {"norm_eps", "ffn_dim_multiplier", "rope_theta"}
NEEDED = {"dim", "n_layers", "n_heads", "norm_eps", "multiple_of"}
RUNNERS = {"max_seq_len", "max_batch_size"}  # settings of Meta's own runner
KNOWN = {"vocab_size"} | COUNTS | FRACTIONS | RUNNERS


@dataclass
class MetaLlama:
    """text_config: for LlamaConfig. tensors: under `decoder.` and `lm_head.`. tokenizer: tokenizer.model.
    ignored: names known to be of no use."""

    text_config: dict[str, Any]
    tensors: dict[str, Stored]
    tokenizer: Path
    ignored: list[str]


def is_meta_llama(folder: Path) -> bool:
    return (folder / "params.json").exists()


def read_meta_llama(source: Source, folder: Path, *, max_position_embeddings: int) -> MetaLlama:
    """max_position_embeddings: not in the files; 2048 in the first Llama, 4096 in Llama 2."""
    tokenizer = find_tokenizer(folder)
    text_config = read_params(source, folder, tokenizer) | {"max_position_embeddings": max_position_embeddings}
    parts = [source.tensors(path) for path in find_parts(folder)]
    ignored = sorted({name for part in parts for name in part.drop(UNUSED)})
    return MetaLlama(text_config, join_parts(parts, text_config), tokenizer, ignored)


def find_parts(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{number:02d}.pth" for number in range(max(1, len(paths)))]
    if [path.name for path in paths] != expected:
        found = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"{folder}: expected {', '.join(expected)}, found {found}; copy all of them there")
    return paths


def find_tokenizer(folder: Path) -> Path:
    """Beside the weights, or in the folder above, where Meta's download puts it."""
    for path in (folder / TOKENIZER, folder.parent / TOKENIZER):
        if path.exists():
            return path
    raise UserError(f"{folder}: no tokenizer.model in it or in {folder.parent}; copy it there")


def load_params(source: Source, path: Path) -> dict[str, Any]:
    """params.json with its keys and numbers checked."""
    params = source.json(path)
    missing, unknown = NEEDED - params.keys(), params.keys() - KNOWN
    if missing or unknown:
        words = f"no {', '.join(sorted(missing))}" if missing else f"unknown key {', '.join(sorted(unknown))}"
        raise UserError(f"{path}: {words}; expected Llama 1 or 2 (of later ones take the Hugging Face folder)")
    for key in params.keys() & COUNTS:
        if type(params[key]) is not int or params[key] < 1:
            raise UserError(f"{path}: {key} is {params[key]!r}, expected a whole number above 0; copy it again")
    for key in params.keys() & FRACTIONS:
        if type(params[key]) not in (int, float) or params[key] <= 0:
            raise UserError(f"{path}: {key} is {params[key]!r}, expected a number above 0; copy it again")
    if params["dim"] % params["n_heads"]:
        raise UserError(f"{path}: dim {params['dim']} does not divide into {params['n_heads']} heads")
    return params


def read_params(source: Source, folder: Path, tokenizer: Path) -> dict[str, Any]:
    """params.json, completed by the tokenizer, in transformers' words."""
    path = folder / "params.json"
    params = load_params(source, path)
    pieces = load_pieces(tokenizer)
    vocab_size = pieces.vocab_size()
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise UserError(f"{path}: vocab_size {params['vocab_size']}, but {tokenizer} has {vocab_size}; one is wrong")
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": params["dim"],
        "intermediate_size": intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
    }


def intermediate_size(params: dict[str, Any]) -> int:
    """Two thirds of 4 dim, times a multiplier in some sizes, rounded up to multiple_of; whole numbers at each step."""
    size = int(2 * 4 * params["dim"] / 3)
    if "ffn_dim_multiplier" in params:
        size = int(params["ffn_dim_multiplier"] * size)
    return params["multiple_of"] * -(-size // params["multiple_of"])


def join_parts(parts: list[Tensors], text_config: dict[str, Any]) -> dict[str, Stored]:
    """The parts' tensors put together, under our names, rows of q and k in our order."""
    head_dim = text_config["hidden_size"] // text_config["num_attention_heads"]
    dims = {
        "vocab": text_config["vocab_size"],
        "hidden": text_config["hidden_size"],
        "q": text_config["hidden_size"],
        "kv": head_dim * text_config["num_key_value_heads"],
        "ffn": text_config["intermediate_size"],
    }
    tensors: dict[str, Stored] = {}
    for stem, (ours, shape, cut_dim) in OUTER.items():
        pieces = take_pieces(parts, f"{stem}.weight", [dims[word] for word in shape], cut_dim)
        tensors[f"{ours}.weight"] = join(pieces, cut_dim)
    for layer in range(text_config["num_hidden_layers"]):
        for stem, (ours, shape, cut_dim) in LAYER.items():
            pieces = take_pieces(parts, f"layers.{layer}.{stem}.weight", [dims[word] for word in shape], cut_dim)
            stored = join(pieces, cut_dim, head_dim if stem in ROTARY else None)
            tensors[f"decoder.layers.{layer}.{ours}.weight"] = stored
    for part in parts:
        part.finish()
    return tensors


def take_pieces(parts: list[Tensors], name: str, shape: list[int], cut_dim: int | None) -> list[torch.Tensor]:
    """The pieces of a tensor of this shape when whole; one is enough where they are copies."""
    wanted = [size // len(parts) if dim == cut_dim else size for dim, size in enumerate(shape)]
    pieces = []
    for part in parts:
        piece = part.take(name)
        if list(piece.shape) != wanted:
            raise UserError(
                f"{part.path}: {name} is {list(piece.shape)}, params.json and tokenizer.model ask for {wanted} in each "
                f"of {len(parts)} files; the files are not of one model, or not all there"
            )
        pieces.append(piece)
    return pieces if cut_dim is not None else pieces[:1]


def join(pieces: list[torch.Tensor], cut_dim: int | None, head_dim: int | None = None) -> Stored:
    """Put together and reordered only when it is written; a lone tensor in our order stays a view of its file."""
    if len(pieces) == 1 and head_dim is None:
        return pieces[0]
    assert cut_dim is not None, "copies are not joined"
    return Deferred(partial(joined, cut_dim=cut_dim, head_dim=head_dim), *pieces)


def joined(*pieces: torch.Tensor, cut_dim: int, head_dim: int | None) -> torch.Tensor:
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut_dim)
    return whole if head_dim is None else half_split(whole, head_dim)


def half_split(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (weight, bias, or the second factor of a LoRA) from neighbouring pairs to half-split pairs."""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
