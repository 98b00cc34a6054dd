"""Turns the shapes and options of one operator call into launches whose fields name where they come from.

Records are those of pa_ops/arguments.py; strides go in bytes. Nothing here reads device memory: grids come from shapes
and from host-side bounds alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pa_ops.arguments import CHUNK_KEYS, FLASH_SM90, UNCUT, Record, record_of
from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument
from pa_ops.plan import QUERY_ROWS, box_keys, columns_of, packed_heads, resident_blocks, section_bits
from pa_ops.portions import Portion
from pa_ops.program import Address, Grid, GridRule, Launch, Size, Source, Stride, TensorMap, Value
from pa_ops.scratch import blocks_of, counters_at, parts_at, posts_at, tickets_at
from pa_ops.spec import DType, InstanceSpec

LOG2_E = math.log2(math.e)
WINDOW_LIMIT = 1 << 30  # keeps pos - W inside an int32; no sequence is that long
DTYPES = {DType.FP16: torch.float16, DType.BF16: torch.bfloat16}
HALF = 2  # bytes of an element of fp16 or bf16
ALIGNMENT = 16  # bytes of a vector access; what `Problem.aligned` promises
CUT_ROUNDS = 16  # of flash_sm90's tiles: after more, the last round is too small a part of the time to cut it
CUT_BESIDE = 1  # where blocks begin as decode ends: to count the tiles of 64 sequences costs them 1 us of 270
GIVEN = 4  # decode leaves one SM in so many to the launch beside it, at most: with fewer it reads no faster than alone


class Rows(NamedTuple):
    """Rows of heads [T, H, D], whatever tensor they are part of: address, byte strides of a token and of a head."""

    address: Value
    token: Value
    head: Value

    @classmethod
    def of(cls, name: str) -> Rows:
        """A whole tensor [T, H, D]."""
        return cls(Address(name), Stride(name, 0, HALF), Stride(name, 1, HALF))

    @classmethod
    def packed(cls, name: str, head_dim: int, first_head: int = 0) -> Rows:
        """Heads from `first_head` on of a tensor [T, heads * D]."""
        return cls(Address(name, first_head * head_dim * HALF), Stride(name, 0, HALF), head_dim * HALF)


@dataclass(frozen=True)
class Keys:
    """How attention finds K and V: tensor names, lengths, and the block table where there are pages.

    past: lengths leave the new tokens out.
    """

    k: str
    v: str
    lengths: str
    kv_heads: int
    page_size: int = 0
    past: bool = False


class Scores(NamedTuple):
    """What becomes of a product of Q and K: the options of attention that are numbers."""

    softmax_scale: float
    sliding_window: int
    softcap: float
    max_seqlen_q: int | None


@dataclass(frozen=True)
class Attention:
    """One attention, whichever kernel computes it: q [T, Hq, D], out [T, Hq, Dv]; k, v paged [pages, page_size, Hkv, D
    or Dv] or ragged [total_k, Hkv, D or Dv]; lse [Hq, T] by name, None where nobody reads it.

    `out` may be the memory of `q`: rows of a head are written when all blocks that read them have done so.
    """

    q: Rows
    out: Rows
    keys: Keys
    heads: int
    head_dim: int
    head_dim_v: int
    scores: Scores
    lse: str | None
    sinks: Tensor | None

    def sources(self) -> dict[str, Source]:
        """The fields that every kernel is told.

        Raises InvalidArgument for a scale that is not a positive number: a maximum of scores is only a maximum of
        scaled scores if the scale is positive.
        """
        keys, lse, sinks = self.keys, self.lse, self.sinks
        scale, softcap = self.scores.softmax_scale, self.scores.softcap
        if not 0.0 < scale < math.inf:
            raise InvalidArgument("softmax_scale", "must be a positive, finite number", repr(scale))
        return {
            "q": self.q.address,
            "k": Address(keys.k),
            "v": Address(keys.v),
            "out": self.out.address,
            "lse": 0 if lse is None else Address(lse),
            "cu_seqlens_q": Address("cu_seqlens_q"),
            "kv_lengths": Address(keys.lengths),
            "sinks": 0 if sinks is None else Address("sinks"),
            "q_token_stride": self.q.token,
            "q_head_stride": self.q.head,
            "out_token_stride": self.out.token,
            "out_head_stride": self.out.head,
            "lse_head_stride": 0 if lse is None else Stride(lse, 0, 4),
            "tokens": _tokens(self.q),
            "sequences": Size("cu_seqlens_q", 0, 1, -1),
            "heads": self.heads,
            "group": self.heads // keys.kv_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "window": min(self.scores.sliding_window, WINDOW_LIMIT),
            "sinks_fp32": int(sinks is not None and sinks.dtype is torch.float32),
            "past_lengths": int(keys.past),
            "softcap_in": scale / softcap if softcap else 0.0,
            "log2_scale": (softcap or scale) * LOG2_E,
            **_key_sources(keys),
        }


class Setting(NamedTuple):
    """Where a launch for many query rows stands: which tiles are its `portion`, where they are shared out to grids.
    Sequences of `skip_up_to` tokens or fewer are left to `decode_launch`, which comes just before, and runs at the same
    time where this one is `beside` it. invariant: a sequence's bits must not depend on others."""

    num_sms: int
    portion: Portion
    skip_up_to: int = 0
    beside: bool = False
    invariant: bool = False


