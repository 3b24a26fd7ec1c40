"""mmdist: a tensor-parallel launcher and inference engine for multimodal language models."""

import gc
import os

# Imports make half a million objects that stay: looking for garbage among them is a sixth of the start-up time.
gc.set_threshold(100_000, 50, 1000)
# An installed torch_npu would load itself with torch, which fails where CANN is not sourced (mmdist.ascend).
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# torch's OpenMP threads would spin on cores that the native kernels need; libgomp reads this when torch comes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
