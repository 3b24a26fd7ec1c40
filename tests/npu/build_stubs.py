"""Compile the emulated CANN libraries from stubs/ with the system's C compiler, in about a second.

python tests/npu/build_stubs.py FOLDER prints what to put into LD_LIBRARY_PATH.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parent / "stubs"
HEADERS = Path(sysconfig.get_path("purelib")) / "torch_npu" / "include"  # of the wheel, which is not imported here
# Each library with its sources; those without any only have to exist.
LIBRARIES = {
    "ascendcl": ("acl.c", "refused.c"),
    "acl_op_compiler": ("op_compiler.c",),
    "hccl": ("hccl.c",),
    "atb": ("atb.c",),
    "ge_runner": (),
    "graph": (),
    "acl_tdt_channel": (),
}


def build_stubs(folder: Path) -> Path:
    """The libraries in `folder`, made again where a source is newer; the folder, for LD_LIBRARY_PATH."""
    done = folder / "built"
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    if done.exists() and done.stat().st_mtime >= newest:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("the emulation needs a C compiler: install gcc")
    for name, sources in LIBRARIES.items():
        library = folder / f"lib{name}.so"
        partial = library.with_suffix(".partial")
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{HEADERS}", f"-Wl,-soname,{library.name}"]
        depends = ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN"]  # dlsym looks there, too
        runtime = [] if name == "ascendcl" else depends
        files = [str(SOURCES / source) for source in sources] or ["-xc", "/dev/null", "-xnone"]
        subprocess.run([compiler, *flags, *files, "-o", str(partial), *runtime, "-lpthread"], check=True)
        partial.rename(library)
    done.touch()
    return folder


if __name__ == "__main__":
    print(build_stubs(Path(sys.argv[1])))
