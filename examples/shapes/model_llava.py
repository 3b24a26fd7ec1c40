"""The small LLaVA-1.5: configuration and processor; words, tokenizer and chat template are the small LLaVA-NeXT's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import model_llava_next as base
from checkpoint import LLAVA_PREFIXES, make_readable, save_config, save_generation, save_processor, save_weights
from llava_parts import read_base, resize_positions
from squares import Form

FORM = Form(tile=84, patch=14)
POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"


def build_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=base.VISION | {"image_size": FORM.tile},
        text_config=dict(base.TEXT),
        image_token_index=base.IMAGE,
        image_seq_length=FORM.num_patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=base.PAD,
    )


def build_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": FORM.tile},
            crop_size={"height": FORM.tile, "width": FORM.tile},
            image_mean=base.MEAN,
            image_std=base.STD,
        ),
        tokenizer=base.build_tokenizer(),
        patch_size=FORM.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which strategy "default" drops again
        chat_template=base.CHAT_TEMPLATE,
    )


def build_model(base_folder: Path) -> LlavaForConditionalGeneration:
    """The weights of the small LLaVA-NeXT, its position table stretched to the larger tile."""
    weights = read_base(base_folder)
    del weights["model.image_newline"]
    weights[POSITIONS] = resize_positions(weights[POSITIONS], FORM.num_patches)
    model = LlavaForConditionalGeneration(build_config()).to(torch.float32)
    model.load_state_dict(weights)
    return model


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """The hub's layout."""
    save_weights(model, folder, LLAVA_PREFIXES)
    save_config(build_config(), "LlavaForConditionalGeneration", folder, vocab_size=base.VOCAB_SIZE)
    save_processor(build_processor(), "CLIPImageProcessor", base.CHAT_TEMPLATE, folder)
    save_generation(folder, bos_token_id=base.BOS, eos_token_id=base.EOS, pad_token_id=base.PAD)
    make_readable(folder)
