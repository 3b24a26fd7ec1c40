"""Quantised weights: the integers, their cuts, the way from plain numbers on loading, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, answers, config_for, run_engine, run_ranks
from safetensors.torch import load_file, save_file

from mmdist.config import QuantConfig, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import open_model
from mmdist.kernels.linear import quantized_linear
from mmdist.layers.linear import ColumnParallelLinear, ParallelWeight, RowParallelLinear
from mmdist.plan import Piece, cut, shard_plan
from mmdist.quant import FORMATS, Ascend, Quantized, Scheme, WeightFormat, quantize
from mmdist.tp import TP

SIZES = (1, 2, 4, 8)
SCHEMES = [Scheme(8), Scheme(8, 16), Scheme(4), Scheme(4, 16)]


def weights(rows: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def scheme_name(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.group_size}"


@pytest.fixture
def w8a16() -> Case:
    return Case("llava_next_mistral_w8a16")


def test_integers_are_msmodelslims(mistral: Case, w8a16: Case) -> None:
    """Every weight of the float golden case, quantised here, is the golden W8A16 file's."""
    plain: dict[str, torch.Tensor] = {}
    for file in mistral.checkpoint.glob("*.safetensors"):
        plain |= load_file(file)
    (file,) = w8a16.checkpoint.glob("*.safetensors")
    golden = load_file(file)
    names = [name for name, tensor in golden.items() if tensor.dtype == torch.int8]
    assert len(names) == 21
    for name in names:
        ours = Ascend(Scheme(8)).write(quantize(plain[name], Scheme(8)))
        for leaf in Ascend.names:
            assert torch.equal(ours[leaf], golden[name.removesuffix("weight") + leaf]), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_stored_and_read_again(format: type[WeightFormat], scheme: Scheme) -> None:
    weight = quantize(weights(), scheme)
    stored = format(scheme).write(weight)
    again = format(scheme).read(stored)
    assert torch.equal(again.q, weight.q) and torch.equal(again.scale, weight.scale) and again.offset is None
    assert (again.dequantize() - weights()).abs().max() <= weight.scale.max() / 2 + 1e-6
    specs = format(scheme).specs(*weights().shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items() if name in specs} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }


def test_two_4_bit_values_share_a_byte() -> None:
    """msmodelslim: neighbouring columns where a row has one scale, neighbouring rows where columns are in groups."""
    q = torch.tensor([[1, -2], [3, -8]], dtype=torch.int8)
    for group_size, scale, stored in ((0, torch.ones(2, 1), [[-31], [-125]]), (1, torch.ones(2, 2), [[49, -114]])):
        format = Ascend(Scheme(4, group_size))
        found = format.write(Quantized(4, q, scale))
        assert found["weight"].tolist() == stored
        assert torch.equal(format.read(found).q, q)
        older = Ascend(Scheme(4, group_size), packed=False)
        assert torch.equal(older.write(Quantized(4, q, scale))["weight"], q)


def test_a_part_must_not_cut_through_a_byte() -> None:
    with torch.device("meta"):
        layer = ColumnParallelLinear(32, [Piece(6), Piece(6)], TP(0, 2))
    with pytest.raises(UserError, match="would cut through what weight stores together"):
        layer.store_as(Ascend(Scheme(4, 16)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
def test_the_product_is_that_of_the_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize(weights(), scheme)
    linear, bias = quantized_linear(weight), torch.randn(48)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 128)
        wanted = x.to(dtype).float() @ weight.dequantize().T + bias
        error = (linear(x.to(dtype), bias.to(dtype)).float() - wanted).abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 0.03 * wanted.abs().max())


