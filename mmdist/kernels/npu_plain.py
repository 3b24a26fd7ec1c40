"""hardware.kernels=plain on an Ascend chip: torch's own operations alone, to tell whether a fused one is wrong.

Without scaled_dot_product_attention: torch_npu makes of it an operation for training, which a 310P has not.
"""

from __future__ import annotations

import torch

from mmdist.kernels import plain
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.npu import matmul_attention
from mmdist.kernels.npu_paged import MatmulPagedAttention
from mmdist.kernels.pages import Int8Pages, Pages


class NpuPlainKernels(Kernels):
    level = "npu plain"

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
        mask = plain.causal_mask(q.shape[1], k.shape[1], window, q.device) if causal else None
        return matmul_attention(q, k, v, mask, scale=scale)

    def masked_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        return matmul_attention(q[None], k[None], v[None], mask, scale=scale)[0]

    def paged_attention(self, k: Pages | Int8Pages, v: Pages | Int8Pages) -> MatmulPagedAttention:
        return MatmulPagedAttention(k, v, self.attention)


KERNELS = NpuPlainKernels
