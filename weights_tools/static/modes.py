"""Which weights the compiler turns into how many bits.

As published for this model: --int4 is W4BF16 in groups of 64 and --int8 is W8BF16, both for every block (in both its
forms) and the head; embedding and vision encoder stay BF16, the two samplers as they are. A mode may also be given to
some of them: --int4 --int8 0,39,lm_head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmdist.config import UserError
from weights_tools.static.blocks import StaticShape
from weights_tools.static.options import REST

# What model_deploy.py is told for each of options.MODES.
MODES = {"int4": "--quantize W4BF16 --q_group_size 64", "int8": "--quantize W8BF16", "bf16": "--quantize BF16"}
GROUP_SIZE = 64
DEFAULT = "int4"  # that of the published compile.sh
HEAD = "lm_head"
RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Modes:
    """rest: of all parts (block numbers, lm_head) but those in `chosen`."""

    rest: str
    chosen: Mapping[str, str]

    def mode(self, part: str) -> str:
        return self.chosen.get(part, self.rest)

    def used(self, num_layers: int) -> set[str]:
        return {self.mode(part) for part in (*map(str, range(num_layers)), HEAD)}


def read_modes(asked: Mapping[str, str | None], s: StaticShape, num_layers: int, intermediate_size: int) -> Modes:
    """asked: mode -> what was given after it; None: nothing was."""
    rests = [mode for mode, places in asked.items() if places == REST]
    if len(rests) > 1:
        raise UserError(f"--{rests[0]} and --{rests[1]}: both are for all blocks; say after one of them for which")
    chosen: dict[str, str] = {}
    for mode, places in asked.items():
        for part in read_places(mode, places or "", num_layers):
            if part in chosen:
                raise UserError(f"--{mode} {places}: {part} is in --{chosen[part]} too; give it one mode")
            chosen[part] = mode
    modes = Modes(rests[0] if rests else DEFAULT, chosen)
    if asked.get(DEFAULT) and not rests:
        raise UserError(f"--{DEFAULT} {asked[DEFAULT]}: the others are {DEFAULT} too; add --int8 or --bf16 for them")
    check_groups(modes, num_layers, {"hidden_size": s.hidden_size, "intermediate_size": intermediate_size})
    return modes


def read_places(mode: str, places: str, num_layers: int) -> list[str]:
    """0-3,39,lm_head -> its parts."""
    found: list[str] = []
    for word in filter(None, places.split(",")):
        numbers = RANGE.fullmatch(word)
        if word == HEAD:
            found.append(HEAD)
        elif numbers is None or int(numbers[2] or numbers[1]) >= num_layers or int(numbers[1]) > int(numbers[2] or 1e9):
            raise UserError(
                f"--{mode} {places}: {word} is no block; give numbers or ranges up to {num_layers - 1}, {HEAD}"
            )
        else:
            found += map(str, range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
    return found


def check_groups(modes: Modes, num_layers: int, sizes: Mapping[str, int]) -> None:
    """TPU-MLIR 1.30.2 leaves a weight whose rows are no whole groups in BF16 and says nothing."""
    for name, size in sizes.items():
        if "int4" in modes.used(num_layers) and size % GROUP_SIZE:
            raise UserError(f"int4: groups of {GROUP_SIZE} weights, {name} is {size}; use --int8 or --bf16")
