"""Turns the tensors of one operator call into a kernel's packed arguments, and launches it on the current stream.

Field order is that of the argument records in templates/device; addresses and strides go in bytes. Nothing here reads
device memory: grids come from shapes and from host-side bounds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pa_ops.errors import InvalidArgument
from pa_ops.manifest import Entry
from pa_ops.plan import attention_tiles
from pa_ops.spec import Layout

LOG2_E = math.log2(math.e)
WINDOW_LIMIT = 1 << 30  # keeps pos - W inside an int32; no sequence is that long
MERGE_BLOCKS = 65535

Kernel = Callable[..., Any]


def run_attention(
    kernel: Kernel,
    entry: Entry,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    sliding_window: int,
    softcap: float,
    sinks: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """Attend: q, out [T, Hq, D]; k, v paged [pages, page_size, Hkv, D] or ragged [total_k, Hkv, D]; lse [Hq, T].

    `causal` and `max_seqlen_k` are settled by the choice of `entry`. Raises InvalidArgument for a scale that is not
    a positive number: a maximum of scores is only a maximum of scaled scores if the scale is positive.
    """
    if not 0.0 < softmax_scale < math.inf:
        raise InvalidArgument("softmax_scale", "must be a positive, finite number", repr(softmax_scale))
    tokens, heads, head_dim = q.shape
    sequences = cu_seqlens_q.shape[0] - 1
    k_strides, v_strides = k.stride(), v.stride()
    if entry.spec.layout is Layout.GATHER:
        assert seqlens_k is not None and block_table is not None
        lengths, table = seqlens_k.data_ptr(), block_table.data_ptr()
        table_stride, max_pages = block_table.stride(0) * 4, block_table.shape[1]
        num_pages, page_size, kv_heads, _ = k.shape
        k_page, v_page = k_strides[0] * 2, v_strides[0] * 2
    else:
        assert cu_seqlens_k is not None
        lengths, table, table_stride, max_pages = cu_seqlens_k.data_ptr(), 0, 0, 0
        num_pages, page_size, kv_heads = 0, 1, k.shape[1]
        k_page = v_page = 0
    softcap_in = softmax_scale / softcap if softcap else 0.0
    arguments = (
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        cu_seqlens_q.data_ptr(),
        lengths,
        table,
        0 if sinks is None else sinks.data_ptr(),
        q.stride(0) * 2,
        q.stride(1) * 2,
        k_page,
        k_strides[-3] * 2,
        k_strides[-2] * 2,
        v_page,
        v_strides[-3] * 2,
        v_strides[-2] * 2,
        out.stride(0) * 2,
        out.stride(1) * 2,
        lse.stride(0) * 4,
        table_stride,
        sequences,
        heads,
        heads // kv_heads,
        head_dim,
        page_size,
        num_pages,
        max_pages,
        min(sliding_window, WINDOW_LIMIT),
        0 if sinks is None else int(sinks.dtype is torch.float32),
        softcap_in,
        (softcap or softmax_scale) * LOG2_E,
    )
    kernel(q, arguments, attention_tiles(tokens, sequences, entry.spec.tile.m, max_seqlen_q))


def run_append(
    kernel: Kernel,
    entry: Entry,
    *,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Store key [T, Hkv, D] and value [T, Hkv, Dv] into their slots, T = slot_mapping.shape[0] > 0."""
    pages, page_size, heads, head_dim = k_cache.shape
    strides = tuple(
        2 * stride
        for stride in (
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
        )
    )
    addresses = (value.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr())
    width_v = v_cache.shape[3]
    spans = (key.data_ptr(), *addresses, *strides, 2 * head_dim, 2 * width_v)
    aligned = int(all(span % 16 == 0 for span in spans))
    arguments = (
        *addresses,
        slot_mapping.data_ptr(),
        pages * page_size,
        *strides,
        page_size,
        heads,
        head_dim,
        width_v,
        aligned,
    )
    kernel(key, arguments, slot_mapping.shape[0])


def run_merge(
    kernel: Kernel,
    entry: Entry,
    *,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge out_a, out_b [T, Hq, Dv] with lse_a, lse_b [Hq, T] into out, lse; T > 0."""
    tokens, heads, width = out_a.shape
    arguments = (
        lse_a.data_ptr(),
        out_b.data_ptr(),
        lse_b.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        *(2 * t.stride(axis) for t in (out_a, out_b, out) for axis in (0, 1)),
        *(4 * t.stride(0) for t in (lse_a, lse_b, lse)),
        tokens,
        heads,
        width,
    )
    rows_a_block = entry.spec.tile.warps
    kernel(out_a, arguments, min(-(-tokens * heads // rows_a_block), MERGE_BLOCKS))
