"""bench-1B: a LLaVA-NeXT of about 1 B parameters with random weights, made on the spot in the hub's layout.

LLM: hidden 2048, 16 layers, 32 heads, 8 KV heads, MLP 8192, vocabulary 32064 (0.97 B parameters are read for each
token); vision: CLIP ViT-L/14-336. bfloat16, 2.7 GB.
"""

from __future__ import annotations

from pathlib import Path

from random_checkpoint import IMAGE_TOKEN_ID, REPOSITORY, Recipe, make_checkpoint
from transformers import LlavaNextConfig

FOLDER = REPOSITORY / "build" / "bench-1b"
TEXT = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip


def make_bench_1b(folder: Path = FOLDER) -> Path:
    """Write the checkpoint unless it is there; returns its folder."""
    config = LlavaNextConfig(text_config=TEXT, image_token_index=IMAGE_TOKEN_ID, dtype="bfloat16")
    config.architectures = ["LlavaNextForConditionalGeneration"]  # by which vLLM finds the model
    processor = {
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    return make_checkpoint(Recipe("llava_next", config, processor), folder)


if __name__ == "__main__":
    print(make_bench_1b())
