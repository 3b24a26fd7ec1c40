"""What a quantised folder is made of, in each weight format: file names, description and config.

ascend: msmodelslim's AscendV1 (quant_model_description.json, version 1.0.0), as MindIE and vllm-ascend read it.
compressed-tensors: pack-quantized, as vLLM and transformers read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from mmdist.quant import FORMATS, Scheme, WeightFormat, quantize
from mmdist.quant_files import ASCEND_V1, DESCRIPTION, FLOAT

CONFIG = "config.json"
Shapes = Mapping[str, Sequence[int]]  # of the stored tensors


class QuantFolder(ABC):
    """format: of the weights in it."""

    def __init__(self, format: WeightFormat):
        self.format, self.scheme = format, format.scheme

    @property
    @abstractmethod
    def stem(self) -> str:
        """File name of the weights, without what follows."""

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def store(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """(rows, columns) -> the tensors that are stored instead, by their names' last word.

        amax (rows, groups): what becomes the largest integer; None: the largest magnitude.
        """
        quantized = quantize(weight, self.scheme, amax, scale_dtype=self.scale_dtype(weight.dtype))
        return self.format.write(quantized)

    @abstractmethod
    def texts(self, config: Mapping[str, Any], shapes: Shapes, quantised: Collection[str]) -> dict[str, Any]:
        """File name -> its JSON. config: the source's. quantised: the stored tensors of quantised weights."""


class AscendFolder(QuantFolder):
    @property
    def stem(self) -> str:
        return f"quant_model_weight_{self.scheme.name}"

    def texts(self, config: Mapping[str, Any], shapes: Shapes, quantised: Collection[str]) -> dict[str, Any]:
        kind = self.scheme.name.upper()
        description = {
            "model_quant_type": kind,
            "version": ASCEND_V1,
            "group_size": self.scheme.group_size,
            "metadata": {},
            "optional": {},
            **{name: kind if name in quantised else FLOAT for name in sorted(shapes)},
        }
        return {CONFIG: {**config, "quantize": self.scheme.name}, DESCRIPTION: description}


class CompressedFolder(QuantFolder):
    @property
    def stem(self) -> str:
        return "model"

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """vLLM and transformers load scales in the model's dtype, so that is what the integers must go with."""
        return weight_dtype

    def texts(self, config: Mapping[str, Any], shapes: Shapes, quantised: Collection[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.scheme.group_size else "channel",
            "group_size": self.scheme.group_size or None,
            "dynamic": False,
            "observer": "minmax",
        }
        settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": [f"re:.*{name}.*" for name in plain_modules(shapes, quantised)],
            "kv_cache_scheme": None,
        }
        return {CONFIG: {**config, "quantization_config": settings}}


def plain_modules(shapes: Shapes, quantised: Collection[str]) -> list[str]:
    """The largest modules with matrices but without a quantised weight, by their last words (vision_tower, lm_head).

    Words and not whole names: transformers and vLLM each have their own prefixes for the same module.
    """
    with_quantised = {prefix for name in quantised for prefix in prefixes(name)}
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and name not in quantised]
    found = [next(p for p in [*prefixes(name), name] if p not in with_quantised) for name in matrices]
    return sorted({prefix.rpartition(".")[2] for prefix in found})


def prefixes(name: str) -> Iterator[str]:
    """a.b.weight -> a, a.b"""
    words = name.split(".")[:-1]
    return (".".join(words[: i + 1]) for i in range(len(words)))


FOLDERS: dict[str, type[QuantFolder]] = {"ascend": AscendFolder, "compressed-tensors": CompressedFolder}


def quant_folder(format: str, scheme: Scheme) -> QuantFolder:
    return FOLDERS[format](FORMATS[format](scheme))
