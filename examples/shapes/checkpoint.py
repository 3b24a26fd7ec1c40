"""Write a trained model as a folder with the names and files that the hub's checkpoints of its family have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, ProcessorMixin

# Hub name -> transformers 5 name; the longer prefixes stand first.
LLAVA_PREFIXES = {
    "vision_tower.vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}


def to_hub_name(name: str, prefixes: dict[str, str]) -> str:
    for hub, ours in prefixes.items():
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise ValueError(f"{name}: no hub name known; transformers may have renamed its modules")


def save_weights(model: nn.Module, folder: Path, prefixes: dict[str, str]) -> None:
    """bfloat16 weights in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {to_hub_name(name, prefixes): value for name, value in model.state_dict().items()}
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in values.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_config(config: PretrainedConfig, architecture: str, folder: Path, **extra: Any) -> None:
    """config.json with the keys of the hub's folders: transformers 4 and 5 both read them."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values.pop("dtype", None)
    values |= {"torch_dtype": "bfloat16"} | extra
    rope = values["text_config"].pop("rope_parameters")
    values["text_config"]["rope_theta"] = rope["rope_theta"]
    write_json(file, values)


def save_processor(processor: ProcessorMixin, image_processor_type: str, template: str, folder: Path) -> None:
    """Tokenizer and processor, with the files that transformers 5 no longer writes and older readers look for."""
    processor.save_pretrained(folder)
    settings = processor.image_processor.to_dict()
    settings |= {"image_processor_type": image_processor_type, "processor_class": type(processor).__name__}
    write_json(folder / "preprocessor_config.json", settings)
    write_json(folder / "chat_template.json", {"chat_template": template})
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("backend", None)
    values["additional_special_tokens"] = values.pop("extra_special_tokens")
    write_json(file, values | {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {name: values[name] for name in names})


def save_generation(folder: Path, **token_ids: int | list[int]) -> None:
    GenerationConfig(**token_ids, max_new_tokens=40, do_sample=False).save_pretrained(folder)


def make_readable(folder: Path) -> None:
    """Files of mode 0644; safetensors writes 0600."""
    for file in folder.iterdir():
        file.chmod(0o644)


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
