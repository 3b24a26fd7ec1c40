"""One prompt through two checkpoints with mmdist's own engine at world size 1: logits and greedy answers compared.

The second answers on its own; for the logits it reads the first one's answer, so that every row has the same past.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdist.backend import init_backend
from mmdist.config import Config, EngineConfig, HardwareConfig, ModelConfig, SamplingParams, UserError
from mmdist.engine.batch import Scheduled, build_batch, image_embeds, take_memories
from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.request import Request
from mmdist.engine.request import Sequence as EngineSequence
from mmdist.manifest import MANIFEST, load_manifest
from mmdist.shipped import ASSETS
from mmdist.tasks.requests import build_request, user_message
from mmdist.tp import TP
from weights_tools.source import find_family

PICTURE, PROMPT = ASSETS / "pictures" / "shapes.png", "What is in the picture?"
MAX_NEW_TOKENS = 32


@dataclass
class Question:
    prompt: str
    image: Path | None
    dtype: str

    def entry(self) -> dict[str, Any]:
        """As a line of requests has it."""
        images = [] if self.image is None else [str(self.image)]
        return {"id": "deep", "messages": [user_message(self.prompt, len(images))], "images": images}


@dataclass
class Answer:
    """logits: (tokens of an answer, vocabulary); of a family without tokens: (1, answers or features)."""

    token_ids: list[int]
    text: str
    logits: torch.Tensor


def compare_answers(folder: Path, against: Path, question: Question) -> dict[str, Any]:
    """folder's logits and greedy answer beside those of `against`."""
    for asked in (folder, against):
        check_world_size(asked)
    families = find_family(folder), find_family(against)
    if families[0] != families[1]:
        raise UserError(f"{folder} is a {families[0]}, {against} a {families[1]}; --deep compares two of one family")
    wanted = ask(against, question, None)
    got = ask(folder, question, wanted.token_ids)
    if got.logits.shape != wanted.logits.shape:
        shapes = f"{list(got.logits.shape)} and {list(wanted.logits.shape)}"
        raise UserError(f"{folder} and {against}: logits of shapes {shapes}; these are different models")
    difference = (got.logits - wanted.logits).double()
    pairs = zip(got.token_ids, wanted.token_ids, strict=False)
    return {
        "prompt": question.prompt,
        "image": None if question.image is None else str(question.image),
        "dtype": question.dtype,
        "num_rows": len(difference),
        "max_abs": float(difference.abs().max()),
        "rms": float(difference.square().mean().sqrt()),
        "largest_logit": float(wanted.logits.abs().max()),
        "top1_agreement": int((got.logits.argmax(-1) == wanted.logits.argmax(-1)).sum()),
        "greedy_tokens_equal": next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted.token_ids)),
        "greedy_tokens": len(wanted.token_ids),
        "answers": [got.text, wanted.text],
    }


def check_world_size(folder: Path) -> None:
    if (folder / MANIFEST).exists() and (size := load_manifest(folder).world_size) > 1:
        raise UserError(f"{folder}: split for {size} ranks, --deep runs on one; export it first and give that folder")


def ask(folder: Path, question: Question, answer_ids: list[int] | None) -> Answer:
    """The folder's greedy answer, and its logits along answer_ids (None: along its own answer)."""
    hardware = HardwareConfig()
    config = Config(
        checkpoint=str(folder),
        model=ModelConfig(name=find_family(folder)),
        dtype=question.dtype,
        engine=EngineConfig(max_num_seqs=1, max_pictures=1),
        hardware=hardware,
    )
    engine = load_engine(config, TP(), init_backend(hardware, local_rank=0, local_size=1))
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    request = build_request(question.entry(), engine.prompts, params, Path.cwd())
    if isinstance(engine, EncoderEngine):
        return score(engine, request)
    *_, last = engine.generate([request])
    if last.error is not None:
        raise UserError(f"{folder}: {last.error}")
    along = answer_ids or last.token_ids
    if max(along) >= engine.runner.model.vocab_size:
        raise UserError(f"{folder}: its vocabulary has no token {max(along)}; these are different models")
    return Answer(last.token_ids, last.text, logits_along(engine, request, along))


def score(engine: EncoderEngine, request: Request) -> Answer:
    """Of a model that answers in one pass: the scores of its answers, or the features it compares by."""
    prompt = request.prompt
    scores = engine.encode([prompt], engine.model.kind(prompt)).float()
    if engine.model.compares:
        return Answer([], "", scores)
    best = int(scores[0].argmax())
    return Answer([best], engine.prompts.decode([best]), scores)


def logits_along(engine: Engine, request: Request, answer_ids: list[int]) -> torch.Tensor:
    """(answer tokens, vocabulary) float32: what was before each token of the answer, in one pass."""
    detokenizer = Detokenizer(engine.prompts.decode, [])
    sequence = EngineSequence(request, detokenizer, engine.max_model_len, engine.pictures.list(request.prompt))
    sequence.output_ids = answer_ids[:-1]
    engine.scheduler.blocks.grow(sequence, sequence.num_tokens)
    scheduled = [Scheduled(sequence, sequence.num_tokens)]
    engine.encode_pictures(scheduled[0])
    batch = build_batch(scheduled, [sequence])
    batch.logits_rows = list(range(sequence.num_prompt_tokens - 1, sequence.num_tokens))
    memories = take_memories(scheduled, batch)
    return engine.runner.forward(batch, image_embeds(scheduled), memories).float().cpu()


def show_answers(facts: dict[str, Any]) -> None:
    print(f"{facts['num_rows']} rows of logits in {facts['dtype']}, about {facts['prompt']!r} ({facts['image']}):")
    print(
        f"  max abs {facts['max_abs']:.3g}, RMS {facts['rms']:.3g}; the largest logit is {facts['largest_logit']:.3g}"
    )
    print(f"  top-1 agrees in {facts['top1_agreement']} of {facts['num_rows']}")
    print(f"  greedy tokens agree up to {facts['greedy_tokens_equal']} of {facts['greedy_tokens']}")
    for text in facts["answers"] if facts["answers"][0] != facts["answers"][1] else facts["answers"][:1]:
        print(f"  {text!r}")
