"""One side of a comparison: a file of answers, and the numbers recorded beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdist.config import SamplingParams, UserError
from mmdist.engine.record import Record, load_record

DEFAULTS = vars(SamplingParams())
SHOWN = 5  # ids or settings named in an error, tokens of a divergence


@dataclass
class Answers:
    """What task=generate wrote: its lines by id. records: what was recorded, where it is not beside the file."""

    path: Path
    lines: dict[str, dict[str, Any]]
    records: dict[str, Record] = field(default_factory=dict)

    def record(self, request_id: str) -> Record | None:
        return self.records.get(request_id) or load_record(self.path, request_id)

    @property
    def failed(self) -> dict[str, str]:
        """Errors by id."""
        return {name: line["error"] for name, line in self.lines.items() if "error" in line}


def read_answers(path: Path, key: str) -> Answers:
    """key: what the user gave the file as; UserError where it is no file of answers."""
    lines: dict[str, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            texts = [text for text in file if text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: cannot be read ({error}); give a file that task=generate wrote") from error
    for number, text in enumerate(texts, 1):
        line = parse(text, f"{key}={path}: line {number}")
        if str(line["id"]) in lines:
            raise UserError(f"{key}={path}: line {number}: id {line['id']} is there twice")
        lines[str(line["id"])] = line
    if not lines:
        raise UserError(f"{key}={path}: no answers in it; give a file that task=generate wrote")
    return Answers(path, lines)


def parse(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); give a file that task=generate wrote") from error
    if not isinstance(line, dict) or "id" not in line or not line.keys() & {"token_ids", "label", "error"}:
        raise UserError(f'{where}: expected {{"id", "token_ids", ...}} as task=generate writes it')
    return line


def check_ids(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Answers are matched by id, never by path; both sides must have answered the same requests."""
    found, wanted = set(found), set(wanted)
    missing, other = sorted(wanted - found), sorted(found - wanted)
    if missing or other:
        raise UserError(
            f"{where}: answers with other ids: {len(missing)} of the {len(wanted)} asked for are not in it (first: "
            f"{missing[0] if missing else '-'}), {len(other)} of its {len(found)} are not asked for (first: "
            f"{other[0] if other else '-'}); make it again from the same data"
        )


def check_settings(reference: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]], where: str) -> None:
    """Generation settings by id, of both sides; refused where they differ, with the first differing values.

    A setting that a file does not have is newer than the file, which was made as its default says.
    """
    differing: dict[str, str] = {}
    for name in reference.keys() & ours.keys():
        theirs, own = DEFAULTS | reference[name], DEFAULTS | ours[name]
        for setting, value in own.items():
            if theirs.get(setting) != value:
                differing.setdefault(setting, f"{setting}={theirs.get(setting)} (here {value})")
    if differing:
        raise UserError(
            f"{where}: made with other generation settings: {', '.join(sorted(differing.values()))}; make it again "
            "with the same, or give its own here"
        )


def check_prompts(reference: Answers, ours: Answers) -> None:
    """Where both sides say what they were asked, it must be the same."""
    for name, line in ours.lines.items():
        theirs, own = reference.lines[name].get("prompt_token_ids"), line.get("prompt_token_ids")
        if theirs and own and theirs != own:
            raise UserError(
                f"request {name}: its prompt has {len(own)} tokens, the reference's had {len(theirs)} or other ones: "
                "another prompt, picture, chat template or tokenizer; compare answers to the same requests"
            )


def has_tokens(line: dict[str, Any]) -> bool:
    return "token_ids" in line or "label" in line


def tokens_of(line: dict[str, Any]) -> list[int]:
    """What was answered; the class of a closed set of answers counts as one token."""
    return line["token_ids"] if "token_ids" in line else [line["label"]]


def text_of(line: dict[str, Any]) -> str:
    return line["text"] if "text" in line else line["answer"]


@dataclass
class Distribution:
    """How likely tokens are at one position, in float64. ids: which ones (rising), None for the whole vocabulary.

    logits and log probabilities (natural), as far as they are known.
    """

    ids: torch.Tensor | None
    logits: torch.Tensor | None
    logprobs: torch.Tensor | None

    @property
    def values(self) -> torch.Tensor:
        values = self.logits if self.logprobs is None else self.logprobs
        assert values is not None, "a distribution has logits or log probabilities"
        return values

    def find(self, token_id: int) -> int | None:
        """A token's place in the values."""
        if self.ids is None:
            return token_id
        places = (self.ids == token_id).nonzero()
        return int(places[0]) if len(places) else None

    def top(self) -> list[dict[str, Any]]:
        values, places = self.values.topk(min(SHOWN, len(self.values)))
        ids = places if self.ids is None else self.ids[places]
        return [{"token_id": int(i), "logprob": float(value)} for i, value in zip(ids, values, strict=True)]


def distribution(line: dict[str, Any], record: Record | None, position: int) -> Distribution | None:
    """The best there is: recorded logits, saved log probabilities, the best answers' logits; None without any."""
    if record is not None and record.logits is not None:
        logits = record.logits[position].double()
        return Distribution(None, logits, logits.log_softmax(-1))
    if line.get("logprobs"):
        entry = line["logprobs"][position]
        known = {entry["token_id"]: entry["logprob"]} | {best["token_id"]: best["logprob"] for best in entry["top"]}
        ids, logprobs = to_tensors(known)
        return Distribution(ids, None, logprobs)
    if line.get("top"):
        ids, logits = to_tensors({best["label"]: best["logit"] for best in line["top"]})
        return Distribution(ids, logits, None)
    return None


def to_tensors(known: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, values), by rising id."""
    ids, values = zip(*sorted(known.items()), strict=True)
    return torch.tensor(ids), torch.tensor(values, dtype=torch.float64)
