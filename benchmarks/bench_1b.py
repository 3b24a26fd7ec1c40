"""bench-1B: a LLaVA-NeXT of about 1 B parameters with random weights, made on the spot in the hub's layout.

LLM: hidden 2048, 16 layers, 32 heads, 8 KV heads, MLP 8192, vocabulary 32064 (0.97 B parameters are read for each
token); vision: CLIP ViT-L/14-336. bfloat16, 2.7 GB.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlavaNextConfig

from mmdist.models.family import build_model, find_model
from mmdist.plan import shard_plan
from mmdist.tp import TP

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "build" / "bench-1b"
TEXT = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
IMAGE_TOKEN_ID = 4  # <image> in the shapes checkpoint's tokenizer
HUB_NAMES = {
    "decoder.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision.tower.model.": "vision_tower.vision_model.",
    "vision.projector.": "multi_modal_projector.",
    "vision.image_newline": "image_newline",
}


def make_bench_1b(folder: Path = FOLDER) -> Path:
    """Write the checkpoint unless it is there; returns its folder."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = LlavaNextConfig(text_config=TEXT, image_token_index=IMAGE_TOKEN_ID, dtype="bfloat16")
        config.architectures = ["LlavaNextForConditionalGeneration"]  # by which vLLM finds the model
        save_file(random_tensors(config), folder / "model.safetensors", {"format": "pt"})
        shapes = REPOSITORY / "assets" / "llava_next-shapes"
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            shutil.copy(shapes / name, folder / name)
        write_processor(shapes, folder, config)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
        config.save_pretrained(folder)  # last: its presence says that the folder is whole
    return folder


def random_tensors(config: LlavaNextConfig) -> dict[str, torch.Tensor]:
    plan = shard_plan(build_model(find_model("llava_next"), config, TP(), torch.bfloat16), TP())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, placement in plan.items():
        prefix = next(ours for ours in HUB_NAMES if name.startswith(ours))
        noise = torch.empty(placement.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        tensors[HUB_NAMES[prefix] + name.removeprefix(prefix)] = noise + 1 if "norm" in name else noise
    return tensors


def write_processor(shapes: Path, folder: Path, config: LlavaNextConfig) -> None:
    """The shapes checkpoint's processor files with this model's sizes."""
    size = {"shortest_edge": 336}
    changes = {
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "size": size,
        "crop_size": {"height": 336, "width": 336},
    }
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = json.loads((shapes / name).read_text())
        target = settings.get("image_processor", settings)
        target.update({key: value for key, value in changes.items() if key in target})
        (folder / name).write_text(json.dumps(settings))


if __name__ == "__main__":
    print(make_bench_1b())
