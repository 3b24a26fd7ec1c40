"""task=plan: who would hold what, from config.json and the safetensors headers; nothing is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from mmdist.ascend import Chip, find_chip
from mmdist.backend import GIB, memory_per_rank, planned_device
from mmdist.config import UserError
from mmdist.engine.load import asked_world_size, find_checkpoint, open_model, settle_engine
from mmdist.engine.memory import RankMemory, rank_memory
from mmdist.kernels.npu_plan import PLANS, job_lines, operations
from mmdist.models.family import check_world_size, find_model, legal_world_sizes, load_model_config
from mmdist.native.build import describe_kernels
from mmdist.task_config import PlanConfig
from mmdist.tp import TP

ON_RANKS = False


def check(config: PlanConfig) -> None:
    pass


def run(config: PlanConfig) -> int:
    device = planned_device(config.hardware)
    family = find_model(config.model.name)
    model_config = load_model_config(family, find_checkpoint(config))
    legal = legal_world_sizes(family, model_config)
    size = asked_world_size(config, legal, device)
    plan: dict[str, Any] = {"world_size": size, "legal_world_sizes": legal, "fits": False}
    try:
        check_world_size(family, model_config, size)
    except UserError:
        if config.format == "json":
            print(json.dumps({**plan, "allreduce_bytes_per_token": 0, "ranks": [], "parameters": []}))
        raise
    plan.update(make_plan(config, size, device))
    print(json.dumps(plan) if config.format == "json" else table(plan))
    if not plan["fits"]:
        print(f"error: does not fit {plan['memory_per_rank'] / GIB:.2f} GiB a rank; {cure(config)}", file=sys.stderr)
    return 0 if plan["fits"] else 1


def cure(config: PlanConfig) -> str:
    return f"lower engine.max_num_seqs={config.engine.max_num_seqs} or engine.max_model_len, or use more ranks"


def make_plan(config: PlanConfig, size: int, device: str) -> dict[str, Any]:
    """The facts of both formats."""
    chip = find_chip(config.hardware) if device == "npu" else None
    ranks: list[RankMemory] = []
    for rank in range(min(size, 2)):  # all ranks but the first are alike
        model, plan, checkpoint, _ = open_model(config, TP(rank, size), device)
        engine, decoding = settle_engine(config, model, device, chip)
        ranks.append(rank_memory(model, plan, TP(rank, size), engine))
    memory = memory_per_rank(config.hardware, device, size)
    reduced = model.numbers_reduced() * model.dtype.itemsize if size > 1 else 0
    parameters = [
        {
            "name": checkpoint.names[name],
            "shape": list(placement.shape),
            "dtype": str(checkpoint.dtype(name)).removeprefix("torch."),
            "placement": placement.kind,
            "dim": placement.dim,
        }
        for name, placement in plan.items()
    ]
    return {
        "fits": all(rank.total <= memory for rank in ranks),
        "decoding": decoding,
        "kernels": planned_kernels(config.hardware.kernels, device, chip),
        "allreduce_bytes_per_token": reduced,
        "memory_per_rank": memory,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ranks": [{**asdict(ranks[min(rank, 1)]), "rank": rank} for rank in range(size)],
        "parameters": parameters,
    }


def planned_kernels(asked: str, device: str, chip: Chip | None) -> dict[str, Any]:
    """What computes: the level, a word about it and, on an NPU, which operation does which job."""
    if chip is None or asked == "plain":
        return describe_kernels(asked if device == "cpu" else "plain")
    detail = f"{chip.title}: {len(operations(chip.name))} fused operations"
    return {"level": f"npu {chip.name}", "detail": detail, "jobs": [asdict(job) for job in PLANS[chip.name]]}


def table(plan: dict[str, Any]) -> str:
    kinds = {"cut": "cut into equal parts", "copied": "KV heads, held by several ranks each",
             "replicated": "whole on every rank", "rank0": "on rank 0 alone"}  # fmt: skip
    legal = ", ".join(map(str, plan["legal_world_sizes"]))
    lines = [f"world_size={plan['world_size']} ({plan['dtype']}); legal sizes: {legal}", ""]
    columns = ("llm", "vision", "kv", "picture_kv", "embeddings", "activation", "peak_load")
    lines.append("rank" + "".join(f"{name:>13}" for name in columns) + "   (GiB)")
    for rank in plan["ranks"]:
        lines.append(f"{rank['rank']:4}" + "".join(f"{rank[name + '_bytes'] / GIB:13.3f}" for name in columns))
    lines.append("")
    for kind, meaning in kinds.items():
        names = [p["name"] for p in plan["parameters"] if p["placement"] == kind]
        if names:
            lines.append(f"{len(names):5} tensors {meaning}, e.g. {names[0]}")
    lines += ["", f"all-reduced a token: {plan['allreduce_bytes_per_token']} bytes"]
    lines.append(f"kernels: {plan['kernels']['level']} ({plan['kernels']['detail']})")
    lines += [f"  {line}" for job in plan["kernels"].get("jobs", ()) for line in job_lines(job)]
    lines.append(f"decoding: {plan['decoding']}")
    lines.append(f"{'fits' if plan['fits'] else 'does NOT fit'} {plan['memory_per_rank'] / GIB:.2f} GiB a rank")
    return "\n".join(lines)
