"""Vision towers of the published sizes through `weights_tools export --vision onnx`: time, size, peak memory, error.

    python benchmarks/real_towers.py [--towers llava minigpt4 mllama] [--dtypes float16 float32] [--tiles 4]

Random weights in float16: LLaVA's CLIP ViT-L/14 at 336, MiniGPT-4's EVA ViT-g/14 with ln_vision at 224, the tower of
Llama-3.2-11B-Vision at 560, over --tiles of the 4 it has (6432 patches: 20 TFLOP in torch and as many in the graph).
One after the other; what is written is removed again. The export itself compares the graph
with torch, in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from mmdist.models.exported import weight_names
from mmdist.models.family import build_model, find_model
from mmdist.models.minigpt4 import MiniGPT4Config
from mmdist.tp import TP

SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}


def configs(tiles: int = 4) -> dict[str, Any]:
    """As the hub's config.json files have the towers; of the decoders, which are not exported, something small."""
    text = transformers.LlamaConfig(**SMALL_TEXT, num_hidden_layers=1)
    llava = transformers.LlavaConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
    )  # fmt: skip
    ratios = [[1, count] for count in range(1, tiles + 1)] if tiles < 4 else None  # as the hub has them
    vision = transformers.MllamaVisionConfig(image_size=560, max_num_tiles=tiles, supported_aspect_ratios=ratios)
    return {
        "llava": llava,
        "minigpt4": MiniGPT4Config(text_config=text),
        "mllama": transformers.MllamaConfig(vision_config=vision),
    }


def write_tower(family: str, config: Any, folder: Path) -> int:
    """The tower's tensors under the names of the hub's files, and config.json; how many numbers."""
    kind = find_model(family)
    model = build_model(kind, config, TP())
    params, generator = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    names = weight_names(model)  # type: ignore[arg-type]
    tensors = {}
    for name in tqdm(names, desc=folder.name, unit="tensor", disable=not sys.stderr.isatty()):
        noise = torch.empty(params[name].shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        is_scale = noise.dim() == 1 and name.endswith("weight")  # of a norm
        tensors[stored_name(name, kind.renames)] = noise + 1 if is_scale else noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def stored_name(name: str, renames: dict[str, str]) -> str:
    stored = (old + name.removeprefix(new) for old, new in renames.items() if name.startswith(new))
    return next(stored, name)


def export(folder: Path, dtype: str) -> str:
    """A row of the table."""
    dst = folder.with_name(f"{folder.name}-{dtype}")
    command = [sys.executable, "-m", "weights_tools", "export", str(folder), "--vision", "onnx", "--dtype", dtype]
    start = time.perf_counter()
    job = subprocess.Popen([*command, "--dst", str(dst)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(job.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    manifest = json.loads((dst / "vision.json").read_text())
    gib, (errors,) = sum(manifest["files"].values()) / 2**30, manifest["errors"].values()
    peak = used.ru_maxrss / 2**20
    shutil.rmtree(dst)
    error = f"{errors['max_abs']:.2g} | {errors['relative']:.1e}"
    return f"| {folder.name} | {dtype} | {gib:.2f} | {seconds:.0f} | {peak:.1f} | {error} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=list(configs()), default=list(configs()))
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "float32"], default=["float16", "float32"])
    parser.add_argument("--tiles", type=int, choices=range(1, 5), default=4, help="of mllama's pictures; default: 4")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    print("| tower | dtype | files, GiB | export, s | peak memory, GiB | largest difference | of the norm |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="mmdist-", dir=args.folder) as temp:
        for family in args.towers:
            folder = Path(temp) / family
            folder.mkdir()
            write_tower(family, configs(args.tiles)[family], folder)
            for dtype in args.dtypes:
                print(export(folder, dtype), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
