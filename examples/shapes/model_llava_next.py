"""The small LLaVA-NeXT: its configuration, tokenizer and processor."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from checkpoint import LLAVA_PREFIXES, make_readable, save_config, save_generation, save_processor, save_weights
from questions import WORDS

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIALS))
VOCAB_SIZE = 128

TILE = 56  # pixels
PATCH = 14
SIDE = TILE // PATCH  # patches along a tile's side
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # (height, width)
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "image_size": TILE,
    "patch_size": PATCH,
    "projection_dim": 128,
    "hidden_act": "quick_gelu",
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def build_config() -> LlavaNextConfig:
    """1.4 million parameters; every width is divisible by 8 ranks, the KV heads by 4."""
    return LlavaNextConfig(
        vision_config=dict(VISION),
        text_config=dict(TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )


def build_tokenizer(specials: tuple[str, ...] = SPECIALS) -> PreTrainedTokenizerFast:
    """Word level: lower case, split at blanks and punctuation, so "How many circles?" gives known words."""
    words = {word: i for i, word in enumerate((*specials, *WORDS))}
    assert len(words) == len(specials) + len(WORDS) <= VOCAB_SIZE, "the words must be distinct and fit the vocabulary"
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Not normalized: the lower-casing would hide "USER:" from the tokenizer.
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(specials[4:]),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN,
        image_std=STD,
    )


def build_processor() -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=build_image_processor(),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which strategy "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """The hub's layout."""
    save_weights(model, folder, LLAVA_PREFIXES)
    extra = {"use_image_newline_parameter": True, "vocab_size": VOCAB_SIZE}
    save_config(build_config(), "LlavaNextForConditionalGeneration", folder, **extra)
    save_processor(build_processor(), "LlavaNextImageProcessor", CHAT_TEMPLATE, folder)
    save_generation(folder, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    make_readable(folder)
