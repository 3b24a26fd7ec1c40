"""Writes the small MiniGPT-4 as its authors publish theirs: weights_image/, weights_language/ and weights_linear/."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint import make_readable, write_json
from decoder_rows import stored_tensors
from mmdist.models.minigpt4 import MiniGPT4, MiniGPT4Config
from sentencepieces import BOS, EOS, SPECIALS, UNK

# A Q-Former layer's modules -> BERT's names of them.
ATTENTION = {"query": "self.query", "key": "self.key", "value": "self.value",
             "dense": "output.dense", "norm": "output.LayerNorm"}  # fmt: skip
FEED_FORWARD = {
    "mlp.fc1": "intermediate_query.dense",
    "mlp.fc2": "output_query.dense",
    "norm": "output_query.LayerNorm",
}
PAD = "[PAD]"


def save_checkpoint(model: MiniGPT4, tokenizer: bytes, folder: Path) -> None:
    tensors = {name: value.half() for name, value in stored_tensors(model).items()}
    image, language, linear = (folder / f"weights_{name}" for name in ("image", "language", "linear"))
    bert = image / "bert-base-uncased"
    for sub in (bert, language, linear):
        sub.mkdir(parents=True, exist_ok=True)
    tower, norm = take(tensors, "vision.tower."), take(tensors, "vision.tower.ln_vision.")
    save({name: value for name, value in tower.items() if not name.startswith("ln_vision.")}, image / "eva_vit_g.pth")
    qformer = {bert_name(name): value for name, value in take(tensors, "vision.qformer.").items()}
    norm = {f"ln_vision.{name}": value for name, value in norm.items()}
    save({"model": qformer | norm}, image / "blip2_pretrained_flant5xxl.pth")
    projection = {f"llama_proj.{name}": value for name, value in take(tensors, "vision.llama_proj.").items()}
    save({"model": projection}, linear / "pretrained_minigpt4_7b.pth")
    write_json(bert / "config.json", bert_config(model.config))
    decoder = {f"model.{name}": value for name, value in take(tensors, "decoder.").items()}
    save(decoder | {"lm_head.weight": tensors["lm_head.weight"]}, language / "pytorch_model.bin")
    save_language(model.config, tokenizer, language)
    for part in (image, bert, language, linear):
        make_readable(part)


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save(content: dict, path: Path) -> None:
    """Tensors are copied, or a slice would be saved with all that it is a slice of."""
    values = content.get("model", content)
    copies = {name: value.clone() for name, value in values.items()}
    torch.save({"model": copies} if "model" in content else copies, path)


def bert_name(name: str) -> str:
    """layers.0.attention.query.weight -> Qformer.bert.encoder.layer.0.attention.self.query.weight"""
    if name == "query_tokens":
        return name
    if name.startswith("norm."):
        return f"Qformer.bert.embeddings.LayerNorm.{name.removeprefix('norm.')}"
    _, layer, *inner, kind = name.split(".")
    if inner[0] in ("attention", "crossattention"):
        module = f"{inner[0]}.{ATTENTION[inner[1]]}"
    else:
        module = FEED_FORWARD[".".join(inner)]
    return f"Qformer.bert.encoder.layer.{layer}.{module}.{kind}"


def bert_config(config: MiniGPT4Config) -> dict:
    return {
        "architectures": ["BertForMaskedLM"],
        "hidden_act": "gelu",
        "hidden_size": config.qformer_width,
        "intermediate_size": config.qformer_intermediate_size,
        "layer_norm_eps": config.qformer_norm_eps,
        "model_type": "bert",
        "num_attention_heads": config.qformer_num_heads,
        "num_hidden_layers": config.qformer_num_layers,
    }


def save_language(config: MiniGPT4Config, tokenizer: bytes, folder: Path) -> None:
    """What lies beside Vicuna v0's weights; the tokenizer knows nothing of [PAD]."""
    text = config.text_config
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNK}
    names = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
             "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size")  # fmt: skip
    settings = {name: getattr(text, name) for name in names}
    settings |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", **ids}
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "added_tokens.json", {PAD: text.vocab_size - 1})
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    write_json(folder / "special_tokens_map.json", special | {"pad_token": PAD})
    flags = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    write_json(folder / "tokenizer_config.json", special | flags)
    (folder / "tokenizer.model").write_bytes(tokenizer)
