"""task=generate and task=plan as a user meets them, in process where no rank must be started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Case, config_for
from PIL import Image

from mmdist import cli
from mmdist.config import KERNELS, ModelConfig, SamplingParams, UserError
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.memory import rank_memory
from mmdist.task_config import GenerateConfig
from mmdist.tasks import chat, generate
from mmdist.tp import TP


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """launch.py in this process, one rank."""
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    return cli.main()


def generate_config(case: Case, **keys: Any) -> GenerateConfig:
    common = config_for(case.checkpoint)
    return GenerateConfig(**{**vars(common), "max_new_tokens": 4, "ignore_eos": True, "output": "out.jsonl", **keys})


def run_generate(case: Case, **keys: Any) -> tuple[int, dict[str, dict]]:
    config = generate_config(case, **keys)
    generate.check(config)
    code = generate.run(config, load_engine(config, TP(), CPU))
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    return code, {line["id"]: line for line in lines}


def write(lines: list[Any]) -> str:
    Path("in.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return "in.jsonl"


def test_requests_of_every_form(mistral: Case) -> None:
    """Chat messages, raw text, own sampling keys, pictures relative to the file of requests."""
    shutil.copy(mistral.image_paths("panorama")[0], "boat.png")
    item = mistral.items["panorama"]
    raw = "[INST] <image>\nWhere is the boat? [/INST]"
    source = write(
        [
            {"id": "chat", "messages": item["messages"], "images": ["boat.png"], "logprobs": 3},
            {"id": "raw", "prompt": raw, "images": [str(Path("boat.png").resolve())], "max_new_tokens": 2},
            {"id": 3, "prompt": "hello", "temperature": 1, "seed": 5, "stop": "x", "top_k": 5},
        ]
    )
    code, answers = run_generate(mistral, input=source)
    expected = mistral.reference()["panorama/greedy_ids"].ravel().tolist()
    assert code == 0 and answers.keys() == {"chat", "raw", "3"}
    assert answers["chat"]["token_ids"] == expected[:4] and answers["raw"]["token_ids"] == expected[:2]
    assert answers["chat"]["prompt_token_ids"] == answers["raw"]["prompt_token_ids"]
    assert [entry["token_id"] for entry in answers["chat"]["logprobs"]] == expected[:4]
    assert all(
        len(entry["top"]) == 3 and entry["top"][0]["token_id"] == entry["token_id"]
        for entry in answers["chat"]["logprobs"]
    )
    assert "logprobs" not in answers["raw"] and answers["raw"]["finish_reason"] == "length"


def test_bad_requests_are_answered_and_the_others_go_on(mistral: Case) -> None:
    Path("text.png").write_text("not a picture")
    good = str(mistral.image_paths("panorama")[0])
    data = Path(good).read_bytes()
    Path("cut.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (20000, 20), "red").save("wide.png")
    Image.new("1", (20000, 20000)).save("huge.png")
    picture = {"prompt": "<image> what?"}
    bad = {
        "missing": ({**picture, "images": ["/nowhere.png"]}, "no such picture"),
        "text": ({**picture, "images": ["text.png"]}, "not a picture"),
        "cut": ({**picture, "images": ["cut.png"]}, "damaged picture"),
        "huge": ({**picture, "images": ["huge.png"]}, "too large"),
        "long": ({"prompt": "word " * 600}, "engine.max_model_len=512"),
        "count": ({**picture, "images": [good, good]}, "1 <image> in the prompt, 2 pictures"),
        "key": ({"prompt": "a", "max_tokens": 3}, "unknown key max_tokens"),
        "type": ({"prompt": "a", "temperature": "hot"}, "temperature='hot'"),
        "range": ({"prompt": "a", "top_p": 0}, "top_p=0"),
        "both": ({"prompt": "a", "messages": []}, 'either "messages" or "prompt"'),
        "messages": ({"messages": "hi"}, "messages"),
        "role": ({"messages": [{"content": "hi"}]}, "messages"),
        "part": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        "images": ({"prompt": "a", "images": "a.png"}, "images: expected a list"),
    }
    lines: list[Any] = [{"id": name, **entry} for name, (entry, _) in bad.items()]
    lines += ["{not json", {"prompt": "no id"}, {"id": "ok", "prompt": "hello"}, {"id": "ok", "prompt": "again"}]
    lines += [{"id": "wide", **picture, "images": ["wide.png"]}]
    code, _ = run_generate(mistral, input=write(lines))
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert code == 1 and len(answers) == len(lines)
    errors = {answer["id"]: answer["error"] for answer in answers if "error" in answer}
    for name, (_, words) in bad.items():
        assert words in errors[name], (name, errors[name])
    assert "not JSON" in errors["line 15"] and '"id"' in errors["line 16"] and "given twice" in errors["ok"]
    assert [answer["id"] for answer in answers if "error" not in answer] == ["ok", "wide"]


def test_folder_of_pictures_in_order(mistral: Case) -> None:
    Path("pictures").mkdir()
    for name, item in (("b.png", "panorama"), ("a.PNG", "column")):
        shutil.copy(mistral.image_paths(item)[0], Path("pictures") / name)
    Path("pictures/notes.txt").write_text("no picture")
    code, answers = run_generate(mistral, input="pictures", prompt="Where is the boat?")
    assert code == 0 and list(answers) == ["a.PNG", "b.png"]
    assert answers["b.png"]["token_ids"] == mistral.reference()["panorama/greedy_ids"].ravel().tolist()[:4]


def test_answers_there_are_kept_and_failures_asked_again(mistral: Case) -> None:
    source = write([{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "<image>", "images": ["late.png"]}])
    kept = {"id": "a", "text": "kept", "token_ids": []}
    Path("out.jsonl").write_text(json.dumps(kept) + "\n")
    code, answers = run_generate(mistral, input=source)
    assert code == 1 and answers["a"] == kept and "no such picture" in answers["b"]["error"]
    shutil.copy(mistral.image_paths("column")[0], "late.png")
    code, answers = run_generate(mistral, input=source)
    assert code == 0 and answers["a"] == kept and answers["b"]["token_ids"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"input": "/nowhere.jsonl"}, "no such file"),
        ({"input": "."}, "prompt=TEXT"),
        ({"input": "in.jsonl", "prompt": "hi"}, "leave prompt= out"),
    ],
)
def test_wrong_input(mistral: Case, keys: dict, words: str) -> None:
    write([])
    with pytest.raises(UserError, match=words):
        run_generate(mistral, **keys)
    with pytest.raises(UserError, match="no pictures"):
        Path("empty").mkdir()
        run_generate(mistral, input="empty", prompt="hi")


def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, Any]:
    code = main(monkeypatch, "task=plan", "format=json", *arguments)
    return code, json.loads(capsys.readouterr().out)


def test_plan_counts_what_is_loaded(mistral: Case, monkeypatch: Any, capsys: Any) -> None:
    """The plan's bytes are those of the engines that are really built, rank by rank."""
    arguments = [f"checkpoint={mistral.checkpoint}", "dtype=float32", "world_size=4", "engine.max_model_len=512"]
    code, made = plan(monkeypatch, capsys, *arguments, "engine.max_num_seqs=4")
    assert code == 0 and made["fits"] and made["legal_world_sizes"] == [1, 2, 4, 8] and made["world_size"] == 4
    for rank in range(4):
        engine = load_engine(config_for(mistral.checkpoint), TP(rank, 4), CPU)
        held = [(name, p) for name, p in engine.runner.model.named_parameters() if not p.is_meta]
        vision = sum(p.nbytes for name, p in held if name.startswith("vision."))
        row = made["ranks"][rank]
        assert row["rank"] == rank and row["vision_bytes"] == vision and (vision > 0) == (rank == 0)
        assert row["llm_bytes"] == sum(p.nbytes for _, p in held) - vision
        cache = engine.runner.cache
        assert row["kv_bytes"] == cache.k.nbytes + cache.v.nbytes
        assert row["activation_bytes"] > 0 and row["peak_load_bytes"] >= row["llm_bytes"] + vision
    assert made["allreduce_bytes_per_token"] == (1 + 2 * 3) * 96 * 4


