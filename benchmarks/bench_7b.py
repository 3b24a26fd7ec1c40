"""A LLaVA-1.5 7B in shape, with random weights, in W8A16 on 2 ranks: that it runs in 24 GiB, how fast, in what memory.

    python benchmarks/bench_7b.py [--folder DIR] [KEY=VALUE ...]

The bfloat16 checkpoint (13.5 GB) is made in --folder unless it is there, quantised and cut by weights_tools (7.4 GB)
and run by task=performance, which takes the further keys.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from random_checkpoint import IMAGE_TOKEN_ID, REPOSITORY, Recipe, make_checkpoint
from transformers import LlavaConfig

RANKS = 2
TEXT = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip


def make_bench_7b(folder: Path) -> Path:
    """Write the bfloat16 checkpoint unless it is there; returns its folder."""
    config = LlavaConfig(text_config=TEXT, image_token_index=IMAGE_TOKEN_ID, image_seq_length=576, dtype="bfloat16")
    processor = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "patch_size": 14}
    return make_checkpoint(Recipe("llava", config, processor), folder)


def quantise(source: Path) -> Path:
    """W8A16, cut for RANKS ranks, unless it is there; returns the cut folder."""
    target = source.with_name(f"{source.name}-w8a16")
    cut = target.with_name(f"{target.name}-tp{RANKS}")
    if not cut.exists():
        command = [sys.executable, "-m", "weights_tools", "quantize", "llava", "--scheme", "w8a16"]
        command += ["--src", str(source), "--dst", str(target), "--ranks", str(RANKS), "--force"]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    return cut


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "bench-7b")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of task=performance")
    args = parser.parse_args()
    cut = quantise(make_bench_7b(args.folder.resolve()))
    command = [sys.executable, str(REPOSITORY / "launch.py"), "task=performance", "model=llava", f"checkpoint={cut}"]
    picture = REPOSITORY / "assets" / "pictures" / "shapes.png"
    command += ["batch_sizes=[1,4]", "input_len=640", "output_len=32", "repeats=2", f"image={picture}", *args.keys]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
