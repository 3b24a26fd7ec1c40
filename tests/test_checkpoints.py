"""Checkpoints as users have them, made by transformers itself: names, files, dtypes, odd vocabularies and pictures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmdist.backend import Backend
from mmdist.config import SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.request import Request
from mmdist.kernels.kernels import Kernels
from mmdist.loading import load_weights
from mmdist.models.family import build_model, find_model, legal_world_sizes, load_model_config
from mmdist.tasks.requests import user_message
from mmdist.tp import TP

# Text models of the three kinds, with fewer KV heads than ranks, and vocabularies that no world size divides.
KINDS = {
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "vocab_size": 427, "rope_theta": 1e6},
    "vicuna": {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 427},
    "34b": {"model_type": "llama", "num_key_value_heads": 1, "vocab_size": 431, "rope_theta": 5e6},
}
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}  # fmt: skip


def make_random(kind: str, source: Path, folder: Path) -> LlavaNextForConditionalGeneration:
    """A random model of `kind`, saved by transformers, with the vision sizes and tokenizer of a golden checkpoint."""
    settings = json.loads((source / "config.json").read_text())
    settings["text_config"] = {**TEXT, **KINDS[kind]}
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(**{k: v for k, v in settings.items() if k != "torch_dtype"})
    )
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(4)
    model.generation_config.eos_token_id = None
    model.eval().save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.startswith(("config", "model", "generation")):
            shutil.copy(path, folder)
    return model


def reference_tokens(model: LlavaNextForConditionalGeneration, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt.token_ids])
    count = request.params.max_new_tokens
    out = model.generate(input_ids=ids, **request.prompt.vision, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def text_and_pictures(engine: Engine) -> list[Request]:
    """No picture, one, and two of different shapes, in one batch."""
    pictures = [
        Image.effect_mandelbrot((w, h), (-2, -1.5, 1, 1.5), 50).convert("RGB") for w, h in ((64, 41), (33, 150))
    ]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    return [
        Request(str(n), engine.prompts.prompt(messages=[user_message("Describe it.", n)], images=pictures[:n]), params)
        for n in range(3)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_equal_transformers(kind: str, mistral: Case, tmp_path: Path) -> None:
    """Greedy tokens and their log probabilities at every size; the file names are transformers 5's."""
    model = make_random(kind, mistral.checkpoint, tmp_path)
    wanted: dict[str, list[int]] = {}

    def work(engine: Engine) -> Any:
        requests = text_and_pictures(engine)
        for request in requests:
            request.params.logprobs = 3
            if request.id not in wanted:
                wanted[request.id] = reference_tokens(model, request)
        return answers(engine, requests)

    logprobs = {}
    for size in (1, 2, 4, 8):
        outputs = run_engine(size, config_for(tmp_path, max_model_len=1024), work)
        assert {i: output.token_ids for i, output in outputs.items()} == wanted
        for item_id, output in outputs.items():
            found = torch.tensor([entry["logprob"] for entry in output.logprobs])
            torch.testing.assert_close(found, logprobs.setdefault(item_id, found), atol=1e-4, rtol=0)


def test_every_stored_form_gives_the_same(mistral: Case, tmp_path: Path) -> None:
    """Hub names in shards, transformers 5's state-dict names in one file, and what its save_pretrained writes."""
    model = LlavaNextForConditionalGeneration.from_pretrained(mistral.checkpoint, dtype=torch.float32)
    saved, plain, sharded = tmp_path / "saved", tmp_path / "plain", tmp_path / "sharded"
    for folder in (saved, plain, sharded):
        shutil.copytree(mistral.checkpoint, folder, ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained(saved)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, plain / "model.safetensors")
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert any(name.startswith("model.language_model.") for name in load_file(plain / "model.safetensors"))
    expected = mistral.reference()["panorama/greedy_ids"].ravel().tolist()
    for folder in (mistral.checkpoint, saved, plain, sharded):

        def work(engine: Engine) -> Any:
            return answers(engine, [mistral.request(engine, "panorama", max_new_tokens=12, ignore_eos=True)])

        assert run_engine(2, config_for(folder), work)["panorama"].token_ids == expected, folder.name


