"""Folders in compressed-tensors' format, as transformers reads them with the package of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import Case, answers, config_for, run_engine
from quant_cases import COMPRESSED, W4, quantize, tensors
from safetensors.torch import load_file, save_file
from split_cases import source
from transformers import LlavaNextForConditionalGeneration

from mmdist.engine.engine import Engine
from mmdist.quant import Compressed, Scheme
from mmdist.quant import quantize as quantize_weight
from weights_tools.cli import main

SCHEMES = {
    "w8a16": ("--scheme", "w8a16"),
    "w8a16-group": ("--scheme", "w8a16", "--group-size", "32"),
    "w4a16": ("--scheme", "w4a16", "--group-size", "0"),
    "w4a16-group": W4,
}


@pytest.mark.parametrize("bits", (4, 8))
def test_words_are_those_of_the_package(bits: int) -> None:
    weight = quantize_weight(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), Scheme(bits, 32))
    found = Compressed(Scheme(bits, 32)).write(weight)
    assert torch.equal(found["weight_packed"], pack_to_int32(weight.q, bits))
    assert found["weight_shape"].tolist() == [6, 64] and found["weight_shape"].dtype == torch.int64


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_transformers_gives_the_same(mistral: Case, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    """Greedy tokens and their log probabilities in float32, with and without pictures; scales in the stored dtype."""
    plain = mistral.checkpoint if dtype == torch.float16 else as_bfloat16(tmp_path / "plain")
    folder = quantize(plain, tmp_path / "q", *COMPRESSED, *SCHEMES[scheme])
    scales = [x for name, x in tensors(folder).items() if name.endswith("weight_scale")]
    assert len(scales) == 21 and all(scale.dtype == dtype for scale in scales)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompts: dict[str, Any] = {}

    def work(engine: Engine) -> Any:
        params = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 1}
        requests = [mistral.request(engine, item_id, **params) for item_id in ("column", "no_image")]
        prompts.update({request.id: request.prompt for request in requests})
        return answers(engine, requests)

    for item_id, output in run_engine(1, config_for(folder), work).items():
        ids = torch.tensor([prompts[item_id].token_ids + output.token_ids[:-1]])
        with torch.no_grad():
            logits = model(input_ids=ids, **prompts[item_id].vision, logits_to_keep=6).logits[0]
        assert logits.argmax(-1).tolist() == output.token_ids
        found = torch.tensor([entry["logprob"] for entry in output.logprobs])
        torch.testing.assert_close(found, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=0)


def as_bfloat16(folder: Path) -> Path:
    folder.mkdir()
    for path in source().iterdir():
        if path.suffix == ".safetensors":
            save_file({name: x.bfloat16() for name, x in load_file(path).items()}, folder / path.name, {"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_split_and_verified(tmp_path: Path) -> None:
    folder = quantize(source(), tmp_path / "q", *COMPRESSED)
    for size in ("2", "4", "8"):
        assert main(["split", str(folder), "--ranks", size, "--dst", str(tmp_path / size)]) == 0
        assert main(["verify", str(tmp_path / size), "--against", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
