"""Turns the run-time arguments of a kernel into one record: fields in a fixed order, and the bytes of a launch.

Templates read the fields by these names and launches pack them, so that neither holds a list of its own. Addresses
come first and change from call to call; what follows is decided by shapes and options.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pa_ops.spec import Family, InstanceSpec, Mask

ADDRESS = "Q"
INT64 = "q"
INT32 = "i"
FLOAT32 = "f"
MAP_BYTES = 128
MAP_ALIGNMENT = 64
WIDEST_STATE = 256 + 2  # outputs, maximum and sum of a row
WIDEST_POST = 256 + 4  # the same, to a multiple of 16 bytes
STATES_A_BLOCK = 17  # of that width, in the workspace: chunks of a sequence
CHUNK_KEYS = 512  # of the least chunk into which batch invariance cuts a sequence; a power of two
UNCUT = 30  # chunk_bits of a call whose sequences are cut where shares end, and nowhere else
CONSTANT_BASE = 0x210  # where SM 9.0 keeps the record in its constant bank; a map is aligned there, not in the record


def most_chunks(head_dim: int) -> int:
    """The logarithm of the chunks that a long sequence is cut into: a block has room for a state of each, and of one
    more that a window may begin within."""
    return (STATES_A_BLOCK * WIDEST_STATE // (head_dim + 2) - 1).bit_length() - 1


@dataclass(frozen=True)
class Record:
    """The fields of one kernel's argument, 8-byte ones first, so that no padding lies between them.

    addresses: device pointers, 0 where an optional tensor is absent; strides: bytes and other 64-bit numbers; counts:
    32-bit integers and flags; factors: fp32; maps: tensor maps of the copy engine, which the host encodes.
    """

    addresses: tuple[str, ...]
    strides: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

    @property
    def fields(self) -> Iterator[tuple[str, str]]:
        """(name, letter of its type) in order, without the maps; letters as in the struct module."""
        for letter, names in (
            (ADDRESS, self.addresses),
            (INT64, self.strides),
            (INT32, self.counts),
            (FLOAT32, self.factors),
        ):
            yield from ((name, letter) for name in names)

    @cached_property
    def _struct(self) -> struct.Struct:
        return struct.Struct("<" + "".join(letter for _, letter in self.fields))

    @property
    def size(self) -> int:
        """Bytes of the record, padding at its end not counted."""
        return self.offsets[self.maps[-1]] + MAP_BYTES if self.maps else self._struct.size

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Where each field begins, in bytes."""
        sizes = [struct.calcsize(f"<{letter}") for _, letter in self.fields]
        found = dict(zip((name for name, _ in self.fields), accumulate(sizes, initial=0), strict=False))
        first = -(-(CONSTANT_BASE + self._struct.size) // MAP_ALIGNMENT) * MAP_ALIGNMENT - CONSTANT_BASE
        return found | {name: first + place * MAP_BYTES for place, name in enumerate(self.maps)}

    def pack(self, values: Mapping[str, int | float]) -> bytes:
        """The bytes of a launch, maps zero; raises ValueError unless each field has a value, and nothing else has."""
        names = [name for name, _ in self.fields]
        if values.keys() != set(names):
            raise ValueError(f"values and fields differ: {sorted(values.keys() ^ set(names))}")
        return self._struct.pack(*(values[name] for name in names)).ljust(self.size, b"\0")

    def unpack(self, data: bytes) -> dict[str, int | float]:
        """The fields of a packed record by name, without the maps."""
        return dict(zip((name for name, _ in self.fields), self._struct.unpack_from(data), strict=True))


ATTENTION = Record(
    addresses=(
        "q",
        "k",
        "v",
        "out",
        "lse",
        "cu_seqlens_q",
        "kv_lengths",  # seqlens_k [B] where paged, else cu_seqlens_k [B + 1]
        "block_table",
        "sinks",
    ),
    strides=(
        "q_token_stride",
        "q_head_stride",
        "k_page_stride",
        "k_token_stride",
        "k_head_stride",
        "v_page_stride",
        "v_token_stride",
        "v_head_stride",
        "out_token_stride",
        "out_head_stride",
        "lse_head_stride",
        "table_stride",
    ),
    counts=(
        "tokens",
        "keys",  # rows of k where dense, room of a row of the block table where paged
        "sequences",
        "heads",
        "group",
        "head_dim",
        "page_size",
        "num_pages",
        "max_pages",
        "window",
        "sinks_fp32",
        "past_lengths",  # 1 where kv_lengths are those before the new tokens
        "skip_up_to",  # sequences with so few new tokens are another kernel's
    ),
    factors=(
        "softcap_in",  # scale / softcap, 0 = off: scores become tanh(score * softcap_in) ...
        "log2_scale",  # ... and then times this: softcap * log2(e), or scale * log2(e)
    ),
)

FLASH_SM80 = Record(
    addresses=ATTENTION.addresses,
    strides=ATTENTION.strides,
    counts=(
        *ATTENTION.counts,
        "section_bits",  # 2^section_bits heads take turns as blocks start; 0 unless the mask is causal
    ),
    factors=ATTENTION.factors,
)

# Queries and keys are found by their maps, which tell their head size.
_COUNTS_BY_MAPS = tuple("head_dim_v" if name == "head_dim" else name for name in ATTENTION.counts)
FLASH_SM90 = Record(
    addresses=(
        "out",
        "lse",
        "cu_seqlens_q",
        "kv_lengths",
        "block_table",
        "sinks",
        "tickets",
        "partials",
        "part_counters",
    ),
    strides=("out_token_stride", "out_head_stride", "lse_head_stride", "table_stride"),
    counts=(
        *_COUNTS_BY_MAPS,
        "box_rows",  # keys that one copy brings: they divide the page and the tile
        "boxes",  # of a tile
        "page_factor",  # (2^32 - 1) // page_size, by which kernels divide
        "beside",  # 1 where the launch before this one runs at the same time, on other SMs
        "pack_bits",  # a tile has the rows of 2^pack_bits heads of a group, token by token
        "cut_rounds",  # of tiles, one a block: where there are no more, the keys of the last round's are shared out
        "at_once",  # tiles that run at a time; where the batch is shared out to two grids, of the first one's, by both
        "every",  # tile in so many of the first grid's is the second's; 0: there is one grid
        "unit_bits",  # 2^unit_bits of the second grid's tiles are one of the first's; 0 for that
        "first_state",  # of the grid's parts of tiles, in the workspace
    ),
    factors=ATTENTION.factors,
    maps=("q_map", "k_map", "v_map"),
)

MEA = Record(
    addresses=ATTENTION.addresses,
    strides=ATTENTION.strides,
    counts=(*ATTENTION.counts, "head_dim_v"),
    factors=ATTENTION.factors,
)

_SPLIT = (*ATTENTION.addresses, "partials", "counters", "tickets")
_SHARED_OUT = (
    "kv_heads",
    "causal",
    "skip_above",  # sequences with more new tokens are another kernel's
    "lengths_ready",  # 1 where the launch before this one writes neither lengths nor the block table
)
# Kernels of all languages agree on a record's size only if it is a multiple of 8 bytes: no count here without a use.
DECODE = Record(
    addresses=(*_SPLIT, "posts"),
    strides=ATTENTION.strides,
    counts=(
        *(name for name in ATTENTION.counts if name not in ("heads", "skip_up_to")),
        *_SHARED_OUT,
        "chunk_bits",  # a sequence is cut every 2^chunk_bits tiles of keys, or 2^more where it is long; else UNCUT
        "page_factor",  # (2^32 - 1) // page_size, by which kernels divide
        "group_factor",  # (2^32 - 1) // group
        "sms",  # of the device
        "most_given",  # of them, which the launch after this one may have at the same time; 0: it does not run beside
    ),
    factors=ATTENTION.factors,
)

MEA_DECODE = Record(
    addresses=_SPLIT,
    strides=DECODE.strides,
    counts=(*(name for name in ATTENTION.counts if name != "heads"), *_SHARED_OUT),
    factors=DECODE.factors,
)

APPEND = Record(
    addresses=(
        "query",
        "key",
        "value",
        "query_out",
        "k_cache",
        "v_cache",
        "cos",
        "sin",
        "slots",  # 0: found through the block table
        "cu_seqlens_q",
        "past_lens",
        "block_table",
        "faults",
    ),
    strides=(
        "query_token_stride",
        "query_head_stride",
        "key_token_stride",
        "key_head_stride",
        "value_token_stride",
        "value_head_stride",
        "out_token_stride",
        "out_head_stride",
        "k_page_stride",
        "k_token_stride",
        "k_head_stride",
        "v_page_stride",
        "v_token_stride",
        "v_head_stride",
        "rotary_stride",
        "table_stride",
    ),
    counts=(
        "tokens",
        "sequences",
        "query_heads",  # 0: there is no query to rotate
        "kv_heads",
        "head_dim",
        "head_dim_v",
        "rotary_dim",  # 0: nothing is rotated
        "interleaved",
        "rotary_fp32",
        "positions",  # rows of cos and sin
        "page_size",
        "num_pages",
        "max_pages",
        "aligned",  # every address, stride and run of elements is a multiple of 16 bytes
    ),
)

GATHER = Record(
    addresses=("k_cache", "v_cache", "block_table", "cu_seqlens_k", "k", "v"),
    strides=(
        "k_page_stride",
        "k_token_stride",
        "k_head_stride",
        "v_page_stride",
        "v_token_stride",
        "v_head_stride",
        "to_k_token_stride",
        "to_k_head_stride",
        "to_v_token_stride",
        "to_v_head_stride",
        "table_stride",
    ),
    counts=("tokens", "sequences", "kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages", "max_pages"),
)

MERGE = Record(
    addresses=("out_a", "lse_a", "out_b", "lse_b", "out", "lse"),
    strides=(
        "a_token_stride",
        "a_head_stride",
        "b_token_stride",
        "b_head_stride",
        "out_token_stride",
        "out_head_stride",
        "lse_a_stride",
        "lse_b_stride",
        "lse_stride",
    ),
    counts=("tokens", "heads", "width"),
)


WHOLE_TILES = ("pack_bits", "partials", "part_counters", "cut_rounds")
"""Fields that a kernel with the mask `tensor` does without: its tiles are one head's, and see all of their keys."""


def _masked(record: Record) -> Record:
    """The record of the same kernel with the mask `tensor`: dense rows, `keys` of them for every sequence.

    Row j of sequence b is at q + b * q_sequence_stride + j * q_token_stride, key i at k + b * k_page_stride + i *
    k_token_stride (v likewise), and their element of the mask at b * mask_sequence_stride + head * mask_head_stride +
    j * mask_row_stride + i * mask_bytes. Outputs and lse are found by cu_seqlens_q, as ever.
    """
    return Record(
        addresses=(
            *(name for name in record.addresses if name not in WHOLE_TILES),
            "mask",  # 0: only causal and window hide keys; kv_lengths 0: all keys are there
        ),
        strides=(
            *record.strides,
            "q_sequence_stride",
            "mask_sequence_stride",  # 0 where the mask is broadcast, as of the next two
            "mask_head_stride",
            "mask_row_stride",
        ),
        counts=(
            *(name for name in record.counts if name not in WHOLE_TILES),
            "causal",  # 1 where there is a window, which is off at 0
            "position",  # of a sequence's first row among its keys; negative where rows precede them
            "mask_bytes",  # of an element, 1: bool, 2: the query's type, 4: fp32
        ),
        factors=(*record.factors, "mask_factor"),  # an addend times this joins the score before it meets log2_scale
        maps=record.maps,  # of q, k and v with a sequence as their outermost extent
    )


MASKED_SM80 = _masked(FLASH_SM80)
MASKED_SM90 = _masked(FLASH_SM90)
MASKED: dict[Family, Record] = {
    Family.FLASH_SM80: MASKED_SM80,
    Family.FLASH_SM90: MASKED_SM90,
    Family.MEA: _masked(MEA),
}
HIDING = -1e30
"""An addend of a mask at or below this hides the key, as -inf does: scaled and times log2(e), lower ones overflow."""

RECORDS: dict[Family, Record] = {
    Family.FLASH_SM80: FLASH_SM80,
    Family.FLASH_SM90: FLASH_SM90,
    Family.DECODE: DECODE,
    Family.MEA: MEA,
    Family.MEA_DECODE: MEA_DECODE,
    Family.APPEND: APPEND,
    Family.GATHER: GATHER,
    Family.MERGE: MERGE,
}


def record_of(spec: InstanceSpec) -> Record:
    """The record of an instance's argument."""
    return MASKED[spec.family] if spec.mask is Mask.TENSOR else RECORDS[spec.family]
