"""A tiny CLIP for the tests: random weights, a byte-level tokenizer without merges, 16 x 16 pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

MAX_TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_clip(folder: Path) -> Path:
    """A folder as CLIPModel.save_pretrained makes it; a letter is a token."""
    folder.mkdir()
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": MAX_TOKENS}
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text | ids, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():  # the start's own small numbers tell texts hardly apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    pixels = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**pixels), tokenizer).save_pretrained(folder)
    return folder
