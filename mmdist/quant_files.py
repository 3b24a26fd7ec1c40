"""Which weight format a checkpoint folder says it has, and whether its tensors agree.

Ascend (msmodelslim): quant_model_description.json, every tensor's name -> W8A16, W4A16 or FLOAT. compressed-tensors:
quantization_config in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from mmdist.quant import Ascend, Compressed, Scheme, WeightFormat

DESCRIPTION = "quant_model_description.json"
SCHEMES = {"W8A16": 8, "W4A16": 4}
FLOAT = "FLOAT"
ASCEND_V1 = "1.0.0"  # version of a description; the older ones have none


def find_format(folder: Path) -> WeightFormat | None:
    """None for plain numbers."""
    description = read_description(folder)
    if description is not None:
        return ascend_format(description, find_description(folder) or folder)
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None:
        return None
    return compressed_format(found, folder / "config.json")


def find_description(folder: Path) -> Path | None:
    """The current name, else the older one (quant_model_description_w8a16.json)."""
    named = [folder / DESCRIPTION, *sorted(folder.glob("quant_model_description_*.json"))]
    return next((path for path in named if path.exists()), None)


def read_description(folder: Path) -> dict[str, Any] | None:
    path = find_description(folder)
    return None if path is None else read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}; copy it again")
    return content


def ascend_format(description: Mapping[str, Any], path: Path) -> WeightFormat:
    kinds = {kind for name, kind in description.items() if name.endswith(".weight") and kind != FLOAT}
    kind = description.get("model_quant_type")
    if kind not in SCHEMES or kinds - {kind}:
        found = ", ".join(sorted(map(str, kinds | {kind})))
        raise UserError(f"{path}: quantised as {found}; mmdist reads {' or '.join(SCHEMES)}, one in a checkpoint")
    scheme = Scheme(SCHEMES[kind], int(description.get("group_size") or 0))
    return Ascend(scheme, packed=description.get("version") == ASCEND_V1)


def compressed_format(settings: Mapping[str, Any], path: Path) -> WeightFormat:
    method, packing = settings.get("quant_method"), settings.get("format")
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    if method != "compressed-tensors" or packing != "pack-quantized" or len(groups) != 1:
        raise UserError(
            f"{path}: quantization_config is {method} {packing} with {len(groups)} groups; mmdist reads "
            "compressed-tensors pack-quantized with one"
        )
    weights = groups[0]
    strategy, bits = weights.get("strategy"), int(weights.get("num_bits") or 0)
    if not weights.get("symmetric") or bits not in SCHEMES.values() or strategy not in ("channel", "group"):
        raise UserError(
            f"{path}: weights of {bits} bits, strategy {strategy}, symmetric {weights.get('symmetric')}; mmdist reads "
            "symmetric ones of 4 or 8 bits, strategy channel or group"
        )
    return Compressed(Scheme(bits, weights["group_size"] if strategy == "group" else 0))


def check_description(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Refuse a description that disagrees with the tensors. dtypes: name in the files -> safetensors' word."""
    description = read_description(folder)
    if description is None:
        return
    path = find_description(folder)
    untyped = sorted(name for name in dtypes if name not in description)
    if untyped:
        raise UserError(f"{path}: {len(untyped)} tensors without a type (first: {untyped[0]}); copy the folder again")
    for name, dtype in dtypes.items():
        if name.endswith(".weight") and (dtype == "I8") != (description[name] in SCHEMES):
            raise UserError(f"{path}: {name} is {description[name]} there, {dtype} in its file; copy the folder again")
