"""The language model of a Llama-based checkpoint in Hugging Face's layout as GGUF, for llama.cpp.

    PYTHON_WITH_GGUF benchmarks/peers/write_gguf.py CHECKPOINT FILE.gguf bf16|q8_0|q4_0

In bfloat16 with norms in float32; the other types are made of that by llama.cpp's own quantiser with its defaults
(q4_0: the head in six bits). No tokenizer: the benchmark sends token ids. Needs numpy, gguf and llama_cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

QUANTISED = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
PREFIX = "language_model."
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Path, target: Path, kind: str) -> None:
    if kind == "bf16":
        write_bfloat16(checkpoint, target)
        return
    whole = target.with_name(f"{target.name}.bf16")
    write_bfloat16(checkpoint, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTISED[kind]
    code = llama_cpp.llama_model_quantize(str(whole).encode(), str(target).encode(), params)
    whole.unlink()
    assert code == 0, f"llama_model_quantize: {code}"


def write_bfloat16(checkpoint: Path, target: Path) -> None:
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    add_shape(writer, text)
    matrix_type = gguf.GGMLQuantizationType.BF16
    for name, tensor in bfloat16_tensors(checkpoint / "model.safetensors"):
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor)
            continue
        tensor = for_rope(name, tensor, text)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: gguf.GGUFWriter, text: dict) -> None:
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def bfloat16_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name without prefix, float32 values) of the language model; numpy has no bfloat16."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = np.memmap(file, np.uint8, "r", 8 + length)
    for name, entry in header.items():
        if name.startswith(PREFIX):
            assert entry["dtype"] == "BF16", f"{name}: {entry['dtype']}, only BF16 is read"
            start, stop = entry["data_offsets"]
            bits = data[start:stop].view(np.uint16).astype(np.uint32) << 16
            yield name.removeprefix(PREFIX), bits.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[rest]}.weight"


def for_rope(name: str, tensor: np.ndarray, text: dict) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, Hugging Face's layout a head's halves: reorder the rows of q and k."""
    heads = {"q_proj": text["num_attention_heads"], "k_proj": text["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