def attention_launch(kernel: int, spec: InstanceSpec, call: Attention, setting: Setting) -> Launch:
    """Attend by tiles of query rows. The bound of lengths holds for every call to come."""
    bound = -1 if call.scores.max_seqlen_q is None else call.scores.max_seqlen_q
    bits = section_bits(spec, call.heads, call.heads // call.keys.kv_heads)
    grid = Grid(GridRule.TILES, spec.tile.m, bound, call.heads, 1 << bits)
    record = record_of(spec)
    sources = {**call.sources(), "skip_up_to": setting.skip_up_to, "section_bits": bits}
    return Launch(kernel, record, fields_of(record, sources), grid)


def persistent_launch(kernel: int, spec: InstanceSpec, call: Attention, setting: Setting) -> Launch:
    """Attend by one block an SM that lists its tiles itself, or several together, and shares out the keys of the last;
    those tiles that are the grid's portion."""
    portion = setting.portion
    sources: dict[str, Source] = {
        **call.sources(),
        **_map_sources(spec, call),
        "tickets": Address("workspace", portion.tickets_at(setting.num_sms)),
        # Decode's place for chunks of a sequence, of which it has none where it runs at the same time.
        "partials": Address("workspace"),
        "part_counters": Address("workspace", parts_at(setting.num_sms)),
        "cut_rounds": 0 if setting.invariant else CUT_BESIDE if setting.beside else CUT_ROUNDS,
        "skip_up_to": setting.skip_up_to,
        "page_factor": factor_of(max(call.keys.page_size, 1)),
        "beside": int(setting.beside or portion.second),
        **portion.fields(),
    }
    return Launch(kernel, FLASH_SM90, fields_of(FLASH_SM90, sources), Grid(GridRule.FIXED, portion.blocks, 1))


def fields_of(record: Record, sources: dict[str, Source]) -> dict[str, Source]:
    """Those of `sources` that the record has."""
    return {name: sources[name] for name in (*(name for name, _ in record.fields), *record.maps)}


def _map_sources(spec: InstanceSpec, call: Attention) -> dict[str, Source]:
    """Tensor maps of q, k and v, and how many keys a box has."""
    keys, dtype = call.keys, DTYPES[spec.dtype]
    box_rows = box_keys(spec.tile, keys.page_size)
    packed = packed_heads(spec, call.heads // keys.kv_heads)
    q_sizes = (call.head_dim, call.heads, _tokens(call.q), 1)
    q_box = (columns_of(spec.head_dim), packed, QUERY_ROWS // packed)
    made: dict[str, Source] = {
        "box_rows": box_rows,
        "boxes": spec.tile.n // box_rows,
        "pack_bits": packed.bit_length() - 1,
        "q_map": TensorMap(call.q.address, q_sizes, (call.q.head, call.q.token, 0), q_box, dtype),
    }
    row = 1 if keys.page_size else 0
    for letter, name, head_dim, columns in rows_of_keys(spec, call):
        pages, page_stride = (Size(name, 0), Stride(name, 0, HALF)) if keys.page_size else (1, 0)
        sizes = (head_dim, Size(name, row), keys.kv_heads, pages)
        strides = (Stride(name, row, HALF), Stride(name, row + 1, HALF), page_stride)
        made[f"{letter}_map"] = TensorMap(Address(name), sizes, strides, (columns, box_rows, 1), dtype)
    return made


def rows_of_keys(spec: InstanceSpec, call: Attention) -> Iterator[tuple[str, str, int, int]]:
    """(letter, tensor, elements of a row, those of a box) of K and of V."""
    yield "k", call.keys.k, call.head_dim, columns_of(spec.head_dim)
    yield "v", call.keys.v, call.head_dim_v, columns_of(spec.head_dim_v)


def decode_launch(
    kernel: int,
    spec: InstanceSpec,
    call: Attention,
    *,
    causal: bool,
    skip_above: int,
    lengths_ready: bool,
    invariant: bool,
    beside: bool,
    capability: Capability,
) -> Launch:
    """Attend by shares of all keys, with the blocks that the device holds; sequences of more than `skip_above` tokens
    are left.

    lengths_ready: the launch before this one, on the same stream, is ours, and writes neither lengths nor block table.
    invariant: a sequence is cut where its own length says, not where shares end. beside: the launch after this one
    computes the sequences that are left, and may at the same time.
    """
    record = record_of(spec)
    resident = max(resident_blocks(spec.smem_bytes, capability.smem_optin_bytes), 1)
    sources: dict[str, Source] = {
        **call.sources(),
        "partials": Address("workspace"),
        "counters": Address("workspace", counters_at(capability.num_sms)),
        "tickets": Address("workspace", tickets_at(capability.num_sms)),
        "posts": Address("workspace", posts_at(capability.num_sms)),
        "kv_heads": call.keys.kv_heads,
        "causal": int(causal),
        "skip_up_to": 0,
        "skip_above": skip_above,
        "lengths_ready": int(lengths_ready),
        "page_factor": factor_of(call.keys.page_size),
        "group_factor": factor_of(call.heads // call.keys.kv_heads),
        "sms": capability.num_sms,
        "most_given": capability.num_sms // GIVEN if beside else 0,
        "chunk_bits": (CHUNK_KEYS // spec.tile.n).bit_length() - 1 if invariant else UNCUT,
    }
    blocks = min(blocks_of(capability.num_sms), capability.num_sms * resident)
    return Launch(kernel, record, fields_of(record, sources), Grid(GridRule.FIXED, blocks, 1))


def factor_of(divisor: int) -> int:
    """What a kernel multiplies with to divide, as the int32 with the bits of the unsigned number."""
    return ctypes.c_int32((2**32 - 1) // divisor).value


def _tokens(rows: Rows) -> Size:
    """The number of rows."""
    assert isinstance(rows.address, Address)
    return Size(rows.address.tensor, 0)


def axis_strides(k: str, v: str, axes: tuple[str, ...] = ("page", "token", "head")) -> dict[str, Source]:
    """The strides of the leading `axes` of tensors k and v, by field: k_page_stride and so on."""
    names = (("k", k), ("v", v))
    return {f"{letter}_{axis}_stride": Stride(name, i, HALF) for letter, name in names for i, axis in enumerate(axes)}


def _key_sources(keys: Keys) -> dict[str, Source]:
    if not keys.page_size:
        nothing = ("k_page_stride", "v_page_stride", "block_table", "table_stride", "max_pages", "num_pages")
        rows = axis_strides(keys.k, keys.v, ("token", "head"))
        return {**rows, **dict.fromkeys(nothing, 0), "page_size": 1, "keys": Size(keys.k, 0)}
    return {
        **axis_strides(keys.k, keys.v),
        "block_table": Address("block_table"),
        "table_stride": Stride("block_table", 0, 4),
        "max_pages": Size("block_table", 1),
        "num_pages": Size(keys.k, 0),
        "page_size": keys.page_size,
        "keys": Size("block_table", 1, keys.page_size),
    }
