"""Turns the shapes, strides and options of one operator call into a launch that only lacks addresses.

Records are those of pa_ops/arguments.py; strides go in bytes. Nothing here reads device memory: grids come from shapes
and from host-side bounds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pa_ops.arguments import APPEND, ATTENTION, MERGE
from pa_ops.errors import InvalidArgument
from pa_ops.plan import attention_tiles
from pa_ops.spec import InstanceSpec, Layout

LOG2_E = math.log2(math.e)
INT32_MAX = 2**31 - 1
WINDOW_LIMIT = 1 << 30  # keeps pos - W inside an int32; no sequence is that long
MAX_BLOCKS = 65535  # of helpers, which go on by grid-stride
VECTOR_BYTES = 16

Kernel = Callable[..., Any]
# The current stream's handle of a device, in a tenth of the time that a torch.cuda.Stream takes to be made.
_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data begins; 0 for one that is absent."""
    return 0 if tensor is None else tensor.data_ptr()


class Launch(NamedTuple):
    """One kernel launch: called with the addresses of its record, it goes onto the device's current stream.

    pack: turns the addresses into bytes; tail: the bytes after them; x, y: blocks of the grid.
    """

    kernel: Kernel
    pack: Callable[..., bytes]
    tail: bytes
    x: int
    y: int
    device: int

    def __call__(self, *addresses: int) -> None:
        self.kernel(self.pack(*addresses) + self.tail, self.x, self.y, self.device, _stream_of(self.device))


def attention_launch(
    kernel: Kernel,
    spec: InstanceSpec,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    max_seqlen_q: int | None = None,
    past_lengths: bool = False,
) -> Launch:
    """Attend: q, out [T, Hq, D]; k, v paged [pages, page_size, Hkv, D] or ragged [total_k, Hkv, D]; lse [Hq, T].

    `out` and `lse` that are left out will be dense. `max_seqlen_q` bounds the lengths of every call to come.
    past_lengths: the kernel adds the new tokens to the lengths it is given. `out` may be the memory of `q`: a block
    writes only the rows and the head that it alone has read. Raises InvalidArgument for a scale that is not a
    positive number: a maximum of scores is only a maximum of scaled scores if the scale is positive.
    """
    tokens, heads, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not 0.0 < scale < math.inf:
        raise InvalidArgument("softmax_scale", "must be a positive, finite number", repr(scale))
    sequences = cu_seqlens_q.shape[0] - 1
    paged = spec.layout is Layout.GATHER
    out_strides = (heads * v.shape[-1], v.shape[-1]) if out is None else out.stride()
    tail = ATTENTION.tail(
        {
            "q_token_stride": q.stride(0) * 2,
            "q_head_stride": q.stride(1) * 2,
            "k_page_stride": k.stride(0) * 2 if paged else 0,
            "k_token_stride": k.stride(-3) * 2,
            "k_head_stride": k.stride(-2) * 2,
            "v_page_stride": v.stride(0) * 2 if paged else 0,
            "v_token_stride": v.stride(-3) * 2,
            "v_head_stride": v.stride(-2) * 2,
            "out_token_stride": out_strides[0] * 2,
            "out_head_stride": out_strides[1] * 2,
            "lse_head_stride": (tokens if lse is None else lse.stride(0)) * 4,
            "table_stride": 0 if block_table is None else block_table.stride(0) * 4,
            "tokens": tokens,
            "keys": min(block_table.shape[1] * k.shape[1], INT32_MAX) if block_table is not None else k.shape[0],
            "sequences": sequences,
            "heads": heads,
            "group": heads // k.shape[-2],
            "head_dim": head_dim,
            "page_size": k.shape[1] if paged else 1,
            "num_pages": k.shape[0] if paged else 0,
            "max_pages": 0 if block_table is None else block_table.shape[1],
            "window": min(sliding_window, WINDOW_LIMIT),
            "sinks_fp32": int(sinks is not None and sinks.dtype is torch.float32),
            "past_lengths": int(past_lengths),
            "softcap_in": scale / softcap if softcap else 0.0,
            "log2_scale": (softcap or scale) * LOG2_E,
        }
    )
    tiles = attention_tiles(tokens, sequences, spec.tile.m, max_seqlen_q)
    return Launch(kernel, ATTENTION.head.pack, tail, tiles, heads, q.device.index or 0)