def test_rows_that_fill_no_vector() -> None:
    """torch's int8 product reads beyond such a weight: wrong numbers in most calls, or a crash."""
    for columns in (8, 12, 24, 344):
        weight = quantize(weights(48, columns), Scheme(8))
        linear, x = quantized_linear(weight), torch.randn(3, columns, dtype=torch.bfloat16)
        wanted = x.float() @ weight.dequantize().T
        for _ in range(20):
            assert (linear(x, None).float() - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_offsets_are_subtracted() -> None:
    """(q - offset) * scale, as the formula says; the NPU's operator adds."""
    weight = Quantized(8, torch.tensor([[10, -3]], dtype=torch.int8), torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    assert quantized_linear(weight)(torch.eye(2), None).flatten().tolist() == [4.0, -2.5]


def build(kind: str, tp: TP) -> ParallelWeight:
    with torch.device("meta"):
        if kind == "row":
            return RowParallelLinear(128, 48, tp)
        return ColumnParallelLinear(128, [Piece(32), Piece(16)], tp)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", ("row", "column"))
def test_quantise_then_cut_is_cut_then_quantise(
    kind: str, format: type[WeightFormat], scheme: Scheme, size: int
) -> None:
    """Bit for bit: the parts of a quantised checkpoint, and what a rank makes of its part of a plain one."""
    whole = format(scheme).write(quantize(weights(), scheme))

    def work(tp: TP) -> Any:
        stored, plain = build(kind, tp), build(kind, tp)
        stored.store_as(format(scheme))
        placements = {placement.name: placement for placement in shard_plan(stored, tp).values()}
        parts = format(scheme).read({name: cut(whole[name], placements[name], tp) for name in placements})
        part = cut(weights(), shard_plan(plain, tp)["weight"], tp)
        plain.weight = torch.nn.Parameter(part, requires_grad=False)
        return parts, plain.quantized(scheme)

    for parts, own in run_ranks(size, work):
        assert torch.equal(parts.q, own.q) and torch.equal(parts.scale, own.scale)


@pytest.mark.parametrize("size", SIZES)
def test_quantised_on_loading_is_the_quantised_checkpoint(mistral: Case, w8a16: Case, size: int) -> None:
    """quant=w8a16 on the float folder gives the golden W8A16 case's tokens and log probabilities."""
    reference = w8a16.reference()

    def work(engine: Engine) -> Any:
        requests = [mistral.request(engine, i, max_new_tokens=12, ignore_eos=True, logprobs=1) for i in w8a16.items]
        return answers(engine, requests)

    config = config_for(mistral, quant=QuantConfig("w8a16"))
    for item_id, output in run_engine(size, config, work).items():
        assert output.token_ids == reference[f"{item_id}/greedy_ids"].ravel().tolist()
        wanted = torch.from_numpy(reference[f"{item_id}/greedy_logits"]).reshape(12, -1).log_softmax(-1).amax(-1)
        assert np.abs([entry["logprob"] for entry in output.logprobs] - wanted.numpy()).max() <= 1e-4


def test_groups_that_do_not_divide_name_the_legal_sizes(mistral: Case) -> None:
    with pytest.raises(UserError, match=r"world_size=8: group_size=32 does not divide .*; legal sizes: 1"):
        open_model(config_for(mistral, quant=QuantConfig("w4a16", 32)), TP(0, 8), "cpu")


def spoil(case: Case, folder: Path, change: str) -> Path:
    """A copy of the W8A16 case with something wrong."""
    shutil.copytree(case.checkpoint, folder)
    description, config = folder / "quant_model_description.json", folder / "config.json"
    types = json.loads(description.read_text())
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, kind in types.items() if kind == "W8A16" and name.endswith("down_proj.weight"))
    if change == "scale missing":
        del tensors[f"{name}_scale"]
    elif change == "part plain":
        name = name.replace("down_proj", "up_proj")
        tensors[name] = tensors[name].half()
        for leaf in ("scale", "offset"):
            del tensors[f"{name}_{leaf}"], types[f"{name}_{leaf}"]
        types[name] = "FLOAT"
    elif change == "wrong type":
        types[name] = "FLOAT"
    elif change == "untyped":
        del types[name]
    elif change == "no description":
        types = None
    elif change == "other scheme":
        types["model_quant_type"] = "W8A8"
    elif change == "other method":
        types = None
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    save_file(tensors, file)
    description.unlink() if types is None else description.write_text(json.dumps(types))
    return folder


SPOILED = {
    "scale missing": "1 tensors of llava_next missing",
    "part plain": "is not quantised, the rest of",
    "wrong type": "is FLOAT there, I8 in its file",
    "untyped": "1 tensors without a type",
    "no description": "not used by it",
    "other scheme": "mmdist reads W8A16 or W4A16",
    "other method": "quantization_config is awq",
}


@pytest.mark.parametrize("change", SPOILED)
def test_what_disagrees_is_refused(w8a16: Case, tmp_path: Path, change: str) -> None:
    folder = spoil(w8a16, tmp_path / "spoiled", change)
    with pytest.raises(UserError) as error:
        open_model(config_for(folder), TP(), "cpu")
    assert SPOILED[change] in str(error.value)


@pytest.mark.parametrize("asked", ("none", "w4a16"))
def test_another_scheme_than_the_checkpoints(w8a16: Case, asked: str) -> None:
    with pytest.raises(UserError, match="is quantised as w8a16"):
        open_model(config_for(w8a16, quant=QuantConfig(asked)), TP(), "cpu")


def test_integers_without_scales_are_no_plain_checkpoint(mistral: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mistral.checkpoint, tmp_path / "integers"))
    file = next(f for f in sorted(folder.glob("*.safetensors")) if any("q_proj" in n for n in load_file(f)))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"q_proj.weight is torch.int8, without scales"):
        open_model(config_for(folder), TP(), "cpu")


def test_memory_is_reckoned_in_integers(mistral: Case) -> None:
    """The plan of a quantised run counts a byte a weight (half a byte at 4 bits) and its scales."""
    sizes = {}
    for name, quant in (("plain", QuantConfig()), ("w8", QuantConfig("w8a16")), ("w4", QuantConfig("w4a16"))):
        model, *_ = open_model(config_for(mistral, quant=quant), TP(), "cpu")
        layers = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
        sizes[name] = sum(layer.bytes_once_ready() for layer in layers)
        rows = sum(len(layer.weight) for layer in layers)
    assert sizes["w8"] == sizes["plain"] // 4 + 4 * rows
    assert sizes["w4"] == sizes["plain"] // 8 + 4 * rows
