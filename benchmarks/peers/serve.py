"""A worker's side of the benchmark: one JSON request a line on stdin, one JSON answer a line on stdout.

    {"command": "generate", "prompts": [[token ids]], "new_tokens": n}   greedy, to n tokens each
    {"command": "picture", "text": TEXT, "path": FILE}                   to the first token
    -> {"seconds": s, "tokens": [[token ids] of each prompt]}

Standard library only: each worker runs in the Python of the system it stands for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import IO

Tokens = list[list[int]]


def arguments() -> dict[str, str]:
    """The command line's key=value pairs."""
    return dict(argument.split("=", 1) for argument in sys.argv[1:])


def claim_stdout() -> IO[str]:
    """stdout for answers alone: whatever else the process prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: IO[str], **commands: Callable[..., Tokens]) -> None:
    """Answer until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        command = commands[request.pop("command")]
        start = time.perf_counter()
        tokens = command(**request)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=answers, flush=True)