def append_launch(
    kernel: Kernel,
    *,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: int,
    query: Tensor | None = None,
    query_out: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    sequences: int = 0,
    block_table: Tensor | None = None,
) -> Launch:
    """Store key [T.., Hkv, D] and value [T.., Hkv, Dv]; rotate query [T, Hq, D] into query_out where there is cos."""
    pages, page_size, kv_heads, head_dim = k_cache.shape
    rotary_dim = 0 if cos is None else 2 * cos.shape[1]
    rows = [key, value, k_cache, v_cache, *(t for t in (query, query_out) if t is not None)]
    values = {
        **_strides("query", query),
        **_strides("out", query_out),
        **_strides("key", key),
        **_strides("value", value),
        **_strides("k", k_cache),
        **_strides("v", v_cache),
        "rotary_stride": 0 if cos is None else cos.stride(0) * cos.element_size(),
        "table_stride": 0 if block_table is None else block_table.stride(0) * 4,
        "tokens": tokens,
        "sequences": sequences,
        "query_heads": 0 if query is None else query.shape[1],
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": v_cache.shape[3],
        "rotary_dim": rotary_dim,
        "interleaved": int(interleaved),
        "rotary_fp32": int(cos is not None and cos.dtype is torch.float32),
        "positions": 0 if cos is None else cos.shape[0],
        "page_size": page_size,
        "num_pages": pages,
        "max_pages": 0 if block_table is None else block_table.shape[1],
    }
    runs = (head_dim, v_cache.shape[3], rotary_dim // 2)
    tables = [t for t in (cos, sin) if t is not None]
    aligned = all(2 * run % VECTOR_BYTES == 0 for run in runs) and all(map(_vectors, (*rows, *tables)))
    tail = APPEND.tail({**values, "aligned": int(aligned)})
    return Launch(kernel, APPEND.head.pack, tail, min(tokens, MAX_BLOCKS), 1, key.device.index or 0)


def _strides(name: str, tensor: Tensor | None) -> dict[str, int | float]:
    """The byte strides of [token, head, D] or [page, token, head, D], by the names of their fields."""
    axes = ("page", "token", "head") if tensor is not None and tensor.dim() == 4 else ("token", "head")
    sizes = (0, 0) if tensor is None else [2 * stride for stride in tensor.stride()[:-1]]
    return {f"{name}_{axis}_stride": size for axis, size in zip(axes, sizes, strict=True)}


def _vectors(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    strides = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    return tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % VECTOR_BYTES == 0 for stride in strides)


def merge_launch(
    kernel: Kernel, spec: InstanceSpec, *, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> Launch:
    """Merge out_a, out_b [T, Hq, Dv] with lse_a, lse_b [Hq, T] into a dense out and lse."""
    tokens, heads, width = out_a.shape
    blocks = min(-(-tokens * heads // spec.tile.warps), MAX_BLOCKS)
    tail = MERGE.tail(
        {
            "a_token_stride": 2 * out_a.stride(0),
            "a_head_stride": 2 * out_a.stride(1),
            "b_token_stride": 2 * out_b.stride(0),
            "b_head_stride": 2 * out_b.stride(1),
            "out_token_stride": 2 * heads * width,
            "out_head_stride": 2 * width,
            "lse_a_stride": 4 * lse_a.stride(0),
            "lse_b_stride": 4 * lse_b.stride(0),
            "lse_stride": 4 * tokens,
            "tokens": tokens,
            "heads": heads,
            "width": width,
            "blocks": blocks,
        }
    )
    return Launch(kernel, MERGE.head.pack, tail, blocks, 1, out_a.device.index or 0)
