"""task=performance: how fast it is, phase by phase, beside the machine's own limits measured in the same run."""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmdist.backend import Backend, synchronize
from mmdist.collectives.counted import CountedCollectives
from mmdist.config import UserError
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.engine import Engine
from mmdist.engine.load import AnyEngine, find_checkpoint, find_quant, load_engine
from mmdist.media import load_image, load_video
from mmdist.models.base import Prompt
from mmdist.performance.figures import Case, measured_point, stopped_point
from mmdist.performance.limits import Limits
from mmdist.performance.machine import describe_machine
from mmdist.performance.ranks import Ranks
from mmdist.performance.report import Report, table
from mmdist.performance.results import Result
from mmdist.performance.workload import Workload, run_batch
from mmdist.shipped import SHIPPED
from mmdist.spans import TimedSpans, cost_s
from mmdist.task_config import PerformanceConfig
from mmdist.tasks.performance_reports import begin_sweep as begin_sweep
from mmdist.tasks.performance_reports import changed_keys, finish, read_compared, read_kept
from mmdist.tasks.performance_reports import is_finished as is_finished
from mmdist.tasks.performance_reports import report_sweep as report_sweep
from mmdist.tasks.requests import check_takes_video, user_message
from mmdist.tp import TP

ON_RANKS = True
TRACED_TOKENS = 8  # of an answer, in a traced run: enough to see, few enough to open
log = logging.getLogger("mmdist.performance")


def check(config: PerformanceConfig) -> None:
    read_compared(config)
    image, video = find_media(config)
    if image is not None:
        load_image(image)
    if video is not None:
        load_video(video, config.video_frames)


def open_engine(config: PerformanceConfig, tp: TP, backend: Backend) -> AnyEngine:
    """An engine whose collectives are counted and whose phases are timed."""
    counted = tp if tp.group is None else replace(tp, group=CountedCollectives(tp.group))
    spans = TimedSpans(partial(synchronize, backend.device), traced=config.profile)
    try:
        engine = load_engine(config, counted, backend, spans)
        if tp.size > 1 and isinstance(engine, Engine) and engine.runner.graphs is not None:
            log.warning("collectives within captured graphs are not counted; engine.decode_graph=off counts them all")
        return engine
    except UserError as error:
        if "engine.max_num_seqs=" not in str(error):
            raise
        raise UserError(f"{error}; batch_sizes= (with climb=true max_batch_size=) is what sets it") from error


def run(config: PerformanceConfig, engine: AnyEngine) -> int:
    measuring = Measuring(config, engine)
    total = None if config.climb else len(config.batch_sizes) * (config.warmup + config.repeats)
    with tqdm(total=total, unit="run", disable=not sys.stderr.isatty()) as bar:
        for batch_size in measuring.batch_sizes():
            measuring.measure(batch_size, bar)
    report = measuring.report
    report.finish()
    print(table(report.content["points"]))
    log.info("%d points in %s", len(report.content["points"]), report.folder)
    return finish(config, report.folder, [Result({}, report.content)])


def follow(config: PerformanceConfig, engine: AnyEngine) -> int:
    return Ranks(engine).follow()


class Measuring:
    """Rank 0's view: points one after another, each written when it is there."""

    def __init__(self, config: PerformanceConfig, engine: AnyEngine):
        self.config, self.engine, self.ranks = config, engine, Ranks(engine)
        self.workload = build_workload(config, engine)
        self.case = find_case(self.workload, engine)
        self.capacity = check_batch_sizes(config, engine, self.case)
        own = describe_config(config, engine)
        self.kept = read_kept(config, own)
        self.report = Report(Path(str(config.output_dir)), own, describe_machine(engine.device))
        self.span_cost_s = cost_s()
        self.work = self.ranks.work()
        self.limits = [self.ranks.limits()]

    def batch_sizes(self) -> Iterator[int]:
        """batch_sizes=, and with climb=true twice the last one again and again, until there is a reason to stop."""
        config = self.config
        for size in config.batch_sizes:
            yield size
            if config.climb and self.is_slow():
                return
        largest = min(self.capacity, config.max_batch_size)
        while config.climb and size < largest:
            size = min(2 * size, largest)
            yield size
            if self.is_slow():
                return
        if config.climb and self.capacity < config.max_batch_size:
            self.add(stopped_point(self.sized(size + 1), self.describe_capacity()))

    def measure(self, batch_size: int, bar: tqdm) -> None:
        if batch_size in self.kept:
            self.add(self.kept[batch_size])
            return
        config, case = self.config, self.sized(batch_size)
        bar.set_description(f"batch {batch_size}")
        runs = []
        for number in range(-config.warmup, config.repeats):
            run, reports = self.ranks.run(partial(run_batch, self.engine, self.workload, batch_size))
            run.ranks = reports
            bar.update()
            if number >= 0:
                runs.append(run)
        self.limits.append(self.ranks.limits())
        point = measured_point(case, runs, mean(self.limits[-2:]), self.work, self.span_cost_s)
        if config.max_tpot_ms is not None and point["median_tpot_ms"] > config.max_tpot_ms:
            point["status"] = f"stopped: the median TPOT is above max_tpot_ms={config.max_tpot_ms:g}"
        self.add(point)
        if config.profile:
            self.trace(batch_size)

    def trace(self, batch_size: int) -> None:
        file = self.report.folder / f"trace-batch{batch_size}-rank{{rank}}.json.gz"
        workload = replace(self.workload, output_len=min(self.workload.output_len, TRACED_TOKENS))
        self.ranks.trace(file, partial(run_batch, self.engine, workload, batch_size))

    def add(self, point: dict[str, Any]) -> None:
        whole = mean(self.limits, statistics.median)
        work = {} if self.work is None else asdict(self.work)
        dtype = str(self.engine.model.dtype).removeprefix("torch.")
        self.report.add(point, {**vars(whole), "matrix_dtype": dtype, **work})

    def is_slow(self) -> bool:
        return self.report.content["points"][-1]["status"] != "ok"

    def sized(self, batch_size: int) -> Case:
        return replace(self.case, batch_size=batch_size)

    def describe_capacity(self) -> str:
        return describe_capacity(self.engine, self.case)


