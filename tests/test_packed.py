"""weights_tools split --packed: the order is the kernels' own, every verb reads it, and the engine uses it in place."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, answers, config_for, run_engine
from safetensors.torch import load_file, save_file
from split_cases import Q_PROJ, flip_byte, load, one_line, source, stop_after, written_names

from mmdist.blocks import BLOCKS, ROWS, fill_blocks, from_stored, to_stored
from mmdist.config import QuantConfig, SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.kernels import native
from mmdist.kernels.native import BF16, NativeKernels
from mmdist.kernels.native_linear import NativeLinear
from mmdist.manifest import load_manifest, part_file, save_manifest
from mmdist.native.build import load_library
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from weights_tools.cli import main

GATE = "language_model.model.layers.1.mlp.gate_proj.weight"
SIZES = (1, 2)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16") / "source"
    folder.mkdir()
    for path in source().iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: x.bfloat16().contiguous() for name, x in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def folders(bf16: Path) -> dict[tuple[int, bool], Path]:
    """(world size, packed) -> split folder."""
    made = {(size, packed): bf16.with_name(f"tp{size}-{packed}") for size in SIZES for packed in (False, True)}
    for (size, packed), folder in made.items():
        argv = ["split", str(bf16), "--ranks", str(size), "--dst", str(folder), *["--packed"][:packed]]
        assert main(argv) == 0
    return made


@pytest.fixture
def kernels() -> NativeKernels:
    native = load_library()
    assert native is not None, "the tests need a C compiler"
    return NativeKernels(CPU.device, native)


@pytest.mark.parametrize("shape", ((32, 8), (96, 40), (256, 1024)), ids=str)
def test_the_order_is_the_kernels_own(kernels: NativeKernels, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    stored = to_stored(weight, BLOCKS)
    assert torch.equal(stored.flatten().view(torch.uint8), kernels.pack(BF16, weight))
    assert torch.equal(from_stored(stored, BLOCKS), weight) and not torch.equal(stored, weight)
    wide = torch.cat((weight, weight), dim=1)
    assert torch.equal(to_stored(wide[:, : shape[1]], BLOCKS), stored), "a cut of columns"
    both = torch.cat((stored, to_stored(weight + 1, BLOCKS)))
    assert torch.equal(from_stored(both, BLOCKS), torch.cat((weight, weight + 1))), "weights behind each other"


def test_what_fills_blocks() -> None:
    assert fill_blocks((ROWS, 8), "BF16") and not fill_blocks((ROWS, 8), "F16")
    assert not any(fill_blocks(shape, "BF16") for shape in ((ROWS + 1, 8), (ROWS, 12), (ROWS,), (2, ROWS, 8)))


@pytest.mark.parametrize("size", SIZES)
def test_what_is_packed(folders: dict, size: int) -> None:
    """Linear weights and the head, where a rank's part fills blocks; not embeddings, norms, biases, vision."""
    orders = {entry.name: {part.order for part in entry.parts} for entry in load_manifest(folders[size, True]).tensors}
    packed = {name.split(".", 3)[-1] for name, found in orders.items() if found == {BLOCKS}}
    rows = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    want = {f"{layer}.{name}.weight" for layer in range(3) for name in rows} | {"weight"}
    cut = {
        name for name in want if size == 2 and name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight"))
    }
    assert packed == want - cut - ({"weight"} if size == 2 else set())
    assert all(part.order is None for e in load_manifest(folders[size, False]).tensors for part in e.parts)


@pytest.mark.parametrize("size", SIZES)
def test_every_verb_reads_it(bf16: Path, folders: dict, size: int, tmp_path: Path, capsys: Any) -> None:
    folder = folders[size, True]
    assert main(["verify", str(folder), "--against", str(bf16)]) == 0
    assert main(["diff", str(folder), str(bf16)]) == 0
    assert main(["diff", str(folder), str(folders[size, False])]) == 0
    assert main(["export", str(folder), "--dst", str(tmp_path / "whole")]) == 0
    for path in bf16.glob("*.safetensors"):
        want, got = load_file(path), load_file(tmp_path / "whole" / path.name)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    count = json.loads(capsys.readouterr().out)["num_packed_parts"]
    assert main(["inspect", str(folder)]) == 0
    assert f"packed: {count} parts" in capsys.readouterr().out and count == {1: 16, 2: 12}[size]


@pytest.mark.parametrize("size", SIZES)
def test_plain_kernels_load_the_same_parameters(bf16: Path, folders: dict, size: int) -> None:
    for rank in range(size):
        want, got = load(bf16, TP(rank, size)), load(folders[size, True], TP(rank, size))
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def ask(folder: Path, size: int, **config: Any) -> dict[str, Any]:
    def work(engine: Engine) -> Any:
        params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=3)
        entries = [
            {"id": text, "prompt": text} for text in ("USER: Which? ASSISTANT:", "USER: a b c d e f? ASSISTANT:")
        ]
        found = answers(engine, [build_request(entry, engine.prompts, params, Path.cwd()) for entry in entries])
        return {name: (output.token_ids, output.logprobs) for name, output in found.items()}

    return run_engine(size, config_for(folder, dtype="bfloat16", **config), work)


