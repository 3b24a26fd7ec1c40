"""mmdist: a tensor-parallel launcher and inference engine for multimodal language models."""

import gc
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdist.config import SamplingParams
    from mmdist.llm import LLM

__all__ = ["LLM", "SamplingParams"]

# Imports make half a million objects that stay: looking for garbage among them is a sixth of the start-up time.
gc.set_threshold(100_000, 50, 1000)
# An installed torch_npu would load itself with torch, which fails where CANN is not sourced (mmdist.ascend).
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# torch's OpenMP threads would spin on cores that the native kernels need; libgomp reads this when torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    """What a program imports from us, loaded when it does: the rest of us starts faster without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module("mmdist.llm"), name)
