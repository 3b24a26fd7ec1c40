"""What a run computed on its way to its answers, kept to be compared: logits, scores and outputs of layers.

One safetensors file a request: "logits" (tokens, vocab) of every answered token, or "scores" of a closed set of
answers, before any sampling change; and "layers.NAME" (rows, width), all float32. Metadata: id, and the layers in the
order of the computation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmdist.config import UserError
from mmdist.engine.batch import Batch, Scheduled
from mmdist.engine.sampler import Scores

KEPT_ROWS = 64  # of a picture's or an encoder's states, evenly spread
LAYER = "layers."


def record_folder(answers: Path) -> Path:
    """Where the records of a file of answers lie: beside it."""
    return answers.with_name(answers.name + ".record")


def record_path(folder: Path, request_id: str) -> Path:
    """An id may be any text, a file's name may not."""
    return folder / f"{hashlib.sha256(request_id.encode()).hexdigest()[:32]}.safetensors"


@dataclass
class Record:
    """One request's file."""

    tensors: dict[str, torch.Tensor]

    @property
    def logits(self) -> torch.Tensor | None:
        """(tokens, vocab), or (1, answers)."""
        return self.tensors.get("logits")

    @property
    def layers(self) -> dict[str, torch.Tensor]:
        """By stage, in the order of the computation."""
        return {name.removeprefix(LAYER): rows for name, rows in self.tensors.items() if name.startswith(LAYER)}


def load_record(answers: Path, request_id: str) -> Record | None:
    """What was recorded of a request beside a file of answers; None if nothing was."""
    path = record_path(record_folder(answers), request_id)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        stages = json.loads(file.metadata()["stages"])
        names = ["logits", *(LAYER + stage for stage in stages)]
        return Record({name: file.get_tensor(name) for name in names})


def list_stages(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs are recorded: every layer of a list of layers, and what stands around these lists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    around = [name for name, _ in model.named_modules() if name.rpartition(".")[0] in ("vision", "embeddings")]
    names = {f"{name}.{child}" for name in lists for child, _ in model.get_submodule(name).named_children()}
    names |= {name for name in (*around, "decoder.embed_tokens", "decoder.norm") if name not in lists}
    return {name: module for name, module in model.named_modules() if name in names}


class Recorder:
    """Watches an engine on rank 0; `save` ends a request. layers: modules by stage; none: logits alone are kept."""

    def __init__(self, folder: Path, layers: dict[str, nn.Module] | None = None):
        self.folder = folder
        self.seen: dict[str, list[torch.Tensor]] = {}  # outputs since they were last taken, by stage
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.layers: dict[str, dict[str, torch.Tensor]] = {}
        self.stages: list[str] = []
        for name, module in (layers or {}).items():
            module.register_forward_hook(lambda module, args, output, name=name: self.note(name, output))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error.strerror})") from error

    def note(self, name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor):
            self.seen.setdefault(name, []).append(output.detach().clone())  # the next layer may add to it in place
            if name not in self.stages:
                self.stages.append(name)

    def take(self, request_id: str, rows: dict[str, torch.Tensor]) -> None:
        """rows: (rows, width) by stage."""
        self.layers.setdefault(request_id, {}).update({name: row.float().cpu() for name, row in rows.items()})

    def take_pictures(self, request_id: str) -> None:
        """What was seen since: one request's pictures, in one pass or in parts."""
        seen, self.seen = self.seen, {}
        self.take(request_id, {name: spread(torch.cat([x.flatten(0, -2) for x in xs])) for name, xs in seen.items()})

    def take_step(self, scheduled: Sequence[Scheduled], batch: Batch, scores: Sequence[Scores]) -> None:
        """A step of the decoder: the logits, and of a prompt's last token what every layer made of it."""
        seen, self.seen = self.seen, {}
        sampled = [item.sequence for item in scheduled if item.samples]
        for place, (sequence, own) in enumerate(zip(sampled, scores, strict=True)):
            if own.ids is not None:  # this request did not ask for log probabilities
                continue
            self.take_logits(sequence.request.id, own.logits)
            if not sequence.output_ids:
                row = {len(batch.input_ids): batch.logits_rows[place], len(batch.logits_rows): place}
                self.take(sequence.request.id, {name: xs[0][row[len(xs[0])]][None] for name, xs in seen.items()})

    def save_batch(self, request_ids: Sequence[str], features: torch.Tensor) -> None:
        self.take_batch(request_ids, features)
        for request_id in request_ids:
            self.save(request_id)

    def take_batch(self, request_ids: Iterable[str], scores: torch.Tensor) -> None:
        """Scores (batch, answers) or features, and the layers' (batch, tokens, width), of an encoder."""
        seen, self.seen = self.seen, {}
        for place, request_id in enumerate(request_ids):
            self.take_logits(request_id, scores[place])
            self.take(request_id, {name: spread(xs[0][place]) for name, xs in seen.items()})

    def take_logits(self, request_id: str, logits: torch.Tensor) -> None:
        """Of one token."""
        self.logits.setdefault(request_id, []).append(logits.float().cpu())

    def save(self, request_id: str) -> None:
        """Write what is known of a request, and forget it."""
        logits, layers = self.logits.pop(request_id, []), self.layers.pop(request_id, {})
        if not logits:
            return
        tensors = {"logits": torch.stack(logits)} | {LAYER + name: rows for name, rows in layers.items()}
        stages = [name for name in self.stages if name in layers]
        path = record_path(self.folder, request_id)
        partial = path.with_name(path.name + ".partial")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            partial,
            {"id": request_id, "stages": json.dumps(stages)},
        )
        partial.replace(path)


def spread(rows: torch.Tensor) -> torch.Tensor:
    """(rows, width) -> at most KEPT_ROWS of them."""
    count = min(len(rows), KEPT_ROWS)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]
