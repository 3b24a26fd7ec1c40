"""Train the two small VLMos on coloured shapes: python examples/shapes/train_vlmo.py --out FOLDER.

Stage A teaches the first blocks what a patch shows, B answers questions, C matches pictures and captions, beginning
where B ended. FOLDER/vlmo-shapes and FOLDER/vlmo_retrieval-shapes are written.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import model_vlmo as m
from loop import Learner, Stage, run_stage
from mmdist.models.vlmo import Vlmo
from mmdist.models.vlmo_blocks import BOTH, IMAGE, TEXT
from packing import sample_question
from patches import LookHeads, measure_patches, normalize, patch_loss, pick_labels
from questions import list_items
from recipe import build_parser, init_run
from squares import Squares, make_squares

# Kinds of questions and how often each is asked.
WEIGHTS = {"color": 1.5, "shape": 1.0, "count": 1.5, "size": 1.5, "side": 2.0, "level": 2.0, "exists": 1.5,
           "left_of": 2.0, "above": 2.0}  # fmt: skip
PATCH_STEPS, VQA_STEPS, RETRIEVAL_STEPS = 900, 2600, 700
PATCH_BATCH, VQA_BATCH, RETRIEVAL_BATCH = 64, 64, 96
SEEN_BY = 3  # blocks behind which a patch's token says what it shows


@dataclass
class Trainer:
    learner: Learner
    pictures: Squares
    held_out: Squares

    @property
    def model(self) -> Vlmo:
        assert isinstance(self.learner.model, Vlmo)
        return self.learner.model

    def pixels(self, pictures: Squares, picks: np.ndarray) -> torch.Tensor:
        return normalize(pictures.tiles[picks], m.MEAN, m.STD)

    def run(self, token_ids: list[list[int]] | None, pixels: torch.Tensor | None, depth: int) -> list[torch.Tensor]:
        """States behind each of the first `depth` blocks."""
        model, texts = self.model, None
        kind = BOTH if token_ids and pixels is not None else TEXT if token_ids else IMAGE
        if token_ids:
            rows = pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
            texts = F.pad(rows, (0, model.config.max_text_len - rows.shape[1]))
        hidden = model.embeddings(texts, pixels)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if texts is not None:
            mask[:, : model.config.max_text_len] = texts != m.PAD
        states = []
        for layer, block in enumerate(model.blocks[:depth]):
            assert model.position_bias is not None
            hidden = block(hidden, mask, model.position_bias(layer, kind), kind)
            states.append(hidden)
        return states

    def patch_loss(self, states: list[torch.Tensor], picks: np.ndarray) -> torch.Tensor:
        """The last tokens of the states are the patches."""
        heads, labels = self.learner.heads, pick_labels(self.pictures, picks)
        assert isinstance(heads, LookHeads)
        first, seen = (states[i][:, -m.FORM.num_patches :] for i in (0, SEEN_BY - 1))
        return patch_loss(heads, heads.looks.weight, seen, first, labels)

    def looks_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), PATCH_BATCH, replace=False)
        return self.patch_loss(self.run(None, self.pixels(self.pictures, picks), SEEN_BY), picks)

    @torch.no_grad()
    def report_looks(self) -> str:
        picks = np.arange(200)
        states = self.run(None, self.pixels(self.held_out, picks), SEEN_BY)
        heads = self.learner.heads
        assert isinstance(heads, LookHeads)
        return measure_patches(heads.looks.weight, states[-1][:, 1:], pick_labels(self.held_out, picks))

    def answer_loss(self, rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(self.pictures), VQA_BATCH, replace=False)
        questions = [sample_question(self.pictures.scenes[i], rng, WEIGHTS) for i in picks]
        states = self.run(
            [m.encode(q.text) for q in questions], self.pixels(self.pictures, picks), len(self.model.blocks)
        )
        labels = torch.tensor([m.LABELS[question.answer] for question in questions])
        answers = F.cross_entropy(self.model.head(states[-1], BOTH), labels)
        return answers + 0.3 * self.patch_loss(states, picks)

    @torch.no_grad()
    def report_answers(self) -> str:
        """Part of right answers, by kind, on pictures that are not trained on."""
        rng, right = np.random.default_rng(0), defaultdict(list)
        for picks in np.split(np.arange(600), 6):
            questions = [sample_question(self.held_out.scenes[i], rng, WEIGHTS) for i in picks]
            texts = [m.encode(question.text) for question in questions]
            states = self.run(texts, self.pixels(self.held_out, picks), len(self.model.blocks))
            found = self.model.head(states[-1], BOTH).argmax(-1).tolist()
            for question, label in zip(questions, found, strict=True):
                right[question.kind].append(m.LABELS[question.answer] == label)
        mean = np.mean([hit for hits in right.values() for hit in hits])
        shares = " ".join(f"{kind} {np.mean(hits):.2f}" for kind, hits in sorted(right.items()))
        return f"held out: all {mean:.3f} {shares}"

    def features(self, pictures: Squares, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Of the captions and of the pictures, (picks, hidden) each; and the pictures' states."""
        captions = [m.encode(list_items(pictures.scenes[i])) for i in picks]
        texts = self.run(captions, None, len(self.model.blocks))
        states = self.run(None, self.pixels(pictures, picks), len(self.model.blocks))
        return self.model.head(texts[-1], TEXT), self.model.head(states[-1], IMAGE), states

    def match_loss(self, rng: np.random.Generator) -> torch.Tensor:
        """Each caption has to find its picture among the batch's, and each picture its caption."""
        picks = rng.choice(len(self.pictures), RETRIEVAL_BATCH, replace=False)
        texts, images, states = self.features(self.pictures, picks)
        logits = self.model.output.logit_scale.exp() * images @ texts.T
        labels = torch.arange(len(picks))
        matches = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        return matches / 2 + 0.3 * self.patch_loss(states, picks)

    @torch.no_grad()
    def report_matches(self) -> str:
        """Recall at 1 among 50 pairs, in both directions; pictures of one caption count as misses of each other."""
        hits = []
        for picks in np.split(np.arange(200), 4):
            texts, images, _ = self.features(self.held_out, picks)
            scores, labels = images @ texts.T, torch.arange(len(picks))
            hits.append([(scores.argmax(dim) == labels).float().mean().item() for dim in (0, 1)])
        return "held out: recall@1 of pictures {:.3f}, of captions {:.3f}".format(*np.mean(hits, 0))


