"""Families through the engine on the NPU kernels, over reference kernels in place of the chip's: the answers of plain
torch in float16; and the real models' shapes on 8 ranks, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import answers, config_for, convert, run_ranks
from npu.library import define, operations_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmdist.ascend import CHIPS
from mmdist.backend import Backend
from mmdist.collectives.distributed import DistributedCollectives
from mmdist.config import Config, EngineConfig, HardwareConfig, QuantConfig, SamplingParams
from mmdist.engine.batch import Batch, NewMemory
from mmdist.engine.cache import PagedCache, cache_shape
from mmdist.engine.load import load_engine
from mmdist.engine.runner import Runner
from mmdist.kernels.npu import npu_kernels
from mmdist.kernels.npu_plan import PLANS
from mmdist.loading import FinishesLoading
from mmdist.models.base import MultimodalModel
from mmdist.models.family import build_model, find_model
from mmdist.models.mllama import Seen
from mmdist.models.vlmo import VlmoConfig
from mmdist.models.vlmo_blocks import BOTH
from mmdist.spans import Spans
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from weights_tools.layouts import list_layouts

ASSETS = Path(__file__).parents[1] / "assets"
CPU = torch.device("cpu")
QUESTION = "What is the shape in the middle?"


def shapes_config(family: str, quant: str) -> Config:
    """Its shapes checkpoint in float16, few tokens a step, so that prompts come in chunks."""
    folder = ASSETS / f"{family}-shapes"
    checkpoint = convert(family, folder, ()) if family in list_layouts() else folder
    engine = {"max_num_seqs": 2, "max_model_len": 384, "max_num_batched_tokens": 48}
    return config_for(checkpoint, model=family, dtype="float16", quant=QuantConfig(scheme=quant), **engine)


def ask(config: Config, chip: str | None) -> list[Any]:
    """The answers of 2 ranks, on the kernels of a chip or on plain torch's."""
    config = replace(config, hardware=HardwareConfig(device="cpu", kernels="auto" if chip else "plain"))
    backend = Backend(CPU, "gloo", CHIPS[chip] if chip else None)

    def work(tp: TP) -> list[Any]:
        engine = load_engine(config, tp, backend)
        if tp.rank:
            engine.follow()
            return []
        lines = [{"id": name, "question": QUESTION, "image": f"{name}.png"} for name in ("shapes", "shapes_single")]
        params = SamplingParams(max_new_tokens=12)
        requests = [build_request(line, engine.prompts, params, ASSETS / "pictures") for line in lines]
        found = answers(engine, requests)
        engine.stop()
        assert not [output.error for output in found.values() if output.error is not None]
        return [found[line["id"]].token_ids for line in lines]

    return run_ranks(2, work)[0]


@pytest.mark.parametrize(
    ("family", "quant"),
    (("llava_next", "auto"), ("llava_next", "w8a16"), ("mllama", "auto"), ("minigpt4", "auto"),
     ("llama_adapter", "auto"), ("vlmo", "auto")),
)  # fmt: skip
def test_a_family_answers_as_on_plain_torch(family: str, quant: str) -> None:
    config = shapes_config(family, quant)
    want = ask(config, None)
    assert all(want)
    for chip in PLANS:
        with operations_of(chip) as called:
            assert ask(config, chip) == want, chip
        assert called or (family, chip) == ("vlmo", "910b")  # whose short inputs leave nothing but torch


def real_models() -> dict[str, tuple[str, Any]]:
    """Family and config, as the hub's config.json has them: LLaVA-1.6-34B, Llama-3.2-11B-Vision, VLMo base."""
    llava = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(
            hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
            num_key_value_heads=8, vocab_size=64064, max_position_embeddings=4096, rope_theta=5e6,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
    )  # fmt: skip
    mllama = transformers.MllamaConfig(vision_config=transformers.MllamaVisionConfig(image_size=560))
    return {
        "34b": ("llava_next", llava),
        "11b": ("mllama", mllama),
        "vlmo": ("vlmo", VlmoConfig()),
    }


