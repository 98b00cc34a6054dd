"""Calls of the CUDA implementations on CPU tensors, for the `launches` that note what they ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pa_ops import cuda


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch(*news: int, dim: int = 64, dtype: torch.dtype = torch.float16, heads: int = 8) -> tuple[Tensor, ...]:
    """Sequences of `news` new tokens, 20 keys each, 2 KV heads."""
    q = torch.zeros(sum(news), heads, dim, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 4, 16, 2, dim, dtype=dtype)
    cu_seqlens = int32(0, *torch.tensor(news, dtype=torch.int64).cumsum(0).tolist())
    return q, k_cache, v_cache, cu_seqlens, int32(*[20] * len(news)), int32(1, 3).repeat(len(news), 1)


def call(op: str, *tensors: Tensor, **options: Any) -> Any:
    return cuda.IMPLEMENTATIONS[op](*tensors, **options)
