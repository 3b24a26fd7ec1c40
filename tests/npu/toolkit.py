"""An emulated CANN toolkit: libraries compiled from stubs/ by the system's C compiler in about a second, and the
environment that makes a program use it.

eval "$(build/npu-venv/bin/python tests/npu/toolkit.py build/npu-toolkit Ascend310P3)" sets that environment in a shell.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "stubs"
HEADERS = Path(sysconfig.get_path("purelib")) / "torch_npu" / "include"  # of the wheel, which is not imported here
# Each library with its sources; those without any only have to exist.
LIBRARIES = {
    "ascendcl": ("acl.c", "streams.c", "refused.c"),
    "acl_op_compiler": ("op_compiler.c",),
    "hccl": ("hccl.c",),
    "atb": ("atb.c",),
    "ge_runner": (),
    "graph": (),
    "acl_tdt_channel": (),
}


def build_toolkit(folder: Path) -> Path:
    """The folder, with what torch_npu looks for in a toolkit; made again where a source is newer."""
    info = folder / "compiler" / "ascend_compiler_install.info"
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    if info.exists() and info.stat().st_mtime >= newest:
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("the emulation needs a C compiler: install gcc")
    for name in ("lib64", "runtime", "compiler", "opp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, sources in LIBRARIES.items():
        compile_library(compiler, folder / "lib64", name, [SOURCES / source for source in sources])
    info.write_text("version=emulated\n")
    return folder


def compile_library(compiler: str, folder: Path, name: str, sources: list[Path]) -> None:
    library = folder / f"lib{name}.so"
    partial = library.with_suffix(".partial")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{HEADERS}", f"-Wl,-soname,{library.name}"]
    files = [str(source) for source in sources] or ["-xc", "/dev/null", "-xnone"]
    # torch_npu looks for some of libascendcl's functions in others of these, where dlsym finds what they depend on.
    runtime = ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN"] if name != "ascendcl" else []
    subprocess.run([compiler, *flags, *files, "-o", str(partial), *runtime, "-lpthread"], check=True)
    partial.rename(library)


def emulated_environment(folder: Path, soc: str, devices: int | None = None) -> dict[str, str]:
    """What a program needs beside its own environment to find `devices` chips (a card, or eight) of a `soc`."""
    build_toolkit(folder)
    return {
        "LD_LIBRARY_PATH": str(folder / "lib64"),
        "ASCEND_HOME_PATH": str(folder),
        "ASCEND_TOOLKIT_HOME": str(folder),
        "ASCEND_OPP_PATH": str(folder / "opp"),
        "PYTHONPATH": f"{HERE / 'site'}:{HERE.parents[1]}",
        "EMULATED_SOC": soc,
        **({} if devices is None else {"EMULATED_DEVICES": str(devices)}),
    }


if __name__ == "__main__":
    for name, value in emulated_environment(Path(sys.argv[1]).resolve(), *sys.argv[2:3]).items():
        print(f"export {name}={value}")
