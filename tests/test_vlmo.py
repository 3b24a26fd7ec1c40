"""VLMo: numbers of upstream's code at every world size, how it is cut, and its original files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, answers, config_for, run_engine
from convert_cases import FILE, Edit, edit, refused, run
from vlmo_cases import SETTINGS, SIZES, TEXT_LEN, config, golden, inputs, plain, questions

from mmdist.config import UserError
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.load import open_model
from mmdist.engine.output import Answer
from mmdist.media import load_image
from mmdist.models.base import Prompt
from mmdist.models.family import check_world_size, legal_world_sizes
from mmdist.models.vlmo import Vlmo, VlmoConfig
from mmdist.models.vlmo_processor import load_answers
from mmdist.tp import TP
from weights_tools.cli import main as weights_tools


def encode(engine: EncoderEngine, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, tokens, hidden) behind the blocks, and what the head makes of it."""
    hidden = []
    hook = engine.model.register_forward_hook(lambda module, args, output: hidden.append(output))
    kind = engine.model.kind(prompts[0])
    scores = [engine.encode(prompts[i : i + 3], kind) for i in range(0, len(prompts), 3)]
    hook.remove()
    return torch.cat(hidden), torch.cat(scores)


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["vlmo_vqa", "vlmo_vqa_plus"])
def test_vqa_equals_the_reference(case: str, size: int) -> None:
    items, want = golden(case)

    @torch.inference_mode()
    def work(engine: EncoderEngine) -> list[Answer]:
        requests = questions(case, engine)
        hidden, logits = encode(engine, [request.prompt for request in requests])
        states = engine.model.output.norm(hidden)
        close(logits, want["vqa_logits"])
        close(engine.model.output.pool(hidden), want["cls_feats"])
        close(states[:, 0], want["raw_cls_feats"])
        close(states[:, :TEXT_LEN], want["text_feats"])
        close(states[:, TEXT_LEN:], want["image_feats"])
        return list(answers(engine, requests).values())

    got = run_engine(size, config(case), work)
    assert [(a.text, a.label) for a in got] == [(item["answer"], item["answer_label"]) for item in items]
    assert [a.truncated for a in got] == [False] * 6 + [True]


@pytest.mark.parametrize("size", SIZES)
def test_retrieval_equals_the_reference(size: int) -> None:
    case = "vlmo_retrieval"
    listed = json.loads((inputs(case) / "items.json").read_text())
    _, want = golden(case)

    @torch.inference_mode()
    def work(engine: EncoderEngine) -> None:
        images = [engine.prompts.prompt(images=[load_image(inputs(case) / name)]) for name in listed["images"]]
        texts = [engine.prompts.prompt(images=[], text=text) for text in listed["texts"]]
        hidden, image_features = encode(engine, images)
        close(engine.model.output.norm(hidden), want["image_feats"])
        hidden, text_features = encode(engine, texts)
        close(engine.model.output.norm(hidden), want["text_feats"])
        close(image_features, want["image_cls_feats"])
        close(text_features, want["text_cls_feats"])
        close(torch.cat(list(engine.features(images))), want["image_cls_feats"])
        close(engine.compare(image_features, text_features), want["logits_per_image"])

    run_engine(size, config(case), work)


@pytest.mark.parametrize("case", ["vlmo_vqa", "vlmo_retrieval"])
def test_words_and_pictures_equal_the_reference(case: str) -> None:
    items, want = golden(case)
    processor = Vlmo.load_processor(plain(case), VlmoConfig.from_pretrained(plain(case)), config(case).model)
    for item in items:
        ids = processor.text(item.get("question") or item["caption"]).token_ids
        assert ids == [token_id for token_id in item["text_ids"] if token_id != 0]
    listed = json.loads((inputs(case) / "items.json").read_text())["images"]
    pixels = [processor.pixel_values(load_image(inputs(case) / name)) for name in listed]
    assert np.array_equal(torch.cat(pixels).numpy(), want["pixel_values"])


def test_vlmo_base_in_eight_is_refused() -> None:
    assert legal_world_sizes(Vlmo, VlmoConfig()) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(UserError, match=r"world_size=8: 12 attention heads .* legal sizes: 1, 2, 3, 4, 6, 12$"):
        check_world_size(Vlmo, VlmoConfig(), 8)


def test_relative_position_bias_is_cut_inside_each_layer() -> None:
    """Of 3 layers' 8 columns each, rank 1 of 4 holds columns 2 and 3 of every layer; the 87 answers are not cut."""
    for rank in range(4):
        _, plan, _, _ = open_model(config("vlmo_vqa"), TP(rank, 4), "cpu")
        columns = [list(range(first, last)) for first, last in plan["position_bias.table"].ranges(TP(rank, 4))]
        assert columns == [[8 * layer + 2 * rank, 8 * layer + 2 * rank + 1] for layer in range(3)]
        assert plan["output.classifier.3.weight"].kind == "rank0" and plan["blocks.0.attn.q_bias"].kind == "cut"
        assert plan["blocks.0.attn.proj.bias"].kind == "replicated"


