"""From a config to an engine that is ready to step: the arrows config -> plan -> weights -> engine, on one rank."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmdist.ascend import Chip, check_dtype, find_chip
from mmdist.backend import GIB, Backend, count_cores, count_devices, memory_per_rank
from mmdist.config import Config, EngineConfig, UserError
from mmdist.engine.cache import cache_shape
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.engine import Engine
from mmdist.engine.graphs import plan_graphs
from mmdist.engine.memory import RankMemory, rank_memory
from mmdist.engine.vision import check_precision, check_weights, find_exported, replace_tower
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.native import find_kernels
from mmdist.kernels.npu import npu_kernels
from mmdist.loading import load_weights
from mmdist.manifest import MANIFEST, load_manifest
from mmdist.models.base import EncoderModel, Model, MultimodalModel
from mmdist.models.family import build_model, check_folder, check_world_size, find_model, load_model_config
from mmdist.models.quantized import cast, check_plain, hold_as_stored, quantise_on_loading
from mmdist.plan import Plan, shard_plan
from mmdist.quant import FOLLOWS, Ascend, Scheme, WeightFormat
from mmdist.quant_files import check_description, find_format
from mmdist.shipped import SHIPPED, demo_folder
from mmdist.spans import Spans
from mmdist.tp import TP
from mmdist.weights import Checkpoint, open_checkpoint

AnyEngine = Engine | EncoderEngine
NOT_MEASURED = Spans()
log = logging.getLogger("mmdist.load")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_checkpoint(config: Config) -> Path:
    """checkpoint=, else the one shipped for the family."""
    if config.checkpoint is not None:
        return Path(config.checkpoint)
    folder = demo_folder(config.model)
    if not folder.exists() and config.model.demo_source is not None:
        raise UserError(
            f"{folder}: not there yet; make it with: weights_tools convert {config.model.name} "
            f"--src {SHIPPED / config.model.demo_source} --dst {folder}"
        )
    return folder


def asked_world_size(config: Config, legal: list[int], device: str) -> int:
    """world_size=; auto: a split folder's, else as many ranks as devices, rounded down to a legal size."""
    if isinstance(config.world_size, int):
        return config.world_size
    split_for = split_world_size(find_checkpoint(config))
    if split_for is not None:
        return split_for
    return max(size for size in legal if size <= max(1, count_devices(device)))


def split_world_size(folder: Path) -> int | None:
    """The world size a split folder was cut for, which is a legal one."""
    return load_manifest(folder).world_size if (folder / MANIFEST).exists() else None


def find_dtype(config: Config, checkpoint: Checkpoint, plan: Plan, device: str) -> torch.dtype:
    """dtype=, where auto is the dtype of the decoder's weights (float16 becomes bfloat16 on a CPU)."""
    if config.dtype != "auto":
        if device == "npu":
            check_dtype(config.dtype, config.hardware)
        return DTYPES[config.dtype]
    cut = (checkpoint.dtype(placement.name) for placement in plan.values() if placement.dim is not None)
    stored = next(dtype for dtype in cut if dtype.is_floating_point)
    if device == "cpu" and stored == torch.float16:  # CPUs have no fast float16 matrix product
        log.info("dtype=auto: the checkpoint's float16 runs as bfloat16 on the CPU; dtype=float32 or float16 to choose")
        return torch.bfloat16
    if device == "npu" and str(stored).removeprefix("torch.") not in (chip := find_chip(config.hardware)).dtypes:
        log.info("dtype=auto: the checkpoint's %s runs as %s on a %s", stored, chip.dtypes[0], chip.title)
        return DTYPES[chip.dtypes[0]]
    return stored


def engine_settings(config: Config, chip: Chip | None) -> EngineConfig:
    """engine.*, with the chip's block size where none was chosen; refused where its operations cannot read it."""
    settings = config.engine
    if chip is None or config.hardware.kernels == "plain":
        return settings
    if settings.kv_cache_dtype != "auto":
        raise UserError(
            f"engine.kv_cache_dtype={settings.kv_cache_dtype}: no operation of a {chip.title} reads it; use auto"
        )
    size = settings.block_size or chip.block_sizes[0]
    if size not in chip.block_sizes:
        legal = ", ".join(map(str, chip.block_sizes))
        raise UserError(
            f"engine.block_size={size}: a {chip.title} reads a paged cache in blocks of {legal}; leave it out"
        )
    return replace(settings, block_size=size)


def settle_engine(config: Config, model: Model, device: str, chip: Chip | None) -> tuple[EngineConfig, str]:
    """engine_settings() with engine.decode_graph settled, too; and in words how tokens are decoded."""
    name = None if chip is None else chip.name
    return plan_graphs(engine_settings(config, chip), model, device, name, config.hardware.kernels)