def test_plan_lists_every_stored_tensor(mistral: Case, monkeypatch: Any, capsys: Any) -> None:
    _, made = plan(monkeypatch, capsys, f"checkpoint={mistral.checkpoint}", "world_size=4")
    index = json.loads((mistral.checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    parameters = {row["name"]: row for row in made["parameters"]}
    assert parameters.keys() == index.keys()
    layer = "language_model.model.layers.0."
    expected = {
        layer + "self_attn.q_proj.weight": ([96, 96], "cut", 0),
        layer + "self_attn.k_proj.weight": ([24, 96], "copied", 0),
        layer + "self_attn.o_proj.weight": ([96, 96], "cut", 1),
        layer + "mlp.down_proj.weight": ([96, 160], "cut", 1),
        layer + "input_layernorm.weight": ([96], "replicated", None),
        "image_newline": ([96], "rank0", None),
    }
    for name, (shape, placement, dim) in expected.items():
        row = parameters[name]
        assert (row["shape"], row["placement"], row["dim"], row["dtype"]) == (shape, placement, dim, "float16"), name


def test_plan_needs_only_headers(mistral: Case, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Weights that are holes in the file are never read; the plan is the same."""
    folder = tmp_path / "headers"
    shutil.copytree(mistral.checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    both = [plan(monkeypatch, capsys, f"checkpoint={f}", "world_size=2")[1] for f in (mistral.checkpoint, folder)]
    assert both[0] == both[1]


def test_plan_says_no(mistral: Case, monkeypatch: Any, capsys: Any) -> None:
    arguments = [f"checkpoint={mistral.checkpoint}"]
    code, made = plan(monkeypatch, capsys, *arguments, "world_size=3")
    assert code == 2 and made["fits"] is False and made["legal_world_sizes"] == [1, 2, 4, 8]
    code, made = plan(monkeypatch, capsys, *arguments, "world_size=2", "hardware.memory_gib=0.01")
    assert code == 1 and made["fits"] is False and len(made["ranks"]) == 2
    assert made["kernels"]["level"] in KERNELS[1:]
    assert main(monkeypatch, "task=plan", *arguments, "world_size=2", "hardware.kernels=plain") == 0
    table = capsys.readouterr().out
    assert "legal sizes: 1, 2, 4, 8" in table and "on rank 0 alone" in table
    assert "kernels: plain (torch's own)" in table


def test_what_does_not_fit_is_refused_before_loading(mistral: Case) -> None:
    config = config_for(mistral.checkpoint)
    config.hardware.memory_gib = 0.001
    with pytest.raises(UserError, match=r"engine.max_num_seqs=4 or engine.max_model_len, or use more ranks"):
        load_engine(config, TP(0, 2), CPU)


def test_cache_shrinks_to_what_fits(mistral: Case) -> None:
    """With memory for part of the cache, fewer blocks are made and said; the answers stay."""
    config = config_for(mistral.checkpoint, max_num_seqs=64, max_num_batched_tokens=64)
    model, plan, _, _ = open_model(config, TP(), "cpu")
    need = rank_memory(model, plan, TP(), config.engine)
    config.hardware.memory_gib = (need.total - need.kv_bytes * 0.9) / 0.9 / 2**30
    engine = load_engine(config, TP(), CPU)
    blocks = engine.scheduler.blocks.num_blocks
    assert 512 // 16 <= blocks < 0.2 * 64 * 512 / 16
    assert engine.runner.cache.k.nbytes + engine.runner.cache.v.nbytes <= need.kv_bytes * 0.1 + 1


def test_memory_grows_with_what_it_counts(mistral: Case) -> None:
    def memory(size: int, **engine: int) -> Any:
        config = config_for(mistral.checkpoint, **engine)
        model, plan, _, _ = open_model(config, TP(0, size), "cpu")
        return rank_memory(model, plan, TP(0, size), config.engine)

    small, wide, long = memory(2), memory(2, max_num_seqs=8), memory(2, max_model_len=1024)
    assert wide.kv_bytes == long.kv_bytes == 2 * small.kv_bytes
    assert memory(4).llm_bytes < small.llm_bytes and long.activation_bytes > small.activation_bytes


def test_conversation_keeps_its_history(mistral: Case, monkeypatch: Any, capsys: Any) -> None:
    """The second turn is computed from the first one's picture, question and answer; /reset forgets them."""
    config = config_for(mistral.checkpoint, max_num_seqs=1)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    conversation = chat.Conversation(load_engine(config, TP(), CPU), params, 8)
    prompts = []
    build = type(conversation.engine.prompts).prompt
    monkeypatch.setattr(
        type(conversation.engine.prompts), "prompt", lambda self, **k: prompts.append(k) or build(self, **k)
    )
    image = mistral.image_paths("panorama")[0]
    assert chat.obey(f"/image {image}", conversation) and chat.obey("What is it?", conversation)
    answer = conversation.messages[-1]["content"][0]["text"]
    assert chat.obey("Sure?", conversation)
    roles = [message["role"] for message in prompts[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and len(prompts[1]["images"]) == 1
    assert prompts[1]["messages"][1]["content"][0]["text"] == answer
    chat.obey("/reset", conversation)
    chat.obey("Again?", conversation)
    assert len(prompts[2]["messages"]) == 1 and prompts[2]["images"] == []
    assert not chat.obey("/quit", conversation)
    with pytest.raises(UserError, match=r"engine\.max_model_len=512"):
        chat.obey("word " * 600, conversation)
    assert chat.obey("Still there?", conversation)


def test_model_options(mistral: Case, tmp_path: Path) -> None:
    """A chat template of one's own."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %} so:")
    config = config_for(mistral.checkpoint)
    config.model = ModelConfig(name="llava_next", chat_template=str(template))
    prompts = load_engine(config, TP(), CPU).prompts
    ours = prompts.prompt(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], images=[])
    assert ours.token_ids == prompts.prompt(text="Hi so:", images=[]).token_ids
    assert torch.is_inference_mode_enabled() is False