def start_retrieval(vqa: Vlmo) -> Vlmo:
    """A retrieval model that begins where VQA ended; behind vlffn_start both experts begin as the one for both."""
    model = m.build_model("retrieval")
    learned = vqa.state_dict()
    for name, tensor in model.state_dict().items():
        source = name if name in learned else name.replace("_text.", "_vl.").replace("_imag.", "_vl.")
        if source in learned:
            tensor.copy_(learned[source])
    return model


def main() -> None:
    args = build_parser(__doc__, pictures=12000).parse_args()
    started = init_run(args)
    pictures, held_out = make_squares(args.seed, args.pictures, m.FORM), make_squares(args.seed + 1, 600, m.FORM)
    print(f"{len(pictures)} pictures in {time.time() - started:.0f} s", flush=True)
    everything = ("embeddings.", "blocks.", "position_bias.", "output.")

    vqa = Learner(m.build_model("vqa"), new_heads(), args.seed, state_file(args, "vqa"))
    trainer = Trainer(vqa, pictures, held_out)
    seeing = {"embeddings.": 2e-3, "blocks.": 2e-3, "position_bias.": 2e-3, "heads.": 2e-3}
    run_stage(vqa, Stage("A", PATCH_STEPS, 50, seeing, trainer.looks_loss, trainer.report_looks))
    rates = dict.fromkeys(everything, 1.5e-3) | {"heads.": 8e-4}
    run_stage(vqa, Stage("B", VQA_STEPS, 100, rates, trainer.answer_loss, trainer.report_answers))
    m.save_checkpoint(trainer.model, args.out / "vlmo-shapes")
    print(f"VQA after {(time.time() - started) / 60:.1f} min", flush=True)

    retrieval = Learner(start_retrieval(trainer.model), vqa.heads, args.seed, state_file(args, "retrieval"))
    trainer = Trainer(retrieval, pictures, held_out)
    rates = dict.fromkeys(everything, 1e-3) | {"heads.": 5e-4}
    run_stage(retrieval, Stage("C", RETRIEVAL_STEPS, 50, rates, trainer.match_loss, trainer.report_matches))
    m.save_checkpoint(trainer.model, args.out / "vlmo_retrieval-shapes")
    print(f"all after {(time.time() - started) / 60:.1f} min", flush=True)


def new_heads() -> LookHeads:
    return LookHeads(m.SIZES["hidden_size"], (m.FORM.patch // 2) ** 2)


def state_file(args: argparse.Namespace, name: str) -> Path | None:
    return args.state and args.state.with_name(f"{args.state.name}-{name}.pt")


if __name__ == "__main__":
    main()
