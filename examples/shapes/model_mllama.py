"""The small Llama-3.2-Vision: configuration, tokenizer, processor, and a start from the small LLaVA-NeXT.

intermediate_layers_indices name the INPUT of vision layers, as in Meta's code and transformers 4.46.3, in config.json;
transformers 5 takes the output of the layers named, so its modules are built with indices that are one less.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import model_llava_next as base
from checkpoint import make_readable, save_config, save_generation, save_processor, save_weights
from llava_parts import read_base
from questions import WORDS

VOCAB_SIZE = 128
BEGIN, END, PAD, START_HEADER, END_HEADER, END_MESSAGE, END_TURN = 112, 113, 116, 118, 119, 120, 121
IMAGE = VOCAB_SIZE  # outside lm_head: it can be read, not written
SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 7)),
    "<|image|>",
)
ROLES = ("user", "assistant", "system")
WORD_IDS = {word: i for i, word in enumerate(("<unk>", *WORDS, *ROLES))}
TILE, PATCH, MAX_TILES = base.TILE, base.PATCH, 4
INDICES = [1, 2]  # inputs of these vision layers
CROSS_LAYERS = [1, 3, 5]
NUM_VISION_LAYERS = 3
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
HUB_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def build_config(indices: list[int]) -> MllamaConfig:
    text = {name: value for name, value in base.TEXT.items() if name not in ("model_type", "head_dim")}
    text |= {"num_hidden_layers": base.TEXT["num_hidden_layers"] + len(CROSS_LAYERS), "vocab_size": VOCAB_SIZE}
    text |= {"cross_attention_layers": CROSS_LAYERS, "bos_token_id": BEGIN, "pad_token_id": PAD}
    hidden = base.VISION["hidden_size"]
    vision = {
        "hidden_size": hidden,
        "intermediate_size": base.VISION["intermediate_size"],
        "num_hidden_layers": NUM_VISION_LAYERS,
        "num_global_layers": 1,
        "attention_heads": base.VISION["num_attention_heads"],
        "image_size": TILE,
        "patch_size": PATCH,
        "max_num_tiles": MAX_TILES,
        "intermediate_layers_indices": indices,
        "vision_output_dim": hidden * (1 + len(indices)),
    }
    eos = [END, END_MESSAGE, END_TURN]
    return MllamaConfig(vision_config=vision, text_config=text | {"eos_token_id": eos}, image_token_index=IMAGE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words first, then the specials of Llama 3 in its order."""
    first = VOCAB_SIZE + 1 - len(SPECIALS)
    fillers = {f"<filler_{i}>": i for i in range(len(WORD_IDS), first)}
    specials = {word: first + i for i, word in enumerate(SPECIALS)}
    tokenizer = Tokenizer(models.WordLevel(WORD_IDS | fillers | specials, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", BEGIN)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        unk_token="<unk>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|image|>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(
        size={"height": TILE, "width": TILE}, max_image_tiles=MAX_TILES, image_mean=base.MEAN, image_std=base.STD
    )


def build_processor() -> MllamaProcessor:
    return MllamaProcessor(build_image_processor(), build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_model(base_folder: Path) -> MllamaForConditionalGeneration:
    """Words, self-attention layers and the vision layers' matrices from the small LLaVA-NeXT; the rest is new."""
    weights = read_base(base_folder)
    model = MllamaForConditionalGeneration(build_config([index - 1 for index in INDICES])).to(torch.float32)
    with torch.no_grad():
        _start_words(model, weights)
        _start_decoder(model, weights)
        _start_vision(model.model.vision_model, weights)
    return model


def _start_words(model: MllamaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    old = {word: i for i, word in enumerate((*base.SPECIALS, *WORDS))}
    pairs = {WORD_IDS[word]: old[word] for word in ("<unk>", *WORDS)}
    pairs |= {BEGIN: base.BOS, END_TURN: base.EOS, WORD_IDS["user"]: base.USER, END_HEADER: base.ASSISTANT}
    tables = {
        model.model.language_model.embed_tokens: "model.language_model.embed_tokens.weight",
        model.lm_head: "lm_head.weight",
    }
    for table, name in tables.items():
        for new_id, old_id in pairs.items():
            table.weight[new_id] = weights[name][old_id]


def _start_decoder(model: MllamaForConditionalGeneration, weights: dict[str, torch.Tensor]) -> None:
    """Self-attention layers in their order; a cross-attention layer starts as the layer before it, half open."""
    old, text = 0, model.model.language_model
    for number, layer in enumerate(text.layers):
        is_cross = number in CROSS_LAYERS
        prefix = f"model.language_model.layers.{old - 1 if is_cross else old}."
        values = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if is_cross:
            renamed = {name.replace("self_attn.", "cross_attn."): value for name, value in values.items()}
            layer.load_state_dict(renamed, strict=False)
            for gate in (layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate):
                gate.fill_(0.5)
        else:
            layer.load_state_dict(values)
            old += 1
    text.norm.weight.copy_(weights["model.language_model.norm.weight"])


def _start_vision(vision: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """CLIP's matrices and norms; its attention biases have no place here."""
    tower = "model.vision_tower."
    vision.patch_embedding.weight.copy_(weights[tower + "embeddings.patch_embedding.weight"])
    vision.class_embedding.copy_(weights[tower + "embeddings.class_embedding"])
    vision.gated_positional_embedding.embedding.copy_(weights[tower + "embeddings.position_embedding.weight"])
    for kind in ("weight", "bias"):
        getattr(vision.layernorm_pre, kind).copy_(weights[f"{tower}pre_layrnorm.{kind}"])
    for number, layer in enumerate(vision.transformer.layers):
        prefix = f"{tower}encoder.layers.{number}."
        values = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        names = {"layer_norm1": "input_layernorm", "layer_norm2": "post_attention_layernorm", "out_proj": "o_proj"}
        renamed = {name: values[_rename(name, names)] for name in layer.state_dict()}
        layer.load_state_dict(renamed)
    for layer in vision.global_transformer.layers:
        for gate in (layer.gate_attn, layer.gate_ffn):
            gate.fill_(math.pi / 4)
    for table in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
        table.gate.fill_(0.5)
    vision.gated_positional_embedding.gate.fill_(0.3)


def _rename(name: str, names: dict[str, str]) -> str:
    """CLIP's name of a parameter of the new layers."""
    for old, new in names.items():
        name = name.replace(new, old)
    return name


def save_checkpoint(model: MllamaForConditionalGeneration, folder: Path) -> None:
    """The hub's layout."""
    save_weights(model, folder, HUB_PREFIXES)
    save_config(build_config(INDICES), "MllamaForConditionalGeneration", folder)
    save_processor(build_processor(), "MllamaImageProcessor", CHAT_TEMPLATE, folder)
    eos = [END, END_MESSAGE, END_TURN]
    save_generation(folder, bos_token_id=BEGIN, eos_token_id=eos, pad_token_id=PAD)
    make_readable(folder)
