"""Turns calls that move rows of heads into launches: into pages (append), out of them (gather), two states into one.

As in pa_ops/launch.py, strides go in bytes, fields name where they come from, and grids follow from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pa_ops.arguments import APPEND, GATHER, MERGE
from pa_ops.launch import ALIGNMENT, HALF, Rows, axis_strides
from pa_ops.plan import ceil_div
from pa_ops.program import Address, Grid, GridRule, Launch, Size, Source, Stride
from pa_ops.spec import InstanceSpec

TOKEN_THREADS = 128  # of a block of `append` and of `gather`
FILLING_BLOCKS = 1024  # of those two: below that many, a token is cut into slices, one run of elements a thread


@dataclass(frozen=True)
class Rotary:
    """How `append` turns queries and keys; the turned queries go to `query_out`."""

    query: Rows
    query_out: Rows
    heads: int
    cos: Tensor
    interleaved: bool


def append_launch(
    kernel: int,
    *,
    key: Rows,
    value: Rows,
    k_cache: Tensor,
    v_cache: Tensor,
    tokens: str,
    slots: str | None,
    serving: bool,
    rotary: Rotary | None,
    aligned: bool,
    faults: int,
) -> Launch:
    """Store key [T.., Hkv, D] and value [T.., Hkv, Dv] into their slots, T being the rows of the tensor `tokens`.

    serving: lengths, past lengths and block table are there; without `slots` they tell where a token goes. aligned:
    every row of every tensor starts at a multiple of 16 bytes. faults: the address of the device's mask.
    """
    _, page_size, kv_heads, head_dim = k_cache.shape
    head_dim_v = v_cache.shape[3]
    heads, rotary_dim = (0, 0) if rotary is None else (rotary.heads, 2 * rotary.cos.shape[1])
    runs = (head_dim, head_dim_v, rotary_dim // 2)
    vectors = aligned and all(HALF * run % ALIGNMENT == 0 for run in runs)
    sources: dict[str, Source] = {
        **_caches(),
        **_rotations(rotary),
        **_sequences(serving),
        "key": key.address,
        "value": value.address,
        "slots": 0 if slots is None else Address(slots),
        "faults": faults,
        "key_token_stride": key.token,
        "key_head_stride": key.head,
        "value_token_stride": value.token,
        "value_head_stride": value.head,
        "tokens": Size(tokens, 0),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "page_size": page_size,
        "num_pages": Size("k_cache", 0),
        "aligned": int(vectors),
    }
    run = 8 if vectors else 1
    units = ((heads + kv_heads) * (head_dim - rotary_dim // 2) + kv_heads * head_dim_v) // run
    slices = ceil_div(units, TOKEN_THREADS)
    return Launch(kernel, APPEND, sources, Grid(GridRule.TOKENS, slices, FILLING_BLOCKS))


def _caches() -> dict[str, Source]:
    """Where k_cache and v_cache [pages, page_size, Hkv, D or Dv] lie, and their strides."""
    names = ("k_cache", "v_cache")
    return {**{name: Address(name) for name in names}, **axis_strides(*names)}


def _rotations(rotary: Rotary | None) -> dict[str, Source]:
    """What `append` is told of queries, of their rotation and of the keys'."""
    if rotary is None:
        names = ("query", "query_token_stride", "query_head_stride", "query_out", "out_token_stride", "out_head_stride")
        numbers = ("query_heads", "rotary_dim", "interleaved", "rotary_fp32", "positions")
        return dict.fromkeys((*names, *numbers, "cos", "sin", "rotary_stride"), 0)
    query, query_out, cos = rotary.query, rotary.query_out, rotary.cos
    return {
        "query": query.address,
        "query_token_stride": query.token,
        "query_head_stride": query.head,
        "query_out": query_out.address,
        "out_token_stride": query_out.token,
        "out_head_stride": query_out.head,
        "query_heads": rotary.heads,
        "rotary_dim": 2 * cos.shape[1],
        "interleaved": int(rotary.interleaved),
        "rotary_fp32": int(cos.dtype is torch.float32),
        "positions": Size("cos", 0),
        "cos": Address("cos"),
        "sin": Address("sin"),
        "rotary_stride": Stride("cos", 0, cos.element_size()),
    }


def _sequences(serving: bool) -> dict[str, Source]:
    """How `append` finds a token's sequence and its place there; not at all where slots alone tell where it goes."""
    if not serving:
        names = ("cu_seqlens_q", "past_lens", "block_table", "table_stride", "sequences", "max_pages")
        return dict.fromkeys(names, 0)
    return {
        "cu_seqlens_q": Address("cu_seqlens_q"),
        "past_lens": Address("past_lens"),
        "block_table": Address("block_table"),
        "table_stride": Stride("block_table", 0, 4),
        "sequences": Size("cu_seqlens_q", 0, 1, -1),
        "max_pages": Size("block_table", 1),
    }


def gather_launch(kernel: int, kv_heads: int, head_dim: int, head_dim_v: int, *, page_size: int) -> Launch:
    """Copy pages of k_cache, v_cache [pages, page_size, Hkv, D or Dv] into the rows of k, v [T, Hkv, D or Dv]."""
    sources: dict[str, Source] = {
        **_caches(),
        "block_table": Address("block_table"),
        "table_stride": Stride("block_table", 0, 4),
        "max_pages": Size("block_table", 1),
        "cu_seqlens_k": Address("cu_seqlens_k"),
        "sequences": Size("cu_seqlens_k", 0, 1, -1),
        "tokens": Size("k", 0),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "page_size": page_size,
        "num_pages": Size("k_cache", 0),
    }
    for letter in "kv":
        sources[letter] = Address(letter)
        for axis, name in enumerate(("token", "head")):
            sources[f"to_{letter}_{name}_stride"] = Stride(letter, axis, HALF)
    slices = ceil_div(kv_heads * max(head_dim, head_dim_v) * HALF, ALIGNMENT * TOKEN_THREADS)
    return Launch(kernel, GATHER, sources, Grid(GridRule.TOKENS, slices, FILLING_BLOCKS))


def merge_launch(kernel: int, spec: InstanceSpec, *, heads: int, width: int) -> Launch:
    """Merge out_a, out_b [T, Hq, Dv] with lse_a, lse_b [Hq, T] into out, lse."""
    sources: dict[str, Source] = {"tokens": Size("out_a", 0), "heads": heads, "width": width}
    for side, letter in (("out_a", "a"), ("out_b", "b"), ("out", "out")):
        rows = Rows.of(side)
        sources |= {side: rows.address, f"{letter}_token_stride": rows.token, f"{letter}_head_stride": rows.head}
    for name in ("lse_a", "lse_b", "lse"):
        sources |= {name: Address(name), f"{name}_stride": Stride(name, 0, 4)}
    return Launch(kernel, MERGE, sources, Grid(GridRule.ROWS, heads, spec.tile.warps))
