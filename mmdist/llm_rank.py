"""Rank 0 of an LLM under torchrun: a thread of the program itself, which has torchrun's environment already."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from mmdist.channel import VARIABLE, Channel, open_pair
from mmdist.compose import REFUSALS, compose_config, describe, quote_free_text
from mmdist.config import UserError
from mmdist.launch import become_rank, run_rank


class OwnRank:
    """On the other ranks it does not return: they follow rank 0 and end with it."""

    def __init__(self, words: Sequence[str]):
        def run() -> int:
            try:
                config = compose_config(quote_free_text(list(words)))
            except REFUSALS as error:
                raise UserError(describe(error)) from None
            return run_rank(config)

        if os.environ["RANK"] != "0":
            os.environ[VARIABLE] = ""  # its presence says that a program has started this rank
            become_rank(run)
        ours, theirs = open_pair()
        os.environ[VARIABLE] = str(theirs.detach())
        self.channel, self.closed = Channel(ours), False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=[run], name="mmdist-rank", daemon=True)
        self.thread.start()

    def _run(self, run: Callable[[], int]) -> None:
        try:
            run()
        except Exception as error:
            self.error = error
        finally:
            self.channel.close()
            if dist.is_initialized():
                dist.destroy_process_group()

    def failure(self) -> Exception:
        self.thread.join()
        if self.closed:
            return UserError("this LLM is closed")
        return self.error or RuntimeError("rank 0 has ended")

    def close(self) -> None:
        self.closed = True
        self.channel.close()
        self.thread.join()