@pytest.mark.parametrize(
    "left_out", (["num_additional_image_tokens"], ["patch_size", "num_additional_image_tokens"], None)
)
def test_older_processor_files(mistral: Case, tmp_path: Path, left_out: list[str] | None) -> None:
    """Folders from before processor_config.json, or before it said everything, give the same prompts."""
    folder = tmp_path / "older"
    shutil.copytree(mistral.checkpoint, folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in (left_out or [])}))
    if left_out is None:
        path.unlink()
    prompts = load_engine(config_for(folder), TP(), Backend(torch.device("cpu"), "gloo"))
    for item_id in mistral.items:
        wanted = mistral.reference()[f"{item_id}/input_ids"][0].tolist()
        assert mistral.request(prompts, item_id).prompt.token_ids == wanted


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(mistral: Case, tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """Any stored dtype runs in any dtype; logits stay near the reference as far as the dtype allows."""
    folder = tmp_path / "stored"
    shutil.copytree(mistral.checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for path in sorted(mistral.checkpoint.glob("*.safetensors")):
        tensors.update({name: tensor.to(stored) for name, tensor in load_file(path).items()})
    save_file(tensors, folder / "model.safetensors")

    def work(engine: Engine) -> Any:
        request = mistral.request(engine, "panorama", max_new_tokens=1, logprobs=416)
        assert engine.runner.model.dtype == getattr(torch, dtype)
        return answers(engine, [request])["panorama"].logprobs[0]["top"]

    found = {entry["token_id"]: entry["logprob"] for entry in run_engine(2, config_for(folder, dtype=dtype), work)}
    wanted = torch.from_numpy(mistral.reference()["panorama/last_logits"]).ravel().log_softmax(-1)
    exact = dtype == "float32" and stored != torch.bfloat16
    error = max(abs(found[i] - float(wanted[i])) for i in range(len(wanted)))
    assert error <= (1e-4 if exact else 0.5)


def test_dtype_auto_is_the_stored_one(mistral: Case, tmp_path: Path) -> None:
    make_random("vicuna", mistral.checkpoint, tmp_path)
    engine = load_engine(config_for(tmp_path, dtype="auto"), TP(), Backend(torch.device("cpu"), "gloo"))
    assert engine.runner.model.dtype == torch.float32
    engine = load_engine(config_for(mistral.checkpoint, dtype="auto"), TP(), Backend(torch.device("cpu"), "gloo"))
    assert engine.runner.model.dtype == torch.bfloat16  # float16 has no fast product on a CPU


@pytest.mark.parametrize("size", (1, 2, 4, 8))
def test_a_rank_reads_only_its_own_slices(case: Case, size: int) -> None:
    """Bytes read by each rank are those of its parts in the source's dtypes, and no more."""
    family = find_model(case.model)
    config = load_model_config(family, case.checkpoint)
    if size not in legal_world_sizes(family, config):
        return
    for rank in range(size):
        tp = TP(rank, size)
        model, plan, checkpoint, _ = open_model(config_for(case), tp, "cpu")
        mine = [placement for placement in plan.values() if placement.held_by(tp)]
        own = sum(math.prod(p.part_shape(tp)) * checkpoint.dtype(p.name).itemsize for p in mine)
        assert load_weights(model, checkpoint, plan, tp, Kernels(torch.device("cpu"))) == own
        assert rank == 0 or all(param.is_meta for param in model.vision.parameters())


SIZES = [
    (214, 61),
    (53, 139),
    (1, 400),
    (400, 1),
    (71, 70),
    (70, 70),
    (141, 139),
    (209, 69),
    (333, 334),
    (97, 211),
    (64, 63),
]


@pytest.mark.parametrize("kind", ("mistral", "vicuna", "34b"))
def test_anyres_packing_equals_transformers(kind: str) -> None:
    """Our encode_images against LlavaNextModel.get_image_features, for odd paddings in both directions."""
    case = Case(f"llava_next_{kind}")
    model = LlavaNextForConditionalGeneration.from_pretrained(case.checkpoint, dtype=torch.float32)

    def work(engine: Engine) -> None:
        for width, height in SIZES:
            picture = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 40).convert("RGB")
            prompt = engine.prompts.prompt(messages=[user_message("What?", 1)], images=[picture])
            ours = engine.runner.encode_images(prompt.vision)
            with torch.no_grad():
                theirs = torch.cat(model.model.get_image_features(**prompt.vision).pooler_output)
            assert len(prompt.image_positions) == len(ours)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    run_engine(1, config_for(case.checkpoint), work)


def test_large_model_is_built_without_memory() -> None:
    """LLaVA-1.6-34B's shapes at 8 ranks, on meta; head counts from the class defaults where config.json is silent."""
    text = {
        "model_type": "llama", "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
        "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64064,
    }  # fmt: skip
    config = LlavaNextConfig(text_config=text)
    model = build_model(find_model("llava_next"), config, TP(3, 8), torch.float16)
    assert all(param.is_meta for param in model.parameters())
    assert model.num_kv_heads == 1 and model.decoder.embed_tokens.weight.shape == (64064 // 8, 7168)
    assert image_size_to_num_patches([672, 672], config.image_grid_pinpoints, 336) == 5