def open_model(config: Config, tp: TP, device: str, *, hash_ahead: bool = False) -> tuple[Model, Plan, Checkpoint, Any]:
    """The model on meta, its plan and its checkpoint, each checked against the others; nothing is loaded.

    hash_ahead: begin to check the parts of a split folder, which is going to be loaded.
    """
    family = find_model(config.model.name)
    folder = find_checkpoint(config)
    check_folder(family, folder)
    held, scheme = find_quant(config)
    checkpoint = open_checkpoint(folder, family.renames, [*family.ignored, *FOLLOWS], tp)
    if hash_ahead:  # beside the imports that follow
        checkpoint.hash_ahead(max(1, count_cores() // tp.size))
    model_config = load_model_config(family, folder)
    check_world_size(family, model_config, tp.size, held or (Ascend(scheme) if scheme else None))
    model = build_model(family, model_config, tp)
    if config.vision.backend != "torch":
        replace_tower(model, config.model.name, checkpoint, config.vision, tp)
    if held is not None:
        check_description(folder, checkpoint.stored_dtypes())
        hold_as_stored(model, checkpoint, held, tp)
    if scheme is not None:
        quantise_on_loading(model, scheme)
    plan = shard_plan(model, tp)
    checkpoint.check(plan, config.model.name)
    check_plain(model, plan, checkpoint)
    cast(model, find_dtype(config, checkpoint, plan, device))
    check_precision(model)
    return model, plan, checkpoint, model_config


def find_quant(config: Config) -> tuple[WeightFormat | None, Scheme | None]:
    """(how the checkpoint holds its weights, how plain ones are to be quantised on loading); at most one of them."""
    folder, asked = find_checkpoint(config), config.quant.scheme
    held = find_format(folder)
    if held is not None and asked not in ("auto", held.scheme.name):
        raise UserError(
            f"quant={asked}: {folder} is quantised as {held.scheme.name}; use quant=auto, or a plain checkpoint"
        )
    if held is not None or asked in ("auto", "none"):
        return held, None
    return None, Scheme(int(asked[1]), config.quant.group_size)


def load_engine(config: Config, tp: TP, backend: Backend, spans: Spans = NOT_MEASURED) -> AnyEngine:
    model, plan, checkpoint, model_config = open_model(config, tp, backend.device.type, hash_ahead=True)
    exported = find_exported(model)
    if exported is not None and tp.rank == 0:
        check_weights(exported, checkpoint)
    engine, decoding = settle_engine(config, model, backend.device.type, backend.chip)
    if backend.device.type != "cpu":
        log.info("decoding: %s", decoding)
    config = replace(config, engine=engine)
    settings = fit_memory(config, model, plan, tp, backend)
    kernels = choose_kernels(config, backend, model.dtype)
    start = time.perf_counter()
    bytes_read = load_weights(model, checkpoint, plan, tp, kernels)
    took = time.perf_counter() - start
    log.info("%.1f MB of weights in %.1f s, %s, kernels: %s", bytes_read / 1e6, took, model.dtype, kernels.level)
    on_rank_zero = tp.rank == 0
    processor = type(model).load_processor(checkpoint.folder, model_config, config.model) if on_rank_zero else None
    if isinstance(model, EncoderModel):
        return EncoderEngine(model, tp, settings, kernels, processor=processor, spans=spans)
    assert isinstance(model, MultimodalModel), f"no engine runs {type(model).__name__}"
    eos = find_eos(checkpoint.folder, model_config)
    return Engine(model, tp, settings, kernels, processor=processor, eos_token_ids=eos, spans=spans)


def choose_kernels(config: Config, backend: Backend, dtype: torch.dtype) -> Kernels:
    """hardware.kernels for a model of `dtype`."""
    if backend.chip is not None:
        return npu_kernels(backend.device, "plain" if config.hardware.kernels == "plain" else backend.chip.name)
    return find_kernels(config.hardware.kernels, backend.device, dtype)


def fit_memory(config: Config, model: Model, plan: Plan, tp: TP, backend: Backend) -> EngineConfig:
    """The engine's settings with as many cache blocks as memory holds; refused where one request would not fit.

    Every rank reckons for rank 0, which needs the most, so that all agree.
    """
    need = rank_memory(model, plan, TP(0, tp.size), config.engine)
    have = memory_per_rank(config.hardware, backend.device.type, tp.size)
    if need.total <= have:
        return config.engine
    num_blocks = count_fitting_blocks(model, config.engine, need, have)
    if num_blocks == 0:
        raise UserError(
            f"rank 0 needs {need.total / GIB:.2f} GiB, has {have / GIB:.2f} GiB: lower engine.max_num_seqs="
            f"{config.engine.max_num_seqs} or engine.max_model_len, or use more ranks; task=plan shows where it goes"
        )
    words = "only %d KV cache blocks fit %.2f GiB: requests may have to wait or be computed again"
    log.warning(words, num_blocks, have / GIB)
    return replace(config.engine, num_blocks=num_blocks)


def count_fitting_blocks(model: Model, config: EngineConfig, need: RankMemory, have: int) -> int:
    """Blocks of a smaller KV cache that fits; 0 where there is none, or none that holds one request."""
    if not isinstance(model, MultimodalModel) or config.num_blocks is not None:
        return 0
    shape = cache_shape(model, config)
    num_blocks = (have - need.total + need.kv_bytes) * shape.num_blocks // need.kv_bytes
    return num_blocks if num_blocks * shape.block_size >= shape.max_model_len else 0


def find_eos(folder: Path, model_config: Any) -> set[int]:
    """End-of-sequence ids: generation_config.json's, else the text config's."""
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    eos = model_config.text_config.eos_token_id if eos is None else eos
    return set(eos) if isinstance(eos, list) else {eos} - {None}
