"""The kernels compiled from mmdist/native, for bfloat16 on a CPU; one runs at a time, on all threads of one pool."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_long, c_void_p

import torch
import torch.nn.functional as F

from mmdist.blocks import COLUMNS, ROWS
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.linear import Linear
from mmdist.kernels.native_linear import (
    BF12,
    BF16,
    BITS,
    INT4,
    INT8,
    Mover,
    NativeLinear,
    Packed,
    blocked,
    huge_pages,
    round_up,
)
from mmdist.kernels.native_paged import NativePagedAttention
from mmdist.kernels.pages import Int8Pages, Pages
from mmdist.native.build import Native, load_library
from mmdist.quant import Quantized

BFLOAT16 = torch.bfloat16
MAX_HEAD_DIM = 256  # of flash.c
SHORTENS = ("avx512_bf16", "avx512")  # levels whose products read 12 bits faster than 16
MOST_OTHERS = 64  # one of so many numbers may lack a code; beyond, listing them costs more than it saves


class AttentionCall(Structure):
    """flash.c's Attention"""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64) for name in ("batch", "queries", "context", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("q_batch", "q_stride", "kv_batch", "kv_stride", "causal", "window")),
        ("scale", c_float),
    ]


def find_kernels(level: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """hardware.kernels for a model of `dtype`; plain torch's where no others are for it."""
    native = load_library(level) if device.type == "cpu" and dtype == torch.bfloat16 else None
    return Kernels(device) if native is None else NativeKernels(device, native)


class NativeKernels(Kernels):
    def __init__(self, device: torch.device, native: Native):
        super().__init__(device)
        self.level, self.shortens = native.level, native.level in SHORTENS
        native.declare("mmdist_pool_init", None, c_int)(torch.get_num_threads())
        self._pack = native.declare("mmdist_pack", None, c_int, c_void_p, c_void_p, c_long, c_long)
        self._shorten = native.declare(
            "mmdist_shorten", None, c_void_p, c_int, c_void_p, *[c_long] * 3, *[c_void_p] * 3
        )
        addresses, sizes = [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_void_p], [c_long] * 3
        self._linear = native.declare("mmdist_linear", None, c_int, *addresses, *sizes)
        self._attention = native.declare("mmdist_attention", c_int, POINTER(AttentionCall))
        self._quick_gelu = native.declare("mmdist_quick_gelu", None, c_void_p, c_void_p, c_long)
        self._norm = native.declare("mmdist_rms_norm", None, *[c_void_p] * 3, c_long, c_long, c_float)
        self._add_norm = native.declare("mmdist_add_rms_norm", None, *[c_void_p] * 5, c_long, c_long, c_float)
        self._gated_silu = native.declare("mmdist_gated_silu", None, c_void_p, c_void_p, c_long, c_long)
        self._top_k = native.declare("mmdist_top_k", None, c_void_p, *[c_long] * 4, c_void_p, c_void_p)
        self._native = native
        self._mover = Mover(self._move)

    def linear(self, weight: torch.Tensor) -> Linear | None:
        packed = self.shortened(weight.contiguous(), in_blocks=False) or Packed(BF16, self.pack(BF16, weight))
        return NativeLinear(self._linear, packed, weight.shape)

    def linear_over_blocks(self, blocks: torch.Tensor) -> Linear | None:
        linear = NativeLinear(self._linear, Packed(BF16, blocks), blocks.shape)
        self._mover.waiting.append(linear)
        return linear

    def settle(self) -> None:
        self._mover.start()

    def _move(self, linear: NativeLinear) -> Packed:
        blocks = linear.packed.words
        return self.shortened(blocks, in_blocks=True) or Packed(BF16, huge_pages(blocks.nbytes).copy_(as_bytes(blocks)))

    def shortened(self, weight: torch.Tensor, *, in_blocks: bool) -> Packed | None:
        """(out, in) bfloat16 in 12 bits a number; None where that does not pay: on processors that are slower at
        putting the numbers together than memory is, and where too many have exponents of their own."""
        if not self.shortens:
            return None
        (rows, columns), num_blocks = weight.shape, round_up(weight.shape[0], ROWS) // ROWS
        words = huge_pages(num_blocks * ROWS * round_up(columns, COLUMNS) * BITS[BF12] // 8)
        most = columns * ROWS // MOST_OTHERS + ROWS
        tops, counts = torch.empty(2, num_blocks, dtype=torch.int32)
        others = torch.empty(num_blocks, most, dtype=torch.long)
        addresses = (x.data_ptr() for x in (tops, counts, others))
        self._shorten(weight.data_ptr(), in_blocks, words.data_ptr(), rows, columns, most, *addresses)
        if counts.max() > most:
            return None
        others = others[torch.arange(most) < counts[:, None]]
        firsts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        filled = F.pad(torch.cat([firsts, tops]), (0, 1))  # to whole numbers of 64 bits
        return Packed(BF12, words, torch.cat([filled.view(torch.long), others]))

    def quantized_linear(self, weight: Quantized) -> Linear:
        columns, groups = weight.q.shape[1], weight.scale.shape[1]
        if weight.offset is not None or (groups > 1 and columns // groups % COLUMNS):
            return super().quantized_linear(weight)
        kind = INT8 if weight.bits == 8 else INT4
        packed = Packed(kind, self.pack(kind, weight.q), blocked(weight.scale), groups)
        return NativeLinear(self._linear, packed, weight.q.shape)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> torch.Tensor:
        batch, queries, heads, head_dim = q.shape
        if head_dim % COLUMNS or head_dim > MAX_HEAD_DIM:
            return super().attention(q, k, v, scale=scale, causal=causal, window=window)
        q, k, v = (x if is_rows(x) else x.contiguous() for x in (q, k, v))
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        out = q.new_empty(q.shape)
        call = AttentionCall(
            *(x.data_ptr() for x in (q, k, v, out)), batch, queries, k.shape[1], heads, k.shape[2], head_dim,
            *q.stride()[:2], *k.stride()[:2], causal, window or 0, scale,
        )  # fmt: skip
        if self._attention(byref(call)):
            raise MemoryError(f"no memory for attention over {k.shape[1]} tokens")
        return out

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self._quick_gelu(x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype is not BFLOAT16 or weight.dtype is not BFLOAT16:
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        out, hidden = torch.empty_like(x), x.shape[-1]
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // hidden, hidden, eps)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (x.dtype is y.dtype is weight.dtype is BFLOAT16) or x.shape != y.shape:
            return super().add_rms_norm(x, y, weight, eps)
        x, y = x.contiguous(), y.contiguous()
        total, out, hidden = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
        addresses = x.data_ptr(), y.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr()
        self._add_norm(*addresses, x.numel() // hidden, hidden, eps)
        return total, out

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation != "silu" or gate_up.dtype is not BFLOAT16:
            return super().gated(gate_up, activation)
        gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        self._gated_silu(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

    def paged_attention(self, k: Pages | Int8Pages, v: Pages | Int8Pages) -> NativePagedAttention:
        return NativePagedAttention(self._native, k, v, self.attention)

    def top_k(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dtype is not BFLOAT16 or logits.stride(-1) != 1:
            return super().top_k(logits, k)
        rows, columns = logits.shape
        values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.long)
        self._top_k(logits.data_ptr(), rows, columns, logits.stride(0), k, values.data_ptr(), ids.data_ptr())
        return values, ids

    def pack(self, kind: int, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) bfloat16 or int8 -> uint8 in blocks, as linear.c reads them."""
        rows, columns = weight.shape
        packed = huge_pages(round_up(rows, ROWS) * round_up(columns, COLUMNS) * BITS[kind] // 8)
        self._pack(kind, weight.contiguous().data_ptr(), packed.data_ptr(), rows, columns)
        return packed


def is_rows(x: torch.Tensor) -> bool:
    """True where the last two dimensions of (batch, tokens, heads, head_dim) lie end to end."""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().view(torch.uint8)
