"""Rank 0 of an LLM as the command line starts it: a job of task=library, whose standard input is our channel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from mmdist.channel import VARIABLE, Channel, open_pair
from mmdist.config import EXIT_USER_ERROR, UserError
from mmdist.invocation import PROGRAM
from mmdist.shipped import PACKAGE

FAREWELL_S = 20  # that a job has to end by itself


class Job:
    """It hears of our end, however we end, through the channel. What it logs goes on to our stderr."""

    def __init__(self, words: Sequence[str]):
        ours, theirs = open_pair()
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, VARIABLE: "0", "PYTHONPATH": os.pathsep.join(paths)}
        self.closed, self.error = False, ""
        with theirs:
            self.process = subprocess.Popen(
                [*PROGRAM, *words],
                stdin=theirs.fileno(),
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is the program's
                text=True,
                errors="replace",
            )
        self.channel = Channel(ours)
        assert self.process.stderr is not None
        self.log = threading.Thread(target=self._pass_on, args=[self.process.stderr], name="mmdist-log", daemon=True)
        self.log.start()

    def _pass_on(self, lines: IO[str]) -> None:
        """Its log to our stderr, but for its error, which we raise."""
        for line in lines:
            if line.startswith("error: "):
                self.error = line.removeprefix("error: ").strip()
            else:
                sys.stderr.write(line)
                sys.stderr.flush()

    def failure(self) -> Exception:
        """Why it has ended, for the program that has just noticed."""
        if self.closed:
            return UserError("this LLM is closed")
        code = self.process.wait()
        self.log.join()
        if code == EXIT_USER_ERROR:
            return UserError(self.error)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return RuntimeError(f"the ranks have ended ({how}): {self.error or 'their log above may say why'}")

    def close(self) -> None:
        self.closed = True
        self.channel.close()
        try:
            self.process.wait(FAREWELL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.join()