def mean(limits: list[Limits], reckon: Callable[[list[float]], float] = statistics.fmean) -> Limits:
    return Limits(
        reckon([limit.memory_gb_per_s for limit in limits]), reckon([limit.matrix_gflop_per_s for limit in limits])
    )


def find_media(config: PerformanceConfig) -> tuple[Path | None, Path | None]:
    """(image=, video=), or with the shipped checkpoint the shipped ones."""
    image, video = config.image, config.video
    if config.checkpoint is None and image is None and video is None:
        shipped = (config.model.demo_image, config.model.demo_video)
        image, video = (None if name is None else str(SHIPPED / name) for name in shipped)
    return None if image is None else Path(image), None if video is None else Path(video)


def build_workload(config: PerformanceConfig, engine: AnyEngine) -> Workload:
    prompts, (image, video) = engine.prompts, find_media(config)
    if video is not None:
        check_takes_video(prompts, str(video))
    message = user_message(config.prompt, int(image is not None), int(video is not None))

    def make() -> Prompt:
        media: dict[str, Any] = {"images": [] if image is None else [load_image(image)]}
        if video is not None:
            media["videos"] = [load_video(video, config.video_frames)]
        if isinstance(engine, EncoderEngine) and engine.model.compares and image is not None:
            return prompts.prompt(**media)  # a picture or a text, not both
        return prompts.prompt(messages=[message], **media)

    frames = 0 if video is None else len(load_video(video, config.video_frames))
    output_len = 1 if isinstance(engine, EncoderEngine) else config.output_len
    return Workload(make, config.input_len, output_len, int(image is not None), frames)


@torch.inference_mode()
def find_case(workload: Workload, engine: AnyEngine) -> Case:
    """Refused where the engine would refuse the request."""
    if isinstance(engine, EncoderEngine):
        if workload.input_len is not None:
            raise UserError(
                f"input_len={workload.input_len}: this model's inputs have one length; leave input_len= out"
            )
        prompt = workload.prompt(0)
        _, mask = engine.model.embed([prompt], engine.model.kind(prompt))
        input_len = mask.shape[1]
    else:
        input_len = len(workload.prompt(0).token_ids)
        total = input_len + workload.output_len
        if total > engine.max_model_len:
            raise UserError(
                f"a prompt of {input_len} tokens and output_len={workload.output_len} come to {total}, more "
                f"than engine.max_model_len={engine.max_model_len}; lower output_len or input_len, or raise that"
            )
    return Case(0, input_len, workload.output_len, workload.num_pictures, workload.num_video_frames)


def find_capacity(engine: AnyEngine, case: Case) -> int:
    """Most requests that run side by side, none waiting for another's memory."""
    if isinstance(engine, EncoderEngine):
        return engine.max_num_seqs
    shape = engine.cache_shape
    blocks = -(-(case.input_len + case.output_len) // shape.block_size)
    return shape.num_blocks // blocks


def check_batch_sizes(config: PerformanceConfig, engine: AnyEngine, case: Case) -> int:
    """The capacity."""
    capacity = find_capacity(engine, case)
    if max(config.batch_sizes) > capacity:
        raise UserError(
            f"batch_sizes={config.batch_sizes}: {describe_capacity(engine, case)}; lower batch_sizes, input_len or "
            "output_len, or give it more memory (more ranks, engine.kv_cache_dtype=int8)"
        )
    return capacity


def describe_capacity(engine: AnyEngine, case: Case) -> str:
    tokens = case.input_len + case.output_len
    return f"memory for the KV cache holds {find_capacity(engine, case)} requests of {tokens} tokens"


def describe_config(config: PerformanceConfig, engine: AnyEngine) -> dict[str, Any]:
    held, scheme = find_quant(config)
    group = engine.tp.group
    return {
        "model": config.model.name,
        "world_size": engine.tp.size,
        "quant": held.scheme.name if held is not None else "none" if scheme is None else scheme.name,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "kernels": engine.kernels.level,
        "collectives": None if group is None else group.name,
        "checkpoint": str(find_checkpoint(config)),
        "threads_per_rank": torch.get_num_threads(),
        "overrides": changed_keys(config),
    }