@contextmanager
def fake_rank(rank: int, size: int) -> Iterator[TP]:
    """A rank whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield TP(rank, size, DistributedCollectives(rank, size, dist.group.WORLD))
    finally:
        dist.destroy_process_group()


def fill_with_shapes(model: nn.Module, kernels: Any, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            empty = torch.empty(param.shape, dtype=dtype if param.is_floating_point() else param.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    for module in model.modules():
        if isinstance(module, FinishesLoading):
            module.after_load(kernels)


SIZES = (("34b", 8), ("11b", 8), ("vlmo", 4), ("vlmo", 6))  # VLMo's 12 heads do not divide into 8


@pytest.mark.parametrize("chip", PLANS)
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_a_real_model_keeps_its_shapes_on_many_ranks(name: str, size: int, chip: str) -> None:
    """All layers: a prompt in two chunks beside a decoding sequence; the pictures' towers run on rank 0.

    Rank 0 and the last run, the others have the last one's shapes.
    """
    define()
    family, config = real_models()[name]
    last: dict[str, torch.Size] = {}
    for rank in (size - 1, *range(size - 1)):
        with fake_rank(rank, size) as tp:
            kernels, model = npu_kernels(CPU, chip), build_model(find_model(family), config, tp)
            shapes = {key: param.shape for key, param in model.named_parameters() if not key.startswith("vision.")}
            last = last or shapes
            assert shapes == last
            if rank in (0, size - 1):
                with FakeTensorMode(), torch.inference_mode():
                    fill_with_shapes(model, kernels, torch.float16)
                    check_rank(model, config, tp, kernels, CHIPS[chip].block_sizes[0])


def check_rank(model: Any, config: Any, tp: TP, kernels: Any, block_size: int) -> None:
    if isinstance(model, MultimodalModel):
        assert len(model.decoder.layers) == config.text_config.num_hidden_layers
        check_generating(model, tp, kernels, block_size)
    else:
        check_encoding(model)


def check_encoding(model: Any) -> None:
    hidden = torch.empty(2, 941, 768, dtype=torch.float16)
    assert model(hidden, torch.ones(2, 941, dtype=torch.bool), BOTH).shape == hidden.shape
    assert model.head(hidden, BOTH).shape == (2, 3129)


def check_generating(model: MultimodalModel, tp: TP, kernels: Any, block_size: int) -> None:
    settings = EngineConfig(max_model_len=4096, block_size=block_size, max_num_seqs=2)
    runner = Runner(model, PagedCache(cache_shape(model, settings), torch.float16, kernels), tp, kernels, Spans())
    looks = bool(model.memory_numbers())
    pictures = fake_pictures(model, looks) if tp.rank == 0 else torch.empty(0)
    picture_rows = 4 * 1601 if looks else 5 * 576
    assert tp.rank or pictures.shape == (picture_rows, model.hidden_size)
    blocks = [list(range(20)), list(range(20, 40))]
    ids, kept = (["one", "one"], ["one"]) if looks else (["", ""], [])
    rows = [] if looks else list(range(3, 600))
    new = [NewMemory("one", (picture_rows, model.hidden_size), [Seen(1, None, 2)])] if looks else []
    batches = (
        Batch([1] * 2000, [2000], [2000], blocks[:1], rows, [], [], ids[:1], kept, new),
        Batch([1] * 201, [1, 200], [2001, 200], blocks, [], [0, 200], [1, 1], ids, kept),
        Batch([1] * 200, [200], [400], blocks[1:], [], [199], [1], ids[:1], kept),
    )
    for number, batch in enumerate(batches):
        own = [pictures[: len(rows)]] if rows and number == 0 and tp.rank == 0 else []
        hidden = runner.hidden(batch, own, [pictures] if new and number == 0 else [])
        assert hidden.shape == (len(batch.logits_rows), model.hidden_size)
        if batch.logits_rows:
            values, tokens = model.lm_head.top_k(model.lm_head.local(hidden), 1)
            assert values.shape == tokens.shape == (len(batch.logits_rows), 1)


def fake_pictures(model: MultimodalModel, looks: bool) -> torch.Tensor:
    """What rank 0's tower makes of a picture."""
    size, half = 560 if looks else 336, {"dtype": torch.float16}
    if not looks:
        return model.vision.projector(model.vision.tower(torch.empty(5, 3, size, size, **half))).flatten(0, 1)
    vision = {
        "pixel_values": torch.empty(1, 4, 3, size, size, **half),
        "aspect_ratio_ids": torch.ones(1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 4, dtype=torch.long),
    }
    return model.encode_images(vision)
