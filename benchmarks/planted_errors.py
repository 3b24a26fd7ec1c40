"""How surely task=precision's default thresholds catch one weight row scaled by 1.02, and name its layer.

    python examples/shapes/evaluate.py --family mllama --write build/mllama --num 12
    python benchmarks/planted_errors.py mllama assets/mllama-shapes build/mllama/requests.jsonl

Rows are drawn at random from all weights but the word embeddings. A row that changes no logit at all is not used by the
model (of layers behind the last one that a projector looks at) and not counted. Other embeddings have no layer of their
own: the one after them counts as right.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch

from mmdist.backend import init_backend
from mmdist.config import Config, ModelConfig, SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.record import LAYER, Record, Recorder
from mmdist.precision.answers import Answers
from mmdist.precision.compare import HEAD, compare_layers, find_drift
from mmdist.task_config import PrecisionConfig, nothing_kept
from mmdist.tasks.requests import build_request, read_requests
from mmdist.tp import TP

NUM_ROWS, SCALE = 60, 1.02


def answer(engine: Engine, recorder: Recorder, requests: Path) -> Answers:
    """What is recorded of each request's first token."""
    recorder.logits, recorder.layers = {}, {}
    params = SamplingParams(max_new_tokens=1, logprobs=1)
    list(engine.generate(build_request(e, engine.prompts, params, requests.parent) for e in read_requests(requests)))
    records = {
        name: Record({"logits": torch.stack(logits), **{LAYER + k: v for k, v in recorder.layers[name].items()}})
        for name, logits in recorder.logits.items()
    }
    return Answers(requests, {name: {} for name in records}, records)


def largest(reference: Answers, found: Answers) -> float:
    """Of the differences of the logits."""
    pairs = ((reference.records[name].logits, record.logits) for name, record in found.records.items())
    return max(float((own - theirs).abs().max()) for theirs, own in pairs if theirs is not None and own is not None)


def belongs(parameter: str, stage: str | None) -> bool:
    if "embedding" in parameter:
        return stage is not None and stage.endswith(".0")
    return stage == HEAD if parameter.startswith("lm_head") else f"{parameter}.".startswith(f"{stage}.")


def main(model: str, checkpoint: str, requests: str) -> None:
    model_config = ModelConfig(name=model)
    config = Config(checkpoint=checkpoint, model=model_config, dtype="float32", engine=nothing_kept())
    engine = load_engine(config, TP(), init_backend(config.hardware, local_rank=0, local_size=1))
    assert isinstance(engine, Engine), "VLMo answers without tokens"
    engine.recorder = recorder = Recorder(Path(tempfile.mkdtemp()), engine.stages())
    reference = answer(engine, recorder, Path(requests))
    weights = [(n, p) for n, p in engine.model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    draw, sizes, named = random.Random(1), [], 0
    for _ in range(NUM_ROWS):
        name, weight = draw.choice(weights)
        row = draw.randrange(len(weight))
        kept = weight[row].clone()
        with torch.no_grad():
            weight[row] *= SCALE
            found = answer(engine, recorder, Path(requests))
            weight[row] = kept
        if (size := largest(reference, found)) == 0:
            continue
        drift = find_drift(compare_layers(reference.lines, reference, found), PrecisionConfig.max_layer_error)
        sizes.append(size)
        named += belongs(name, drift)
        print(f"{size:.2e} {name}[{row}]: {drift}")
    caught = sum(size > PrecisionConfig.max_logit_error for size in sizes)
    print(f"{caught} of {len(sizes)} rows caught, {named} named, the smallest changes a logit by {min(sizes):.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
