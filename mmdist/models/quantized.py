"""Quantised linear layers of a model on meta: those that the checkpoint holds so, and those quantised on loading."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mmdist.config import UserError
from mmdist.layers.embedding import ParallelLMHead
from mmdist.layers.linear import ColumnParallelLinear, ParallelWeight, RowParallelLinear
from mmdist.plan import Plan, shard_plan
from mmdist.quant import Scheme, WeightFormat
from mmdist.tp import TP
from mmdist.weights import Checkpoint


def linears(model: nn.Module) -> Iterator[tuple[str, ParallelWeight]]:
    """The parallel linear layers, which quantisation is for; embeddings, head, norms and vision stay as they are."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield name, module


def hold_as_stored(model: nn.Module, checkpoint: Checkpoint, format: WeightFormat, tp: TP) -> None:
    """Give the layers whose weights the checkpoint holds quantised the tensors of its format."""
    plan = shard_plan(model, tp)
    heads = [(name, module) for name, module in model.named_modules() if isinstance(module, ParallelLMHead)]
    for name, module in [*linears(model), *heads]:
        stored = stored_weights(plan, f"{name}.weight")
        quantised = [weight for weight in stored if is_quantised(weight, checkpoint, format)]
        if quantised and len(quantised) < len(stored):
            plain = ", ".join(sorted(set(stored) - set(quantised)))
            raise UserError(f"{checkpoint.folder}: {plain} is not quantised, the rest of {name} is; quantise all of it")
        if quantised:
            module.store_as(format)


def is_quantised(weight: str, checkpoint: Checkpoint, format: WeightFormat) -> bool:
    """True where any tensor of the format is there, so that a lost one is missed."""
    others = [weight.removesuffix("weight") + name for name in format.names if name != "weight"]
    return any(name in checkpoint.files for name in others)


def stored_weights(plan: Plan, param: str) -> list[str]:
    """Names of the stored tensors that fill a parameter."""
    return [placement.name for placement in plan.values() if placement.param == param]


def check_plain(model: nn.Module, plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse integers where the model has plain numbers."""
    params = dict(model.named_parameters())
    for placement in plan.values():
        stored = checkpoint.dtype(placement.name)
        if params[placement.param].is_floating_point() and not stored.is_floating_point:
            raise UserError(
                f"{checkpoint.files[placement.name]}: {checkpoint.names[placement.name]} is {stored}, without scales "
                "and description; quantise the plain checkpoint with: weights_tools quantize"
            )


def quantise_on_loading(model: nn.Module, scheme: Scheme) -> None:
    for _, module in linears(model):
        scheme.num_groups(module.weight.shape[1])
        module.scheme = scheme


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """The dtype to run in, for all but what a weight format stores."""
    done: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        kept = module.format.names if isinstance(module, ParallelWeight) and module.format is not None else ()
        for name, param in list(module.named_parameters(recurse=False)):
            if name not in kept:
                if param not in done:
                    done[param] = nn.Parameter(param.to(dtype), requires_grad=False)
                setattr(module, name, done[param])