@pytest.mark.parametrize("case", SETTINGS)
def test_split_verify_load(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The parts answer as the whole; ranks behind the first hold no words, patches or answers."""
    folder = tmp_path / "tp2"
    assert weights_tools(["split", "vlmo", "--ranks", "2", "--src", str(plain(case)), "--dst", str(folder)]) == 0
    assert weights_tools(["verify", str(folder), "--against", str(plain(case))]) == 0
    assert "all is well" in capsys.readouterr().out

    def work(engine: EncoderEngine) -> torch.Tensor:
        prompts = [engine.prompts.prompt(images=[], text="a boat")]
        if not engine.model.compares:
            prompts = [request.prompt for request in questions(case, engine)[:3]]
        return engine.encode(prompts, engine.model.kind(prompts[0]))

    whole = run_engine(2, config(case), work)
    parts = run_engine(2, config_for(folder, model="vlmo"), work)
    assert torch.equal(whole, parts)
    _, plan, _, _ = open_model(config_for(folder, model="vlmo"), TP(1, 2), "cpu")
    rank_zero = {name.partition(".")[0] for name, placement in plan.items() if placement.rank_zero_only}
    assert rank_zero == {"embeddings", "output"}


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_wrapped_checkpoints(wrapper: str, original: Path, tmp_path: Path) -> None:
    prefix = "module." if wrapper == "module" else ""
    index = {"relative_position_index": torch.zeros(26, 26), "text_imag_relative_position_index": torch.zeros(66, 66)}
    edit(original, lambda state: {wrapper: {prefix + k: v for k, v in {**state, **index}.items()}, "epoch": 3})
    assert run(original, tmp_path / "dst") == 0
    same = [
        (tmp_path / "dst" / "model.safetensors").read_bytes(),
        (plain("vlmo_vqa") / "model.safetensors").read_bytes(),
    ]
    assert same[0] == same[1]


def without(word: str) -> Edit:
    return lambda state: {name: tensor for name, tensor in state.items() if word not in name}


def with_zeros(name: str, *shape: int) -> Edit:
    return lambda state: {**state, name: torch.zeros(shape)}


SPOILED = {
    "no head": (without("vqa"), "no vqa_classifier and no itc_text_proj in it"),
    "no block": (without("blocks.1."), "missing (blocks.1."),
    "k bias": (with_zeros("transformer.blocks.0.attn.k_bias", 48), "1 unexpected (blocks.0.attn.k_bias)"),
    "no positions": (without("relative"), "do not tell the number of attention heads"),
    "wrong table": (with_zeros("relative_position_bias_table", 477, 24), "not those of a square of patches"),
    "other answers": (with_zeros("vqa_classifier.3.weight", 86, 96), "87 answers, the classifier has 86 classes"),
    "other words": (
        with_zeros("text_embeddings.word_embeddings.weight", 200, 48),
        "240 words, the model has embeddings of 200",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoints_are_one_line(
    name: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, words = SPOILED[name]
    edit(original, change)
    assert words in refused(original, tmp_path / "dst", capsys)


def test_heads_that_contradict_the_table(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = refused(original, tmp_path / "dst", capsys, "--set", "num_heads=4")
    assert f"--set num_heads=4: {original / FILE} has 8 heads in its relative_position_bias_table" in line
    plus = GOLDEN / "vlmo_vqa_plus" / "checkpoint"
    assert "add --set num_heads=N" in refused(plus, tmp_path / "dst", capsys)
    assert "the width 32 does not divide by it" in refused(plus, tmp_path / "dst", capsys, "--set", "num_heads=7")


def test_answers_are_counted_by_lines(tmp_path: Path) -> None:
    """Neither "label" nor characters that only look like the end of a line count."""
    path = tmp_path / "answer2label.txt"
    texts = ['"quoted"', "back\\slash", "smørrebrød", "one\u2028line"]
    path.write_text("".join(json.dumps({"answer": x, "label": 7}, ensure_ascii=False) + "\n" for x in texts))
    assert load_answers(path, 4) == texts
    with pytest.raises(UserError, match="4 answers, the classifier has 5 classes"):
        load_answers(path, 5)
    path.write_text('{"answer": "yes"}\nno\n')
    with pytest.raises(UserError, match="line 2: expected"):
        load_answers(path, 2)
    path.unlink()
    with pytest.raises(UserError, match="no such file; VLMo needs the list of its 2 answers"):
        load_answers(path, 2)
