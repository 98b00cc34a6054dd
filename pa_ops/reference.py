"""Turns the definition of every operator into plain fp32 PyTorch: what the kernels mean, on CPU and on CUDA tensors.

Nothing here is fast and nothing is checked beyond what memory safety needs: lengths are read back to the host, each
sequence is one step of a loop, and its query rows go through in chunks, so that 16k tokens fit. Results have the
query's dtype; pass fp32 tensors for an unrounded answer. (On CUDA, leave PyTorch's TF32 matmuls off.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pa_ops.reference_padded import attention
from pa_ops.reference_pages import Pages, gather_kv, sequences_of
from pa_ops.reference_rows import INFINITY, Keys, Scores, attend, dequantise, subtractable
from pa_ops.reference_serving import locate, rotate, slots_of, split

__all__ = [
    "append_kv",
    "attention",
    "gather_kv",
    "merge_states",
    "paged_attention",
    "paged_attention_",
    "varlen_attention",
]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over paged caches: q [T, Hq, D] -> out [T, Hq, Dv] in q's dtype and lse [Hq, T] fp32.

    Arguments as in `pa_ops.paged_attention`; the max_seqlen bounds change nothing. With `out` (and `lse`) the rows are
    written there; without, rows past cu_seqlens_q[-1] are zeros with lse = -inf.
    """
    scores = _scores(q, softmax_scale, causal, sliding_window, softcap, sinks)
    out, lse = _results(q, v_cache, out, lse)
    lengths = seqlens_k.tolist()
    for sequence, rows in sequences_of(cu_seqlens_q, q.shape[0]):
        keys = _gather(k_cache, v_cache, block_table[sequence], lengths[sequence], k_scale, v_scale)
        attend(q, keys, rows, lengths[sequence] - len(rows), scores, out, lse)
    return out, lse


def paged_attention_(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    past_lens: Tensor,
    block_table: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    slot_mapping: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Splits packed QKV, rotates Q and K, stores K and V, attends: -> out [T, Hq * D] in query's dtype.

    Arguments as in `pa_ops.paged_attention_`; `options`, and rows past cu_seqlens_q[-1], as in `paged_attention`.
    """
    pages, page_size, _, head_dim = k_cache.shape
    q, k, v = split(query, key, value, num_heads, num_kv_heads, head_dim)
    sequences, positions = locate(cu_seqlens_q, past_lens, query.shape[0])
    real = positions.shape[0]
    q, k = q[:real], k[:real]
    if cos is not None and sin is not None:
        q, k = (rotate(x, positions, cos, sin, rotary_interleaved) for x in (q, k))
    if slot_mapping is None:
        slots = slots_of(sequences, positions, block_table, pages, page_size)
    else:
        slots = slot_mapping[:real]
    append_kv(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    if out is None:
        out = query.new_zeros(query.shape[0], num_heads * head_dim)
    lengths = past_lens.long() + cu_seqlens_q.long().diff()
    options.update(k_scale=k_scale, v_scale=v_scale, out=out.view(out.shape[0], num_heads, head_dim))
    paged_attention(q, k_cache, v_cache, cu_seqlens_q, lengths, block_table, **options)
    return out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over ragged k [total_k, Hkv, D], v [total_k, Hkv, Dv]; the rest as in `paged_attention`."""
    scores = _scores(q, softmax_scale, causal, sliding_window, softcap, sinks)
    out, lse = _results(q, v, out, lse)
    spans = dict(sequences_of(cu_seqlens_k, k.shape[0]))
    for sequence, rows in sequences_of(cu_seqlens_q, q.shape[0]):
        span = spans[sequence]
        mapped = torch.ones(len(span), dtype=torch.bool, device=q.device)
        part = slice(span.start, span.stop)
        keys = Keys(dequantise(k[part], k_scale), dequantise(v[part], v_scale), mapped)
        attend(q, keys, rows, len(span) - len(rows), scores, out, lse)
    return out, lse


def append_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Stores row t of key [T, Hkv, D] and value [T, Hkv, Dv] into the flat slot slot_mapping[t] of the caches.

    Caches have any strides. T is slot_mapping's; a slot outside the caches (-1 above all) is not stored.
    Quantised caches hold value / scale.
    """
    pages, page_size = k_cache.shape[:2]
    tokens = ((slot_mapping >= 0) & (slot_mapping < pages * page_size)).nonzero().flatten()
    slots = slot_mapping[tokens]
    place = (slots // page_size, slots % page_size)
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if tokens.numel():
            cache[place] = quantise(new[tokens], cache.dtype, scale)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets: out [T, Hq, Dv] in out_a's dtype and lse [Hq, T] fp32.

    A side whose lse is -inf or +inf is empty, whatever its out holds; both empty gives zeros and -inf.
    """
    sides = [(out_a.float(), _finite_or_empty(lse_a)), (out_b.float(), _finite_or_empty(lse_b))]
    lse = torch.logaddexp(sides[0][1], sides[1][1])
    out = torch.zeros_like(sides[0][0])
    for part, part_lse in sides:
        weight = torch.exp(part_lse - subtractable(lse)).transpose(0, 1).unsqueeze(-1)
        empty = torch.isinf(part_lse).transpose(0, 1).unsqueeze(-1)
        out += torch.where(empty, 0.0, weight * part)
    return out.to(out_a.dtype), lse


def quantise(values: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What a cache of `dtype` stores for values [..., Hkv, D]: values / scale, round to nearest even, saturating."""
    stored = values.float() if scale is None else values.float() / scale.float().reshape(-1, 1)
    if dtype == torch.int8:
        return torch.nan_to_num(stored, nan=0.0).round().clamp(-128, 127).to(dtype)
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        return stored.clamp(-limit, limit).to(dtype)
    return stored.to(dtype)


def _scores(q: Tensor, scale: float | None, causal: bool, window: int, softcap: float, sinks: Tensor | None) -> Scores:
    return Scores(q.shape[-1] ** -0.5 if scale is None else scale, causal, window, softcap, sinks)


def _results(q: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    if out is None:
        out = q.new_zeros(tokens, heads, v.shape[-1])
    if lse is None:
        lse = q.new_full((heads, tokens), -INFINITY, dtype=torch.float32)
    return out, lse


def _gather(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, k_scale: Tensor | None, v_scale: Tensor | None
) -> Keys:
    """The keys of one sequence, page by page through its row of the block table; unmapped pages are read as zeros."""
    pages = Pages.of(table, length, k_cache)
    k, v = dequantise(pages.rows(k_cache), k_scale), dequantise(pages.rows(v_cache), v_scale)
    return Keys(k, v, pages.mapped.repeat_interleave(k_cache.shape[1])[: pages.count])


def _finite_or_empty(lse: Tensor) -> Tensor:
    return torch.where(torch.isinf(lse), -INFINITY, lse.float())
