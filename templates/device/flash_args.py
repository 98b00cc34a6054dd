"""The argument record of attention kernels: turns the host's packed scalars into named fields, in one fixed order.

Addresses are bytes, 0 where an optional tensor is absent; strides are bytes too, so a kernel multiplies once.
pa_ops/launch.py packs the same fields in the same order; tests compare the two lists.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor


class AttentionArguments(NamedTuple):
    """Everything an attention kernel is told at run time but its queries, its grid and its stream."""

    k: Int64
    v: Int64
    out: Int64
    lse: Int64
    cu_seqlens_q: Int64
    kv_lengths: Int64  # seqlens_k [B] where paged, else cu_seqlens_k [B + 1]
    block_table: Int64
    sinks: Int64
    q_token_stride: Int64
    q_head_stride: Int64
    k_page_stride: Int64
    k_token_stride: Int64
    k_head_stride: Int64
    v_page_stride: Int64
    v_token_stride: Int64
    v_head_stride: Int64
    out_token_stride: Int64
    out_head_stride: Int64
    lse_head_stride: Int64
    table_stride: Int64
    sequences: Int32
    heads: Int32
    group: Int32
    head_dim: Int32
    page_size: Int32
    num_pages: Int32
    max_pages: Int32
    window: Int32
    sinks_fp32: Int32
    softcap_in: Float32  # scale / softcap, 0 = off: scores become tanh(score * softcap_in) ...
    log2_scale: Float32  # ... and then times this: softcap * log2(e), or scale * log2(e)


def fake_arguments(dtype):
    """Stand-ins of the right types for `cute.compile`: queries, arguments, tiles in the grid, stream."""
    tokens, heads, width = cute.sym_int(), cute.sym_int(), cute.sym_int()
    strides = (cute.sym_int64(divisibility=8), cute.sym_int64(divisibility=8), 1)
    queries = make_fake_tensor(dtype, (tokens, heads, width), strides, assumed_align=16)
    values = AttentionArguments(*(kind(0) for kind in AttentionArguments.__annotations__.values()))
    return queries, values, Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True)
