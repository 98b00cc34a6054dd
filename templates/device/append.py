"""Store new keys and values into their pages: turns (token rows, slot_mapping) into cache rows, one block a token.

Slots are flat, page * page_size + offset; a slot that is negative or beyond the pool is not stored. 64-bit addresses.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from pa_ops.templates.device.ptx import copy_global_2, copy_global_16, ld_global_i64


class AppendArguments(NamedTuple):
    """Addresses and byte strides of one append; rows are `heads` x `head_dim` 16-bit elements."""

    value: Int64
    k_cache: Int64
    v_cache: Int64
    slots: Int64
    num_slots: Int64
    key_token_stride: Int64
    key_head_stride: Int64
    value_token_stride: Int64
    value_head_stride: Int64
    k_page_stride: Int64
    k_token_stride: Int64
    k_head_stride: Int64
    v_page_stride: Int64
    v_token_stride: Int64
    v_head_stride: Int64
    page_size: Int32
    heads: Int32
    head_dim: Int32
    head_dim_v: Int32
    aligned: Int32  # every address and stride is a multiple of 16 bytes


def fake_arguments(dtype):
    """Stand-ins of the right types for `cute.compile`: keys, arguments, tokens, stream."""
    tokens, heads, width = cute.sym_int(), cute.sym_int(), cute.sym_int()
    keys = make_fake_tensor(dtype, (tokens, heads, width), (cute.sym_int64(), cute.sym_int64(), 1))
    values = AppendArguments(*(kind(0) for kind in AppendArguments.__annotations__.values()))
    return keys, values, Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True)


class Append:
    """One instance: `warps` warps copy the K and the V row of a token."""

    def __init__(self, warps):
        self.threads = warps * 32

    @cute.jit
    def __call__(self, key, args, tokens: Int32, stream):
        self.kernel(key.iterator.toint(), args, tokens).launch(
            grid=[cutlass.min(tokens, 65535), 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, key: Int64, args, tokens: Int32):
        first, _, _ = cute.arch.block_idx()
        for token in cutlass.range(first, tokens, 65535, unroll=1):
            slot = ld_global_i64(args.slots + Int64(token) * 8)
            if (slot >= 0) & (slot < args.num_slots):
                page = slot // Int64(args.page_size)
                offset = slot - page * Int64(args.page_size)
                self.copy_row(
                    key + Int64(token) * args.key_token_stride,
                    args.key_head_stride,
                    args.k_cache + page * args.k_page_stride + offset * args.k_token_stride,
                    args.k_head_stride,
                    args.heads,
                    args.head_dim,
                    args.aligned,
                )
                self.copy_row(
                    args.value + Int64(token) * args.value_token_stride,
                    args.value_head_stride,
                    args.v_cache + page * args.v_page_stride + offset * args.v_token_stride,
                    args.v_head_stride,
                    args.heads,
                    args.head_dim_v,
                    args.aligned,
                )

    @cute.jit
    def copy_row(
        self,
        source: Int64,
        source_stride: Int64,
        target: Int64,
        target_stride: Int64,
        heads: Int32,
        width: Int32,
        aligned: Int32,
    ):
        """Copy `heads` runs of `width` elements, 16 bytes a thread and step where the layout allows, else 2."""
        tid, _, _ = cute.arch.thread_idx()
        if aligned != 0:
            chunks = width // 8
            for i in cutlass.range(tid, heads * chunks, self.threads, unroll=1):
                head, chunk = Int64(i // chunks), Int64(i % chunks) * 16
                copy_global_16(target + head * target_stride + chunk, source + head * source_stride + chunk)
        else:
            for i in cutlass.range(tid, heads * width, self.threads, unroll=1):
                head, element = Int64(i // width), Int64(i % width) * 2
                copy_global_2(target + head * target_stride + element, source + head * source_stride + element)
