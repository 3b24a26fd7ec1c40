"""Us, started as launch.py starts any job; the arguments are launch.py's, beginning with checkpoint=.

The launcher finds a task by its file's name in mmdist.tasks; this file joins them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from serve import Tokens, claim_stdout, serve

import mmdist.tasks
from mmdist.compose import compose_config
from mmdist.config import Config, SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.request import Request
from mmdist.invocation import is_rank
from mmdist.launch import become_rank, run_rank, start
from mmdist.media import load_image
from mmdist.models.base import Prompt

HERE = Path(__file__).resolve()
ON_RANKS = True


def check(config: Config) -> None:
    """Nothing to check: the benchmark writes the arguments."""


def run(config: Config, engine: Engine) -> int:
    """Rank 0's life."""

    def answer(prompts: list[Prompt], new_tokens: int) -> Tokens:
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        requests = (Request(str(number), prompt, params) for number, prompt in enumerate(prompts))
        last = {output.id: output.token_ids for output in engine.generate(requests)}
        return [last[str(number)] for number in range(len(prompts))]

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        return answer([Prompt(token_ids) for token_ids in prompts], new_tokens)

    def picture(text: str, path: str) -> Tokens:
        return answer([engine.prompts.prompt(text=text, images=[load_image(Path(path))])], 1)

    serve(claim_stdout(), generate=generate, picture=picture)
    return 0


def main() -> int:
    mmdist.tasks.__path__.append(str(HERE.parent))
    overrides = ["engine.prefix_cache=false", "engine.embedding_cache_mib=0", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        config = compose_config(["task=chat", f"output_dir={folder}", *overrides])
        config.task = HERE.stem
        if is_rank():
            become_rank(lambda: run_rank(config))
        return start(config, [sys.executable, str(HERE)], overrides)


if __name__ == "__main__":
    sys.exit(main())
