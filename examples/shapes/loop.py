"""The training loop: optimizers, learning rates, log lines, and a state file from which a stopped run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

LOG_EVERY = 50
SAVE_EVERY = 200


@dataclass
class Learner:
    """What training changes, and where it stands."""

    model: nn.Module
    heads: nn.Module
    seed: int
    state_file: Path | None = None


@dataclass
class Stage:
    """`rates` are peak learning rates by prefix of the parameter's name, the first that fits counts.

    `loss_of` draws its data from the generator it is given.
    """

    name: str
    steps: int
    warmup: int
    rates: dict[str, float]
    loss_of: Callable[[np.random.Generator], torch.Tensor]
    report: Callable[[], str]
    horizon: int = 0  # step at which the cosine would end; the stage's own end if 0


def build_optimizers(learner: Learner, rates: dict[str, float]) -> list[torch.optim.Optimizer]:
    """Muon (at three times the rate) for hidden matrices, AdamW for the rest; what no prefix names stays as it is."""
    named = dict(learner.model.named_parameters())
    named |= {f"heads.{name}": parameter for name, parameter in learner.heads.named_parameters()}
    matrices, rest = [], []
    for name, parameter in named.items():
        lr = next((lr for prefix, lr in rates.items() if name.startswith(prefix)), None)
        if lr is None:
            continue
        is_hidden = parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head", "heads."))
        target, peak = (matrices, 3 * lr) if is_hidden else (rest, lr)
        target.append({"params": [parameter], "lr": peak, "peak": peak})
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.05)]


def find_rate(step: int, steps: int, warmup: int) -> float:
    """Part of the peak learning rate: linear warm-up, then a cosine down to one per cent."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def run_stage(learner: Learner, stage: Stage) -> None:
    """All steps; step i draws its data from (seed, stage, i), so a resumed run is the run that was stopped."""
    optimizers = build_optimizers(learner, stage.rates)
    begin = load_state(learner, stage.name, optimizers)
    started, losses = time.time(), []
    for step in range(begin, stage.steps):
        rng = np.random.default_rng((learner.seed, ord(stage.name), step))
        losses.append(
            update(optimizers, stage.loss_of(rng), find_rate(step, stage.horizon or stage.steps, stage.warmup))
        )
        done = step + 1
        if done % LOG_EVERY == 0 or done == stage.steps:
            pace = (time.time() - started) / (done - begin)
            left = f"{pace:.2f} s/step, {pace * (stage.steps - done) / 60:.1f} min left"
            print(f"stage {stage.name} step {done}/{stage.steps} loss {np.mean(losses):.3f} {left}", flush=True)
            losses = []
        if done % SAVE_EVERY == 0 or done == stage.steps:
            print(f"  {stage.report()}", flush=True)
            save_state(learner, stage.name, done, optimizers)


def update(optimizers: list[torch.optim.Optimizer], loss: torch.Tensor, rate: float) -> float:
    """One step of every optimizer at `rate` times its peak learning rate; returns the loss."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group["peak"] * rate
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save_state(learner: Learner, name: str, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
    if learner.state_file:
        state = {"stage": name, "step": step, "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"model": learner.model.state_dict(), "heads": learner.heads.state_dict()}
        torch.save(state, learner.state_file)


def load_state(learner: Learner, name: str, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step at which stage `name` goes on: 0 if the state file is of an earlier stage, very large if of a later."""
    if not (learner.state_file and learner.state_file.exists()):
        return 0
    state = torch.load(learner.state_file)
    learner.model.load_state_dict(state["model"])
    learner.heads.load_state_dict(state["heads"])
    if state["stage"] != name:
        return 0 if state["stage"] < name else 10**9
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]
