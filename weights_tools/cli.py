"""The command line: one verb a file; a mistake of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmdist.config import UserError
from weights_tools import convert, diff, export, inspect, quantize, split, verify

# A verb is a file with add_arguments(parser) and run(args) -> exit code; its first docstring line is its help.
VERBS = {
    "convert": convert, "quantize": quantize, "split": split, "export": export, "inspect": inspect, "verify": verify,
    "diff": diff,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse's parser with its mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="weights_tools", description="Convert, quantise, split, look into and check the checkpoints mmdist reads."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for name, verb in VERBS.items():
        line = (verb.__doc__ or "").partition("\n")[0]
        verb.add_arguments(verbs.add_parser(name, help=line, description=line))
    return parser


def program() -> NoReturn:
    """The console script. Python's own way out takes a second to undo torch's and transformers' imports."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return VERBS[args.verb].run(args)
    except (UserError, OSError) as error:
        print(f"weights_tools {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"weights_tools {args.verb}: interrupted; run it again", file=sys.stderr)
        return 130
