"""Write tests/data/npu_schemas.json: the schemas of the operations that mmdist's plans call, as torch_npu ships them.

Run it where torch_npu imports, with CANN or with this folder's stubs in place of it:
python tests/npu/dump_schemas.py
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

SCHEMAS = Path(__file__).parents[1] / "data" / "npu_schemas.json"


def main() -> None:
    plan, torch = import_module("mmdist.kernels.npu_plan"), import_module("torch")
    version = import_module("torch_npu").__version__
    wanted = {name for chip in plan.PLANS for name in plan.operations(chip)}
    found = {s.name: str(s) for s in torch._C._jit_get_all_schemas() if s.name in wanted and not s.overload_name}
    if missing := wanted - set(found):
        raise SystemExit(f"torch_npu {version} has no {', '.join(sorted(missing))} (atb: is libatb.so there?)")
    SCHEMAS.write_text(json.dumps({"torch_npu": version, "schemas": found}, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} schemas of torch_npu {version} in {SCHEMAS}")


if __name__ == "__main__":
    main()