@pytest.mark.parametrize("size", SIZES)
def test_answers_are_the_same_numbers(bf16: Path, folders: dict, size: int) -> None:
    """Used in the file, moved out of it in the middle of the answer, or packed while loading."""
    want = ask(folders[size, False], size)
    assert ask(folders[size, True], size) == want == ask(bf16, size)
    quant = QuantConfig(scheme="w8a16")
    assert ask(folders[size, True], size, quant=quant) == ask(bf16, size, quant=quant)


def in_files(engine: Engine, name: str) -> list[NativeLinear]:
    """The linear layers whose weights lie in a mapped file of that name."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    mapped = [range(*(int(end, 16) for end in words[0].split("-"))) for words in lines]
    found = [getattr(module, "linear", None) for module in engine.model.modules()]
    linears = [linear for linear in found if isinstance(linear, NativeLinear)]
    return [linear for linear in linears if any(linear.packed.words.data_ptr() in pages for pages in mapped)]


def test_weights_stay_in_the_file_until_the_first_token_is_out(folders: dict) -> None:
    folder = folders[1, True]
    engine = load_engine(config_for(folder, dtype="bfloat16"), TP(), CPU)
    assert isinstance(engine, Engine) and isinstance(engine.runner.kernels, NativeKernels)
    lying = in_files(engine, str(folder))
    # Of each layer o, gate and up as one, and down; q lies beside k and v, which do not fill blocks; and the head.
    assert len(lying) == 3 * 3 + 1
    entry = {"id": "a", "prompt": "USER: Which? ASSISTANT:"}
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    engine.add(build_request(entry, engine.prompts, params, Path.cwd()))
    engine.step()
    assert len(in_files(engine, str(folder))) == len(lying)
    x = torch.randn(3, lying[0].columns).bfloat16()
    before = lying[0](x, None)
    engine.step()
    thread = engine.runner.kernels._mover.thread
    assert thread is not None
    thread.join()
    assert not in_files(engine, str(folder))
    torch.testing.assert_close(lying[0](x, None), before)  # in 12 bits rare numbers are added last
    assert str(folder / part_file(0, 1)) in Path("/proc/self/maps").read_text(), "norms stay where they are"


def test_without_memory_weights_stay_in_the_file(
    kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x = torch.randn(64, 16).bfloat16(), torch.randn(2, 16).bfloat16()
    linear = kernels.linear_over_blocks(to_stored(weight, BLOCKS))
    plain = kernels.linear(weight)
    assert linear is not None and plain is not None

    def refuse(size: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched, caplog.at_level("WARNING"):
        patched.setattr(native, "huge_pages", refuse)
        kernels.settle()
        assert kernels._mover.thread is not None
        kernels._mover.thread.join()
    assert "used in their file from now on" in caplog.text and "Cannot allocate memory" in caplog.text
    assert torch.equal(linear(x, None), plain(x, None))


def test_a_product_that_runs_keeps_its_memory(kernels: NativeKernels) -> None:
    """While its weight is moved again and again, the numbers stay the same."""
    weight, x = torch.randn(512, 1024).bfloat16(), torch.randn(3, 1024).bfloat16()
    linear = kernels.linear_over_blocks(to_stored(weight, BLOCKS))
    assert isinstance(linear, NativeLinear)
    want, stop, in_file = linear(x, None), threading.Event(), linear.packed

    def move() -> None:
        while not stop.is_set():
            linear.packed = in_file
            linear.packed = kernels._move(linear)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(200):
            torch.testing.assert_close(linear(x, None), want)
    finally:
        stop.set()
        thread.join()


def test_flipped_byte_is_named(bf16: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert main(["split", str(bf16), "--ranks", "1", "--packed", "--dst", str(dst)]) == 0
    flip_byte(dst / part_file(0, 1), GATE)
    with pytest.raises(UserError, match=f"{GATE} is damaged"):
        load_engine(config_for(dst, dtype="bfloat16"), TP(), CPU)
    assert main(["verify", str(dst)]) == 1
    assert main(["diff", str(dst), str(bf16)]) == 2


@pytest.mark.parametrize("order", ("another", BLOCKS))
def test_an_order_that_is_not_known_is_refused(bf16: Path, tmp_path: Path, order: str, capsys: Any) -> None:
    dst = tmp_path / "dst"
    assert main(["split", str(bf16), "--ranks", "2", "--dst", str(dst)]) == 0
    manifest = load_manifest(dst)
    next(entry for entry in manifest.tensors if entry.name == Q_PROJ).parts[0].order = order  # 48 rows: no blocks
    save_manifest(manifest, dst)
    capsys.readouterr()
    assert main(["inspect", str(dst)]) == 2
    assert f"{Q_PROJ}, BF16 [48, 96], lies in the order '{order}'" in one_line(capsys)


def test_not_gone_on_with_in_another_order(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that stopped is begun anew when --packed is added."""
    argv = ["split", str(bf16), "--ranks", "1", "--dst", str(tmp_path / "dst")]
    assert main([*argv, "--packed", "--dry-run"]) == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 60, KeyboardInterrupt())
        assert main(argv) == 130
    names = written_names(monkeypatch)
    assert main([*argv, "--packed"]) == 0
    assert len(names) == 90
    assert main(["verify", str(tmp_path / "dst"), "--against", str(bf16)]) == 0
