"""Ascend's compiler for graphs of vision towers: CANN's atc where it is in PATH, else the command to run elsewhere."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mmdist.ascend import CHIPS
from mmdist.config import EXIT_FAILED, UserError
from mmdist.vision_folder import VisionManifest, graph_file

# Machines of one name have differing chips (910B1 to B4); npu-smi info shows which it is, and --soc names it.
HARDWARE = {chip.hardware: chip.soc_name for chip in CHIPS.values()}
FAST_SIGMOID = ("--optypelist_for_implmode=Sigmoid,Gelu", "--op_select_implmode=high_performance")
# As Ascend's own guides have it: CLIP (LLaMA-Adapter's), and without more EVA (MiniGPT-4's). Theirs for CLIP has
# --input_format=ND since its graph turns the pixels itself; ours takes them as the convolution does. mllama's
# have five dims.
OPTIONS = {
    "llava": FAST_SIGMOID, "llava_next": FAST_SIGMOID, "llava_next_video": FAST_SIGMOID,
    "llama_adapter": FAST_SIGMOID, "minigpt4": (), "mllama": ("--input_format=ND",),
}  # fmt: skip


def find_soc(hardware: str | None, soc: str | None) -> str:
    """--hardware and --soc -> atc's --soc_version."""
    if (hardware is None) == (soc is None):
        raise UserError(
            f"--vision om: for which chip? give --hardware {'|'.join(HARDWARE)}, or --soc NAME, one of them"
        )
    if soc is not None:
        return soc if soc.startswith("Ascend") else f"Ascend{soc}"
    return HARDWARE[str(hardware)]


def compile_graphs(folder: Path, manifest: VisionManifest, soc: str) -> int:
    """An om of each graph that has none; the exit code."""
    left = [size for size in manifest.batch_sizes if not (folder / graph_file(size, "om")).exists()]
    if shutil.which("atc") is None:
        for size in left:
            print(f"cd {shlex.quote(str(folder))} && {shlex.join(atc_command(manifest, size, soc))}")
        print(
            f"weights_tools export: atc is not in PATH, so no om was made ({len(left)} are missing); source CANN's "
            "set_env.sh and run again, or take this folder to where CANN is and run the lines above there",
            file=sys.stderr,
        )
        return EXIT_FAILED
    for size in left:
        if (code := run_atc(folder, manifest, size, soc)) != 0:
            print(
                f"weights_tools export: atc ended with {code}, {graph_file(size, 'om')} was not made; the command, in "
                f"{folder}: {shlex.join(atc_command(manifest, size, soc))}",
                file=sys.stderr,
            )
            return EXIT_FAILED
        print(f"{folder / graph_file(size, 'om')}: made for {soc}")
    return 0


def run_atc(folder: Path, manifest: VisionManifest, size: int, soc: str) -> int:
    """In the folder, where atc looks for the weights. The om appears when it is whole."""
    made = folder / f"vision_bs{size}.partial.om"
    made.unlink(missing_ok=True)
    command = atc_command(manifest, size, soc, output=made.stem)
    code = subprocess.run(command, cwd=folder, stdout=sys.stderr).returncode
    if code == 0 and made.exists():
        made.replace(folder / graph_file(size, "om"))
        return 0
    return code or EXIT_FAILED


def atc_command(manifest: VisionManifest, size: int, soc: str, output: str | None = None) -> list[str]:
    """5: the framework is ONNX. atc adds .om to the output's name."""
    shapes = [f"{node.name}:{','.join(map(str, (size, *node.shape)))}" for node in manifest.inputs]
    return [
        "atc", "--framework=5", f"--model={graph_file(size, 'onnx')}", f"--output={output or f'vision_bs{size}'}",
        f"--input_shape={';'.join(shapes)}", f"--soc_version={soc}", *OPTIONS[manifest.model], "--log=error",
    ]  # fmt: skip
