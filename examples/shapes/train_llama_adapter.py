"""Train the small LLaMA-Adapter on coloured shapes: python examples/shapes/train_llama_adapter.py --out FOLDER."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model_llama_adapter as m
from decoder_rows import find_logits
from families import as_typed
from llama_adapter_files import save_checkpoint
from loop import Learner, Stage, run_stage
from mmdist.models.llama_adapter import LlamaAdapter
from packing import (
    IGNORED,
    Rows,
    Segment,
    Tally,
    answer_loss,
    describe,
    pack_rows,
    sample_question,
)
from patches import measure_patches, normalize, patch_loss, pick_labels, place_loss, word_directions, word_readers
from recipe import build_parser, init_run, say_saved
from sentencepieces import UNK
from slots import SlotHeads, label_slots, measure_slots, slot_loss
from squares import Squares, make_squares

BASE = Path(__file__).parents[2] / "assets" / "llava_next-shapes"
# Kinds of questions and how often each is asked.
WEIGHTS = {"color": 1.5, "shape": 1.0, "count": 1.5, "size": 1.5, "side": 2.0, "level": 2.0, "exists": 1.5,
           "caption": 2.0, "list": 1.5}  # fmt: skip
ROW_LENGTH = 150  # tokens: the prompt's beginning and about seven questions
PICTURE_STEPS, ANSWER_STEPS = 500, 600
PICTURE_BATCH, ANSWER_BATCH = 64, 32


@dataclass
class Seen:
    """Of B pictures: CLIP's features of the patches behind its first layer and at its end, and the prompts."""

    first: torch.Tensor
    features: torch.Tensor
    prompts: torch.Tensor


@dataclass
class Trainer:
    learner: Learner
    pictures: Squares
    held_out: Squares

    @property
    def model(self) -> LlamaAdapter:
        assert isinstance(self.learner.model, LlamaAdapter)
        return self.learner.model

    @property
    def heads(self) -> SlotHeads:
        assert isinstance(self.learner.heads, SlotHeads)
        return self.learner.heads

    @property
    def words(self) -> torch.Tensor:
        return self.model.decoder.embed_tokens.weight

    def look(self, pictures: Squares, picks: np.ndarray) -> Seen:
        encoder: Any = self.model.vision
        layers = encoder.config.vision_config.num_hidden_layers
        first, last = encoder.tower.hidden_states(normalize(pictures.tiles[picks], *m.NORMALIZE), [1, layers])
        features = encoder.projection(encoder.tower.model.post_layernorm(last))
        return Seen(first[:, 1:], features[:, 1:], encoder.ask(features))

    def picture_loss(self, pictures: Squares, picks: np.ndarray, seen: Seen) -> torch.Tensor:
        """What the patches show, and what the prompts are to say."""
        labels = pick_labels(pictures, picks)
        patches = patch_loss(self.heads, self.heads.looks.weight, seen.features, seen.first, labels)
        patches = patches + 2 * place_loss(self.heads.directions.weight, seen.features, labels)
        readers, directions = word_readers(self.words, m.IDS), word_directions(self.words, m.IDS)
        slots = label_slots([pictures.scenes[i] for i in picks])
        return patches + slot_loss(self.heads, readers, directions, seen.prompts, slots)

    def find_logits(self, rows: Rows, prompts: torch.Tensor) -> torch.Tensor:
        """Logits (answers' tokens, vocabulary), those at rows.asked in row order."""
        kept = self.model.remember(prompts, ())
        memories = [{layer: (k[i], v[i]) for layer, (k, v) in kept.items()} for i in range(len(prompts))]
        places = torch.zeros(rows.ids.shape, dtype=torch.bool)  # no token is a picture's
        return find_logits(self.model, rows, places=places, features=prompts[0, :0], memories=memories)

    def answer_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), ANSWER_BATCH, replace=False)
        rows, seen = make_rows(self.pictures, picks, rng), self.look(self.pictures, picks)
        answers = answer_loss(self.find_logits(rows, seen.prompts), rows)
        return answers + 0.2 * self.picture_loss(self.pictures, picks, seen)

    def sample_picture_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), PICTURE_BATCH, replace=False)
        return self.picture_loss(self.pictures, picks, self.look(self.pictures, picks))

    @torch.no_grad()
    def report_pictures(self) -> str:
        picks = np.arange(len(self.held_out))
        seen, slots = self.look(self.held_out, picks), label_slots(self.held_out.scenes)
        patches = measure_patches(self.heads.looks.weight, seen.features, pick_labels(self.held_out, picks))
        return f"{patches}; {measure_slots(self.heads, word_readers(self.words, m.IDS), seen.prompts, slots)}"

    @torch.no_grad()
    def report_answers(self) -> str:
        rng, tally = np.random.default_rng(0), Tally()
        for picks in np.array_split(np.arange(len(self.held_out)), len(self.held_out) // 50):
            rows = make_rows(self.held_out, picks, rng)
            tally.add(self.find_logits(rows, self.look(self.held_out, picks).prompts), rows)
        return f"{describe(tally.shares(), tuple(WEIGHTS))}; {self.report_pictures()}"

    def stages(self) -> list[Stage]:
        looking = {"vision.": 2e-3, "heads.": 2e-3}
        answering = {"vision.": 6e-4, "heads.": 6e-4, "decoder.": 1.5e-3, "lm_head.": 1.5e-3}
        return [
            Stage("A", PICTURE_STEPS, 50, looking, self.sample_picture_loss, self.report_pictures),
            Stage("B", ANSWER_STEPS, 100, answering, self.answer_loss, self.report_answers),
        ]


def make_rows(pictures: Squares, picks: np.ndarray, rng: np.random.Generator) -> Rows:
    def draw_segment(row: int) -> Segment:
        question = sample_question(pictures.scenes[picks[row]], rng, WEIGHTS)
        asked, answered = m.encode_turn(as_typed(question.text), question.answer)
        return question.kind, asked + answered, [IGNORED] * len(asked) + answered

    return pack_rows([m.find_prefix()] * len(picks), draw_segment, length=ROW_LENGTH, pad=UNK)


def main() -> None:
    args = build_parser(__doc__, pictures=12000, base=BASE).parse_args()
    started = init_run(args)
    pictures, held_out = make_squares(args.seed, args.pictures, m.FORM), make_squares(args.seed + 1, 150, m.FORM)
    print(f"{len(pictures)} pictures in {time.time() - started:.0f} s", flush=True)
    heads = SlotHeads(m.CLIP["projection_dim"], m.CLIP["hidden_size"], (m.FORM.patch // 2) ** 2, m.PARAMS["dim"])
    trainer = Trainer(Learner(m.build_model(args.base), heads, args.seed, args.state), pictures, held_out)
    for stage in trainer.stages():
        run_stage(trainer.learner, stage)
    save_checkpoint(trainer.model, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
