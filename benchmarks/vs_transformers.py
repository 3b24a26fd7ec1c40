"""Decode and prefill tokens/s beside transformers.generate: the same weights, one process, in turns.

    python benchmarks/vs_transformers.py [--rounds 3] [--threads 2] [--json FILE]

Each round measures the machine's limits, then us and transformers in turn; ratios are taken within a round and their
medians printed, because the absolute figures of a shared machine drift.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_1b import make_bench_1b
from tqdm import tqdm
from transformers import LlavaNextForConditionalGeneration

from mmdist.backend import Backend
from mmdist.config import Config, EngineConfig, ModelConfig, SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.request import Request
from mmdist.models.base import Prompt
from mmdist.performance.limits import read_bandwidth
from mmdist.tp import TP

NEW_TOKENS = 24
CASES = {"decode batch 1": (1, 16), "decode batch 4": (4, 16), "decode batch 10": (10, 16), "prefill 1024": (1, 1024)}


def prompts(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(8, 31000, (batch, length), generator=generator).tolist()


def ours(engine: Engine, token_ids: list[list[int]], new_tokens: int) -> float:
    """Seconds for greedy answers of `new_tokens` to all prompts at once."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    list(engine.generate(Request(str(i), Prompt(ids), params) for i, ids in enumerate(token_ids)))
    return time.perf_counter() - start


@torch.inference_mode()
def theirs(model: LlavaNextForConditionalGeneration, token_ids: list[list[int]], new_tokens: int) -> float:
    ids = torch.tensor(token_ids)
    start = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )  # fmt: skip
    return time.perf_counter() - start


def rate(run: Callable[[list[list[int]], int], float], batch: int, length: int) -> float:
    """Decode: tokens/s after the first token. Prefill: prompt tokens/s to the first token."""
    token_ids = prompts(batch, length)
    first = run(token_ids, 1)
    if length > 100:
        return batch * length / first
    return batch * NEW_TOKENS / (run(token_ids, 1 + NEW_TOKENS) - first)


def measure(engine: Engine, model: LlavaNextForConditionalGeneration, rounds: int) -> list[dict]:
    rows = []
    for number in tqdm(range(-1, rounds), unit="round", disable=not sys.stderr.isatty()):
        for name, (batch, length) in CASES.items():
            row = {"round": number, "case": name, "bandwidth": read_bandwidth()}
            row["mmdist"] = rate(lambda ids, n: ours(engine, ids, n), batch, length)
            row["transformers"] = rate(lambda ids, n: theirs(model, ids, n), batch, length)
            if number >= 0:  # round -1 warms up
                rows.append(row)
    return rows


def report(rows: list[dict], bytes_a_token: int) -> None:
    print(f"{'case':18}{'mmdist tok/s':>14}{'transformers':>14}{'ratio':>8}   share of the memory limit (batch 1)")
    for name in CASES:
        mine = [row for row in rows if row["case"] == name]
        medians = [statistics.median(row[key] for row in mine) for key in ("mmdist", "transformers")]
        ratio = statistics.median(row["mmdist"] / row["transformers"] for row in mine)
        share = statistics.median(row["mmdist"] * bytes_a_token / row["bandwidth"] / 1e9 for row in mine)
        print(
            f"{name:18}{medians[0]:14.1f}{medians[1]:14.1f}{ratio:8.2f}"
            + (f"   {share:.2f}" if name[7:] == "batch 1" else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = make_bench_1b()
    settings = EngineConfig(max_num_seqs=10, max_model_len=2048, prefix_cache=False, embedding_cache_mib=0)
    config = Config(checkpoint=str(folder), model=ModelConfig(name="llava_next"), engine=settings)
    engine = load_engine(config, TP(), Backend(torch.device("cpu"), "gloo"))
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    rows = measure(engine, model, args.rounds)
    llm_bytes = sum(
        p.nbytes for n, p in engine.runner.model.named_parameters() if n.startswith(("decoder.layers", "lm_head"))
    )
    report(rows, llm_bytes)
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
