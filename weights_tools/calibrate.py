"""Calibration: what the user's own requests put into each layer decides how its weight is turned into integers.

Lin et al., arXiv:2306.00978 (AWQ). Scaling: columns that meet large inputs are enlarged, and so lose less: W diag(s) is
quantised, 1/s goes into what makes the input (the norm before, or the rows of the layer before), s = mean|x|^alpha.
Clipping: the largest magnitudes of a row (and group) may be cut off where that makes the output more exact. s is a
power of two, so that nothing but the integers is rounded: without them the model's numbers stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mmdist.backend import init_backend
from mmdist.config import Config, ModelConfig, SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import AnyEngine, load_engine
from mmdist.engine.request import Request
from mmdist.layers.attention import Attention
from mmdist.layers.linear import ColumnParallelLinear
from mmdist.models.base import Model, MultimodalModel
from mmdist.models.decoder import DecoderLayer
from mmdist.models.quantized import linears, stored_weights
from mmdist.plan import Plan
from mmdist.quant import Scheme, find_amax, quantize
from mmdist.tasks.requests import build_request, read_requests
from mmdist.tp import TP
from mmdist.weights import Checkpoint
from weights_tools.source import load_plan, open_source

ALPHAS = [step / 10 for step in range(11)]
CLIPS = [1 - step / 20 for step in range(10)]  # of a group's largest magnitude
MIN_MEAN = 1e-4
MAX_NEW_TOKENS = 16  # of each answer, unless the request says
SAMPLES = 256  # rows of an input that errors are measured on


@dataclass(frozen=True)
class Group:
    """Layers with one input, and what makes that input: by the names of their parameters."""

    consumers: tuple[str, ...]
    producer: str
    input: str  # the module that sees it


@dataclass
class Inputs:
    """What a layer was given: mean magnitude of each column so far, and the first rows."""

    total: torch.Tensor
    count: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self.rows)


@dataclass
class Scales:
    """Factors of a tensor's rows and of its columns; None where they stay."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the tensor's own dtype: powers of two change no digits."""
        if self.rows is not None:
            tensor = tensor * self.rows.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
        return tensor if self.columns is None else tensor * self.columns.to(tensor.dtype)


def groups(model: Model) -> Iterator[Group]:
    """Where a scale can go into what is before. Layers that others than the norm before them feed are left alone."""
    if not isinstance(model, MultimodalModel):
        return
    for number, layer in enumerate(model.decoder.layers):
        name = f"decoder.layers.{number}"
        if not isinstance(layer, DecoderLayer):
            continue
        if type(layer.self_attn) is Attention and type(layer.self_attn.qkv_proj) is ColumnParallelLinear:
            qkv = f"{name}.self_attn.qkv_proj"
            yield Group((f"{qkv}.weight",), f"{name}.input_layernorm.weight", qkv)
        gate_up, down = f"{name}.mlp.gate_up_proj", f"{name}.mlp.down_proj"
        if type(layer.mlp.gate_up_proj) is ColumnParallelLinear:  # low-rank additions see the input too
            yield Group((f"{gate_up}.weight",), f"{name}.post_attention_layernorm.weight", gate_up)
            yield Group((f"{down}.weight",), f"{name}.mlp.up_proj.weight", down)


@contextmanager
def watched(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Inputs]]:
    seen: dict[str, Inputs] = {}

    def note(name: str, x: torch.Tensor) -> None:
        rows = x.detach().float().flatten(0, -2)
        inputs = seen.setdefault(name, Inputs(torch.zeros(rows.shape[1])))
        inputs.total += rows.abs().sum(0)
        inputs.count += len(rows)
        missing = SAMPLES - sum(map(len, inputs.rows))
        if missing > 0:
            inputs.rows.append(rows[:missing].clone())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
        for name in names
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Calibration:
    """By names in the files: factors of tensors that are scaled, and the inputs (rows, columns) of quantised weights,
    as they are after scaling. errors: of some rows of a weight each, see Error."""

    scales: dict[str, Scales]
    inputs: dict[str, torch.Tensor]
    errors: list[Error] = field(default_factory=list)

    def scaled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.scales[name].apply(tensor) if name in self.scales else tensor

    def amax(self, name: str, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor | None:
        """(rows, columns), some rows of the scaled weight -> (rows, groups): where to clip; None for layers that the
        requests never reached."""
        if name not in self.inputs:
            return None
        weight, inputs = weight.float(), self.inputs[name]
        amax = clip(weight, inputs, scheme)
        columns = self.scales[name].columns if name in self.scales else None
        plain = torch.ones(weight.shape[1]) if columns is None else columns
        whole = float((inputs @ weight.T).square().sum())
        free = error(weight / plain, torch.ones_like(plain), inputs * plain, scheme)
        wrong = quantize(weight, scheme, amax).dequantize() - weight
        self.errors.append(Error(whole, free, float((inputs @ wrong.T).square().sum())))
        return amax

    def report(self) -> str:
        """What it was good for, in one line."""
        whole = sum(part.whole for part in self.errors)
        free, left = (math.sqrt(sum(getattr(part, what) for part in self.errors) / whole) for what in ("free", "left"))
        return f"relative error of the layers' outputs on the requests: {free:.4f} data-free, {left:.4f} calibrated"


@dataclass(frozen=True)
class Error:
    """Sums of squares over the inputs: of the product, and of its error data-free and calibrated."""

    whole: float
    free: float
    left: float


def calibrate(family: str, folder: Path, requests: Path, scheme: Scheme) -> Calibration:
    """Run the requests through the plain model, on one rank, and watch its layers."""
    config = Config(checkpoint=str(folder), model=ModelConfig(name=family))
    engine = load_engine(config, TP(), init_backend(config.hardware, local_rank=0, local_size=1))
    checkpoint, plan = open_source(family, folder), load_plan(family, folder, 1)[1]
    if isinstance(engine, Engine):
        engine.runner.keeps_all = True
    names = [name for name, _ in linears(engine.model)]
    with watched(engine.model, names) as seen:
        for output in engine.generate(read(engine, requests)):
            if output.error is not None:
                raise UserError(f"--calibration {requests}: {output.id}: {output.error}")
    if not seen:
        raise UserError(f"--calibration {requests}: no requests in it")
    return arrange(engine.model, seen, checkpoint, plan, scheme)


def read(engine: AnyEngine, path: Path) -> Iterator[Request]:
    defaults = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    try:
        for entry in read_requests(path):
            yield build_request(entry, engine.prompts, defaults, path.parent)
    except (OSError, UserError) as error:
        raise UserError(f"--calibration {path}: {error}") from error


def arrange(model: Model, seen: dict[str, Inputs], checkpoint: Checkpoint, plan: Plan, scheme: Scheme) -> Calibration:
    scales: dict[str, Scales] = {}
    for group in (group for group in groups(model) if group.input in seen):
        scale_group(group, seen[group.input], scales, checkpoint, plan, scheme)
    inputs = {}
    for name in seen:
        for weight in stored_weights(plan, f"{name}.weight"):
            stored = checkpoint.names[weight]
            columns = scales[stored].columns if stored in scales else None
            inputs[stored] = seen[name].sample if columns is None else seen[name].sample / columns
    return Calibration(scales, inputs)


def scale_group(
    group: Group, inputs: Inputs, scales: dict[str, Scales], checkpoint: Checkpoint, plan: Plan, scheme: Scheme
) -> None:
    names = [name for consumer in group.consumers for name in stored_weights(plan, consumer)]
    factors = choose([checkpoint.read_whole(name).float() for name in names], inputs, scheme)
    for name in names:
        scales.setdefault(checkpoint.names[name], Scales()).columns = factors
    for name in (group.producer, group.producer.removesuffix("weight") + "bias"):
        if name in plan:
            scales.setdefault(checkpoint.names[name], Scales()).rows = 1 / factors


def choose(weights: list[torch.Tensor], inputs: Inputs, scheme: Scheme) -> torch.Tensor:
    """(columns,) powers of two with the least squared error of the products, 1 among them."""
    candidates = [powers(inputs.mean, alpha) for alpha in ALPHAS]
    return min(candidates, key=lambda factors: sum(error(weight, factors, inputs.sample, scheme) for weight in weights))


def powers(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    factors = mean.clamp(min=MIN_MEAN) ** alpha
    factors = factors / (factors.max() * factors.min()).sqrt()
    return 2.0 ** factors.log2().round()


def error(weight: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor, scheme: Scheme) -> float:
    """Of x W^T, when W diag(factors) is quantised."""
    again = quantize(weight * factors, scheme).dequantize() / factors
    return float((rows @ (again - weight).T).square().sum())


def clip(weight: torch.Tensor, inputs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(rows, columns) -> the magnitude (rows, groups) that becomes the largest integer, of the tried the one with the
    least squared error of each group's part of the product."""
    whole = find_amax(weight, scheme)
    grouped = inputs.unflatten(1, (whole.shape[1], -1)).transpose(0, 1)  # (groups, inputs, columns of a group)
    best, least = whole, torch.full_like(whole, torch.inf)
    for part in CLIPS:
        wrong = quantize(weight, scheme, whole * part).dequantize() - weight
        wrong = wrong.unflatten(1, (whole.shape[1], -1)).permute(1, 2, 0)
        squares = torch.bmm(grouped, wrong).square().sum(1).T
        better = squares < least
        best, least = torch.where(better, whole * part, best), torch.where(better, squares, least)
    return best
