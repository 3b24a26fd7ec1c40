"""Load on a server that speaks OpenAI's chat format: questions about pictures, in an open loop (requests arrive as a
Poisson process, whatever has been answered) or a closed one (so many clients, each asking again at its answer).

python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 64 --rate 4 --goodput ttft:500 tpot:50
python benchmarks/serve.py --url http://127.0.0.1:8000 --requests 64 --concurrency 8 --against http://127.0.0.1:8001

The figures have the names of `vllm bench serve --backend openai-chat --save-result`, so that its readers fit; --against
measures a second server in turns with the first and shows the ratios. The server is started by hand, with task=serve.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

PERCENTILES = (50, 90, 99)
KINDS = ("ttft", "tpot", "itl", "e2el")  # first token, per later token of a request, between tokens, the whole answer
BETTER_LOW = tuple(f"{how}_{kind}_ms" for kind in KINDS for how in ("median", "p99"))
BETTER_HIGH = ("request_throughput", "output_throughput")


@dataclass
class Answer:
    """Seconds since the request was sent, but start: since the run began."""

    start: float
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def seconds(self, kind: str) -> list[float]:
        return {"ttft": [self.ttft], "tpot": [self.tpot], "itl": self.itl, "e2el": [self.latency]}[kind]


def make_pictures(count: int, size: int, seed: int) -> list[str]:
    """Data URLs of `count` different pictures: coarse noise, which a PNG does not blow up."""
    rng = np.random.default_rng(seed)
    return [data_url(rng.integers(0, 255, (8, 8, 3), np.uint8), size) for _ in range(count)]


def data_url(coarse: np.ndarray, size: int) -> str:
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_bodies(arguments: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Request i asks about picture i of the shared ones; each has its own words, so that no two prompts are equal."""
    pictures = make_pictures(arguments.pictures, arguments.picture_size, arguments.seed)
    bodies = []
    for i in range(arguments.requests):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"Question {i}: {arguments.prompt}"}]
        if pictures:
            parts.insert(0, {"type": "image_url", "image_url": {"url": pictures[i % len(pictures)]}})
        bodies.append(
            {
                "model": model,
                "messages": [{"role": "user", "content": parts}],
                "max_completion_tokens": arguments.output_len,
                "ignore_eos": True,  # vLLM's key, and ours
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
    return bodies


async def ask(client: httpx.AsyncClient, body: dict[str, Any], began: float) -> Answer:
    sent = last = time.perf_counter()
    answer = Answer(sent - began)
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk, now = json.loads(line[5:]), time.perf_counter()
                if chunk.get("choices"):
                    if answer.ttft:
                        answer.itl.append(now - last)
                    else:
                        answer.ttft = now - sent
                    last = now
                    answer.text += chunk["choices"][0]["delta"].get("content") or ""
                elif usage := chunk.get("usage"):
                    answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                elif "error" in chunk:
                    answer.error = str(chunk["error"])
        answer.latency = last - sent
        answer.error = answer.error or ("" if answer.output_tokens else "no token came")
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def run_load(arguments: argparse.Namespace, url: str) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last answer."""
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=arguments.timeout, limits=limits, headers=headers) as client:
        listed = await client.get("/v1/models")
        listed.raise_for_status()
        bodies = make_bodies(arguments, arguments.model or listed.json()["data"][0]["id"])
        began, places = time.perf_counter(), asyncio.Semaphore(arguments.concurrency or len(bodies))
        rng, tasks = random.Random(arguments.seed), []

        async def one(body: dict[str, Any]) -> Answer:
            async with places:
                return await ask(client, body, began)

        with tqdm(total=len(bodies), unit="request", disable=not sys.stderr.isatty()) as bar:
            for body in bodies:
                tasks.append(asyncio.create_task(one(body)))
                tasks[-1].add_done_callback(lambda _: bar.update())
                if arguments.rate is not None:
                    await asyncio.sleep(rng.expovariate(arguments.rate))
            answers = await asyncio.gather(*tasks)
        return answers, time.perf_counter() - began


def summarise(answers: list[Answer], duration: float, goodput: dict[str, float]) -> dict[str, Any]:
    """goodput: by kind the most milliseconds a request may take to count."""
    good = [answer for answer in answers if not answer.error]
    total_in, total_out = (sum(getattr(a, name) for a in good) for name in ("prompt_tokens", "output_tokens"))
    kept = [a for a in good if all(a.seconds(kind)[0] * 1000 <= most for kind, most in goodput.items())]
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration,
        "request_goodput": len(kept) / duration if goodput else None,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
    }
    for kind in KINDS:
        values = [1000 * value for answer in good for value in answer.seconds(kind)] or [0.0]
        figures |= {f"mean_{kind}_ms": statistics.mean(values), f"median_{kind}_ms": statistics.median(values)}
        figures[f"std_{kind}_ms"] = statistics.pstdev(values)
        figures |= {f"p{p}_{kind}_ms": float(np.percentile(values, p)) for p in PERCENTILES}
    return figures | {
        "input_lens": [a.prompt_tokens for a in answers],
        "output_lens": [a.output_tokens for a in answers],
        "ttfts": [a.ttft for a in answers],
        "itls": [a.itl for a in answers],
        "latencies": [a.latency for a in answers],
        "start_times": [a.start for a in answers],
        "generated_texts": [a.text for a in answers],
        "errors": [a.error for a in answers],
    }


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked, by vLLM's names; a Poisson process has burstiness 1."""
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat",
        "num_prompts": arguments.requests,
        "request_rate": "inf" if arguments.rate is None else arguments.rate,
        "burstiness": 1.0,
        "max_concurrency": arguments.concurrency,
    }


def show(figures: dict[str, Any], name: str) -> None:
    print(f"{name}: {figures['completed']} answered, {figures['failed']} failed in {figures['duration']:.1f} s")
    print(f"  {figures['request_throughput']:.2f} requests/s, {figures['output_throughput']:.1f} tokens/s", end="")
    good = figures["request_goodput"]
    print("" if good is None else f", goodput {good:.2f} requests/s")
    for kind in KINDS:
        numbers = ", ".join(f"{how} {figures[f'{how}_{kind}_ms']:.1f}" for how in ("median", "p90", "p99"))
        print(f"  {kind:5} ms: {numbers}")
    for error in sorted({error for error in figures["errors"] if error}):
        print(f"  error: {error}")


def compare(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Medians over the rounds of (ours / theirs)."""
    names = (*BETTER_HIGH, *BETTER_LOW)
    return {name: statistics.median(ours[name] / (theirs[name] or 1e-9) for ours, theirs in rounds) for name in names}


def parse_goodput(words: list[str]) -> dict[str, float]:
    limits = dict(word.split(":", 1) for word in words)
    unknown = sorted(limits.keys() - {"ttft", "tpot", "e2el"})
    if unknown:
        raise SystemExit(f"--goodput {unknown[0]}: expected ttft:MS, tpot:MS or e2el:MS")
    return {kind: float(most) for kind, most in limits.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--against", help="a second server, measured in turns")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, help="requests a second, as a Poisson process; default: all at once")
    parser.add_argument("--concurrency", type=int, help="requests under way at once; default: no limit")
    parser.add_argument("--pictures", type=int, default=4, help="different pictures, shared by the requests; 0: none")
    parser.add_argument("--picture-size", type=int, default=336)
    parser.add_argument("--prompt", default="what is in the picture?")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--goodput", nargs="+", default=[], metavar="KIND:MS", help="ttft:MS, tpot:MS, e2el:MS")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    arguments = parser.parse_args()
    goodput = parse_goodput(arguments.goodput)
    rounds: list[list[dict[str, Any]]] = []
    for number in range(arguments.rounds):
        rounds.append([])
        arguments.seed += 1  # other pictures: nothing of the round before is in a cache
        for url in filter(None, (arguments.url, arguments.against)):
            try:
                answers, duration = asyncio.run(run_load(arguments, url))
            except httpx.HTTPError as error:
                parser.error(f"{url}: no OpenAI server answers there ({error}); start one with task=serve")
            rounds[-1].append(describe_run(arguments) | summarise(answers, duration, goodput))
            show(rounds[-1][-1], f"round {number + 1}, {url}")
    ratios = compare([(ours, theirs) for ours, theirs in rounds]) if arguments.against else {}
    for name, ratio in ratios.items():
        print(f"{name:20} {ratio:.2f} times the other server's")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"rounds": rounds, "ratios": ratios}, indent=1) + "\n")
    return 1 if any(figures["failed"] for pair in rounds for figures in pair) else 0


if __name__ == "__main__":
    raise SystemExit(main())
