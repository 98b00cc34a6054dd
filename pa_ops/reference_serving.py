"""Turns the serving operator's packed, unrotated tokens into rotated Q and K, V, and the slots that K and V go to.

The steps before attention, as `pa_ops.reference.paged_attention_` takes them: plain PyTorch, on CPU and CUDA tensors,
where lengths and page ids that lie lead to tokens that are not stored, never to memory that is not there.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOT_STORED = -1


def split(
    query: Tensor, key: Tensor | None, value: Tensor | None, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [T, Hq, D], k and v [T, Hkv, D] of query, key and value, or of packed QKV in `query`."""
    if key is None or value is None:
        ends = (num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads)
        packed = query.view(query.shape[0], ends[-1], head_dim)
        return packed[:, : ends[0]], packed[:, ends[0] : ends[1]], packed[:, ends[1] :]
    k, v = (new.view(new.shape[0], num_kv_heads, head_dim) for new in (key, value))
    return query.view(query.shape[0], num_heads, head_dim), k, v


def locate(cu_seqlens_q: Tensor, past_lens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence and the position [n] of each of the n = cu_seqlens_q[-1] real tokens, at most `tokens`."""
    ends = cu_seqlens_q.long().clamp(0, tokens)
    rows = torch.arange(int(ends[-1]), device=ends.device)
    # Rows below the last end are never past the last sequence, even where the ends are not sorted.
    sequences = torch.searchsorted(ends[1:], rows, right=True)
    return sequences, past_lens.long()[sequences] + rows - ends[sequences]


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [n, H, D] turned by the angles of its positions [n], in fp32, and rounded once to x's dtype.

    cos, sin: [max_position, rotary_dim/2]; a position beyond them takes the last row. The pairs that turn are
    (2i, 2i+1) where `interleaved`, else (i, i + rotary_dim/2); channels from rotary_dim on are copied.
    """
    half = cos.shape[1]
    rows = positions.clamp(0, cos.shape[0] - 1)
    c, s = (table[rows].float()[:, None, :] for table in (cos, sin))
    turning, still = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    turned = torch.stack((a * c - b * s, b * c + a * s), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), still), -1)


def slots_of(sequences: Tensor, positions: Tensor, block_table: Tensor, pages: int, page_size: int) -> Tensor:
    """The flat slot [n] of each token through its sequence's row of the block table; -1 where no page is mapped."""
    columns = block_table.shape[1]
    places = torch.div(positions, page_size, rounding_mode="floor")
    inside = (places >= 0) & (places < columns)
    found = torch.full_like(positions, NOT_STORED)
    found[inside] = block_table[sequences[inside], places[inside]].long()
    mapped = (found >= 0) & (found < pages)
    return torch.where(mapped, found * page_size + positions % page_size, NOT_STORED)
