"""Write the trained model as a folder with the names and files that the hub's LLaVA-NeXT checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaNextForConditionalGeneration

import model_llava_next as m

# Hub name -> transformers 5 name; the longer prefixes stand first.
PREFIXES = {
    "vision_tower.vision_model.": "model.vision_tower.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}


def to_hub_name(name: str) -> str:
    for hub, ours in PREFIXES.items():
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise ValueError(f"{name}: no hub name known; transformers may have renamed its modules")


def save_checkpoint(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """bfloat16 weights in one file, configuration, tokenizer, processor and generation settings, files of mode 0644."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {to_hub_name(name): value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _save_config(folder)
    _save_processor(folder)
    GenerationConfig(
        bos_token_id=m.BOS, eos_token_id=m.EOS, pad_token_id=m.PAD, max_new_tokens=40, do_sample=False
    ).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def _save_config(folder: Path) -> None:
    """config.json with the keys of the hub's folders: transformers 4 and 5 both read them."""
    config = m.build_config()
    config.architectures = ["LlavaNextForConditionalGeneration"]
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values.pop("dtype", None)
    values |= {"torch_dtype": "bfloat16", "use_image_newline_parameter": True, "vocab_size": m.VOCAB_SIZE}
    values["text_config"].pop("rope_parameters", None)
    values["text_config"]["rope_theta"] = m.TEXT["rope_theta"]
    _write_json(file, values)


def _save_processor(folder: Path) -> None:
    """Tokenizer and processor, with the files that transformers 5 no longer writes and older readers look for."""
    processor = m.build_processor()
    processor.save_pretrained(folder)
    settings = processor.image_processor.to_dict()
    settings |= {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    _write_json(folder / "preprocessor_config.json", settings)
    _write_json(folder / "chat_template.json", {"chat_template": m.CHAT_TEMPLATE})
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("backend", None)
    values["additional_special_tokens"] = values.pop("extra_special_tokens")
    _write_json(file, values | {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    _write_json(folder / "special_tokens_map.json", {name: values[name] for name in names})


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
