"""Train the small MiniGPT-4 on coloured shapes: python examples/shapes/train_minigpt4.py --out FOLDER."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model_minigpt4 as m
from decoder_rows import find_logits
from families import as_typed
from loop import Learner, Stage, run_stage
from minigpt4_files import save_checkpoint
from mmdist.models.minigpt4 import MiniGPT4
from mmdist.models.minigpt4_vision import MiniGPT4Encoder
from packing import IGNORED, Rows, Segment, Tally, answer_loss, describe, pack_rows, sample_question
from patches import measure_patches, normalize, patch_loss, pick_labels, place_loss, word_directions, word_readers
from questions import KINDS
from recipe import build_parser, init_run, say_saved
from sentencepieces import UNK
from slots import NUM_PROMPTS, SlotHeads, label_slots, measure_slots, slot_loss
from squares import Squares, make_squares

BASE = Path(__file__).parents[2] / "assets" / "llava_next-shapes"
# Kinds of questions and how often each is asked; "either" helps the yes/no relations and is not counted.
WEIGHTS = {"color": 1.5, "shape": 1.0, "count": 1.5, "size": 1.5, "side": 2.0, "level": 2.0, "left_of": 3.0,
           "above": 3.0, "exists": 1.5, "caption": 2.0, "list": 1.5, "either": 2.0}  # fmt: skip
ROW_LENGTH = 160  # tokens: the conversation up to the picture, and about seven questions
SECOND_TURN = 0.1
PICTURE_STEPS, ANSWER_STEPS = 500, 600
PICTURE_BATCH, ANSWER_BATCH = 64, 32


@dataclass
class Seen:
    """Of B pictures: EVA's patches behind its first block and at its end, and what the queries found."""

    first: torch.Tensor
    patches: torch.Tensor
    found: torch.Tensor


def look(encoder: MiniGPT4Encoder, pictures: Squares, picks: np.ndarray) -> Seen:
    tower: Any = encoder.tower
    x = first = tower.blocks[0](tower.embed(normalize(pictures.tiles[picks], *m.NORMALIZE)))
    for block in tower.blocks[1:]:
        x = block(x)
    states = tower.ln_vision(x)
    return Seen(first[:, 1:], states[:, 1:], encoder.describe(states))


def make_rows(pictures: Squares, picks: np.ndarray, rng: np.random.Generator, second_turn: float) -> Rows:
    def draw_segment(row: int) -> Segment:
        turns = 2 if rng.random() < second_turn else 1
        questions = [sample_question(pictures.scenes[picks[row]], rng, WEIGHTS) for _ in range(turns)]
        *before, (question, answer) = [(as_typed(question.text), question.answer) for question in questions]
        asked, answered = m.encode_turns(before, question, answer)
        return questions[-1].kind, asked + answered, [IGNORED] * len(asked) + answered

    return pack_rows([m.PREFIX] * len(picks), draw_segment, length=ROW_LENGTH, pad=UNK)


@dataclass
class Trainer:
    learner: Learner
    pictures: Squares
    held_out: Squares

    @property
    def model(self) -> MiniGPT4:
        assert isinstance(self.learner.model, MiniGPT4)
        return self.learner.model

    @property
    def heads(self) -> SlotHeads:
        assert isinstance(self.learner.heads, SlotHeads)
        return self.learner.heads

    @property
    def words(self) -> torch.Tensor:
        return self.model.decoder.embed_tokens.weight

    def picture_loss(self, picks: np.ndarray, seen: Seen) -> torch.Tensor:
        """What the patches show, and what the queries are to find."""
        labels = pick_labels(self.pictures, picks)
        patches = patch_loss(self.heads, self.heads.looks.weight, seen.patches, seen.first, labels)
        patches = patches + 2 * place_loss(self.heads.directions.weight, seen.patches, labels)
        readers, directions = word_readers(self.words, m.IDS), word_directions(self.words, m.IDS)
        slots = label_slots([self.pictures.scenes[i] for i in picks])
        return patches + slot_loss(self.heads, readers, directions, seen.found, slots)

    def find_logits(self, rows: Rows, found: torch.Tensor) -> torch.Tensor:
        places = torch.zeros_like(rows.ids, dtype=torch.bool)
        places[:, len(m.PREFIX) - NUM_PROMPTS : len(m.PREFIX)] = True
        return find_logits(self.model, rows, places=places, features=found.flatten(0, 1), memories=[None] * len(found))

    def sample_picture_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), PICTURE_BATCH, replace=False)
        return self.picture_loss(picks, look(self.model.vision, self.pictures, picks))

    def sample_answer_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), ANSWER_BATCH, replace=False)
        rows = make_rows(self.pictures, picks, rng, SECOND_TURN)
        seen = look(self.model.vision, self.pictures, picks)
        return answer_loss(self.find_logits(rows, seen.found), rows) + 0.2 * self.picture_loss(picks, seen)

    @torch.no_grad()
    def report_pictures(self) -> str:
        seen = look(self.model.vision, self.held_out, np.arange(len(self.held_out)))
        labels, slots = pick_labels(self.held_out, np.arange(len(self.held_out))), label_slots(self.held_out.scenes)
        patches = measure_patches(self.heads.looks.weight, seen.patches, labels)
        return f"{patches}; {measure_slots(self.heads, word_readers(self.words, m.IDS), seen.found, slots)}"

    @torch.no_grad()
    def report_answers(self) -> str:
        rng, tally = np.random.default_rng(0), Tally()
        for picks in np.array_split(np.arange(len(self.held_out)), 3):
            rows = make_rows(self.held_out, picks, rng, second_turn=0.0)
            tally.add(self.find_logits(rows, look(self.model.vision, self.held_out, picks).found), rows)
        return f"{describe(tally.shares(), tuple(KINDS))}; {self.report_pictures()}"

    def stages(self) -> list[Stage]:
        looking = {"vision.": 2e-3, "heads.": 2e-3}
        answering = {"vision.": 6e-4, "heads.": 6e-4, "decoder.": 1.5e-3, "lm_head.": 1.5e-3}
        return [
            Stage("A", PICTURE_STEPS, 50, looking, self.sample_picture_loss, self.report_pictures),
            Stage("B", ANSWER_STEPS, 100, answering, self.sample_answer_loss, self.report_answers),
        ]


def main() -> None:
    args = build_parser(__doc__, pictures=8000, base=BASE).parse_args()
    started = init_run(args)
    pictures, held_out = make_squares(args.seed, args.pictures, m.FORM), make_squares(args.seed + 1, 150, m.FORM)
    print(f"{len(pictures)} pictures in {time.time() - started:.0f} s", flush=True)
    config = m.build_config()
    cells = (m.FORM.patch // 2) ** 2
    heads = SlotHeads(config.vision_width, cells=cells, first_size=config.vision_width, hidden_size=m.HIDDEN_SIZE)
    trainer = Trainer(Learner(m.build_model(args.base), heads, args.seed, args.state), pictures, held_out)
    for stage in trainer.stages():
        run_stage(trainer.learner, stage)
    save_checkpoint(trainer.model, m.TOKENIZER, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
