"""The small LLaVA-NeXT-Video: the small LLaVA-NeXT with <video> before <image> in its vocabulary, and a pool."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlavaNextProcessor, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

import model_llava_next as base
from checkpoint import (
    LLAVA_PREFIXES,
    make_readable,
    save_config,
    save_generation,
    save_processor,
    save_weights,
    write_json,
)
from llava_parts import read_base
from squares import Form

FORM = Form(tile=base.TILE, patch=base.PATCH)  # of a frame
NUM_FRAMES = 8
STRIDE = 2
FRAME_TOKENS = (base.SIDE // STRIDE) ** 2
VIDEO = base.IMAGE  # every later id moves up by one
SPECIALS = (*base.SPECIALS[:VIDEO], "<video>", *base.SPECIALS[VIDEO:])
PROCESSOR = "LlavaNextVideoProcessor"
PICTURE_PART = "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
CHAT_TEMPLATE = base.CHAT_TEMPLATE.replace(
    PICTURE_PART, PICTURE_PART + PICTURE_PART.replace("'image'", "'video'").replace("<image>", "<video>")
)


def shift(ids: torch.Tensor) -> torch.Tensor:
    """Token ids of the small LLaVA-NeXT -> ids here; what is no id (negative) stays."""
    return ids + (ids >= VIDEO).to(ids.dtype)


def build_config() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=dict(base.VISION),
        text_config=dict(base.TEXT),
        image_token_index=VIDEO + 1,
        video_token_index=VIDEO,
        image_grid_pinpoints=base.PINPOINTS,
        image_seq_length=base.SIDE * base.SIDE,
        video_seq_length=NUM_FRAMES * FRAME_TOKENS,
        spatial_pool_mode="average",
        spatial_pool_stride=STRIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=base.PAD,
    )


def build_model(base_folder: Path) -> LlavaNextVideoForConditionalGeneration:
    """The weights of the small LLaVA-NeXT; <video> begins as a copy of an unused row."""
    weights = read_base(base_folder)
    rows = torch.tensor([*range(VIDEO), base.VOCAB_SIZE - 1, *range(VIDEO, base.VOCAB_SIZE - 1)])
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][rows]
    model = LlavaNextVideoForConditionalGeneration(build_config()).to(torch.float32)
    model.load_state_dict(weights)
    return model


def pool(features: torch.Tensor) -> torch.Tensor:
    """(frames, P, width) -> (frames, P / 4, width), as transformers' vision_resampler."""
    grid = features.transpose(1, 2).unflatten(2, (base.SIDE, base.SIDE))
    return F.avg_pool2d(grid, STRIDE).flatten(2).transpose(1, 2)


def build_processor() -> LlavaNextProcessor:
    """For pictures; the family's own processor needs torchvision for its videos."""
    return LlavaNextProcessor(
        image_processor=base.build_image_processor(),
        tokenizer=base.build_tokenizer(SPECIALS),
        patch_size=base.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(model: LlavaNextVideoForConditionalGeneration, folder: Path) -> None:
    """The hub's layout, with the names of the family's own processors."""
    save_weights(model, folder, LLAVA_PREFIXES)
    extra = {"use_image_newline_parameter": True, "vocab_size": base.VOCAB_SIZE}
    save_config(build_config(), "LlavaNextVideoForConditionalGeneration", folder, **extra)
    save_processor(build_processor(), "LlavaNextImageProcessor", CHAT_TEMPLATE, folder)
    save_video_processor(folder)
    save_generation(folder, bos_token_id=base.BOS, eos_token_id=base.EOS, pad_token_id=base.PAD)
    make_readable(folder)


def save_video_processor(folder: Path) -> None:
    for name in ("preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
        values = json.loads((folder / name).read_text())
        write_json(folder / name, values | {"processor_class": PROCESSOR})
    settings = json.loads((folder / "processor_config.json").read_text())
    settings.pop("image_processor")  # preprocessor_config.json has it
    write_json(folder / "processor_config.json", settings | {"video_token": "<video>"})
    frames = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("image_grid_pinpoints", "do_pad"):
        frames.pop(name)
    frames |= {"image_processor_type": "LlavaNextVideoImageProcessor"}
    write_json(folder / "video_preprocessor_config.json", frames)
