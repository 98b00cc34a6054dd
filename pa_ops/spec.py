"""Turns the compile-time choices of one kernel into a name that is total, true and invertible, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import TypeVar

from pa_ops.errors import InvalidArgument

NAME_LIMIT = 80
WARP_THREADS = 32


class Word(str, Enum):
    """A vocabulary word: it is equal to, hashes as and prints as its own string."""

    __str__ = str.__str__  # not Enum's, which a survey of all problems would call for half of its time

    def __format__(self, format_spec: str) -> str:
        return str.__format__(self, format_spec)


class Op(Word):
    """An operator as a caller names it."""

    PAGED_ATTENTION = "paged_attention"
    VARLEN_ATTENTION = "varlen_attention"
    ATTENTION = "attention"
    APPEND_KV = "append_kv"
    GATHER_KV = "gather_kv"
    MERGE_STATES = "merge_states"


class KernelOp(Word):
    """What a kernel computes; `attn` kernels serve paged (gather), varlen (dense) and padded attention (either)."""

    ATTN = "attn"
    APPEND_KV = "append_kv"
    GATHER_KV = "gather_kv"
    MERGE_STATES = "merge_states"


class Family(Word):
    """The template that a kernel is rendered from."""

    FLASH_SM80 = "flash_sm80"
    FLASH_SM90 = "flash_sm90"
    DECODE = "decode"
    MEA = "mea"
    MEA_DECODE = "mea_decode"
    APPEND = "append"
    GATHER = "gather"
    MERGE = "merge"


class DType(Word):
    """An element type; the quantised ones are storage types of caches."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"
    E4M3FN = "e4m3fn"
    E5M2 = "e5m2"
    INT8 = "int8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {DType.FP16: 2, DType.BF16: 2, DType.FP32: 4, DType.E4M3FN: 1, DType.E5M2: 1, DType.INT8: 1}


class Layout(Word):
    """How K and V are found: contiguous ragged rows, or a page look-up for every row."""

    DENSE = "dense"
    GATHER = "gather"


class Mask(Word):
    """Which keys a query sees; a window is (pos - W, pos], so it is causal by definition.

    tensor: what the call's mask tensor says, if it has one, and its causal flag and window, all at run time; dense
    rows of one batch then, with the same room for every sequence, and positions that the call tells.
    """

    FULL = "full"
    CAUSAL = "causal"
    WINDOW = "window"
    TENSOR = "tensor"


class TensorMask(Word):
    """What the elements of a call's mask tensor are: True where a query sees a key, or what is added to the score."""

    NONE = "none"
    BOOL = "bool"
    ADDITIVE = "additive"  # in the query's type
    ADDITIVE_FP32 = "additive_fp32"


PLAIN_MASKS = (Mask.FULL, Mask.CAUSAL, Mask.WINDOW)
"""Masks that a kernel works out from positions alone."""


WordT = TypeVar("WordT", bound=Word)


def word(kind: type[WordT], argument: str, value: object) -> WordT:
    """The member of `kind` that `value` spells.

    Raises InvalidArgument, naming `argument` and every accepted spelling.
    """
    if type(value) is kind:
        return value
    try:
        return kind(value)
    except ValueError:
        raise InvalidArgument(argument, "must be one of " + ", ".join(kind), repr(value)) from None


def _natural(argument: str, value: object, *, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(argument, f"must be an integer >= {least}", repr(value))


PAIR, EIGHT = 2, 8  # blocks that share keys


@dataclass(frozen=True, order=True)
class Tile:
    """The work of one thread block: m query rows by n keys a step, K/V stages in flight, warps; zeros = run time.

    cluster: blocks that share each step's keys, and have m rows each.
    """

    m: int
    n: int
    stages: int
    warps: int
    cluster: int = 1

    def __post_init__(self) -> None:
        for field in ("m", "n", "stages", "warps"):
            _natural(f"tile.{field}", getattr(self, field))
        _natural("tile.cluster", self.cluster, least=1)

    def __str__(self) -> str:
        shared = f"c{self.cluster}" if self.cluster > 1 else ""
        return f"m{self.m}n{self.n}s{self.stages}w{self.warps}{shared}"

    @property
    def alone(self) -> Tile:
        """The same tile for a block that shares its keys with none."""
        return replace(self, cluster=1)


@dataclass(frozen=True, order=True)
class InstanceSpec:
    """What is fixed when a kernel is compiled, and nothing else; a head size of 0 is a run-time argument."""

    op: KernelOp
    family: Family
    dtype: DType
    kv_dtype: DType
    head_dim: int
    head_dim_v: int
    layout: Layout
    mask: Mask
    tile: Tile

    def __post_init__(self) -> None:
        for field, kind in _WORDS.items():
            object.__setattr__(self, field, word(kind, f"spec.{field}", getattr(self, field)))
        _natural("spec.head_dim", self.head_dim)
        _natural("spec.head_dim_v", self.head_dim_v)
        if not isinstance(self.tile, Tile):
            raise InvalidArgument("spec.tile", "must be a Tile", repr(self.tile))
        if len(self.name) > NAME_LIMIT:
            raise InvalidArgument("spec", f"its name must have at most {NAME_LIMIT} characters", self.name)

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return self.tile.warps * WARP_THREADS

    @cached_property
    def name(self) -> str:
        """File stem, symbol, build target, manifest key and test id in one."""
        return (
            f"pa_{self.op}_{self.family}_{self.dtype}_kv{self.kv_dtype}_d{self.head_dim}v{self.head_dim_v}"
            f"_{self.layout}_{self.mask}_{self.tile}"
        )

    @classmethod
    def parse(cls, name: str) -> InstanceSpec:
        """The spec whose name is `name`; raises InvalidArgument when there is none."""
        return _parse(name)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one block in bytes."""
        return _SMEM.get(self.family, _query_and_stages)(self)


def _stages(spec: InstanceSpec) -> int:
    return spec.tile.stages * spec.tile.n * (spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize


def _query_and_stages(spec: InstanceSpec) -> int:
    """The Q tile, which O reuses, and every stage of the K and V tiles."""
    return spec.tile.m * max(spec.head_dim, spec.head_dim_v) * spec.dtype.itemsize + _stages(spec)


def _query_stages_and_scores(spec: InstanceSpec) -> int:
    """The Q tile, every stage of the K and V tiles, and a tile of the mask, fp32 at the widest, or of probabilities.

    Probabilities are there where warps trade them: eight, of which two share their rows.
    """
    tile = spec.tile
    traded = spec.dtype.itemsize if tile.warps > 4 else 0
    return _query_and_stages(spec) + tile.m * tile.n * (4 if spec.mask is Mask.TENSOR else traded)


def _stages_and_stats(spec: InstanceSpec) -> int:
    """Every stage of K and V with a word a warp's stage, (maximum, sum) of each warp's rows, 848 B about shares."""
    tile = spec.tile
    return _stages(spec) + 4 * tile.warps * tile.stages + 8 * tile.warps * tile.m + 848


def _query_stages_and_barriers(spec: InstanceSpec) -> int:
    """The Q tile with two barriers for each 64 rows, every stage of K and of V with its barriers and its word of holes,
    two slots of the work list with a word of lost ones, a word that a block may send to another."""
    queries = spec.tile.m * spec.head_dim * spec.dtype.itemsize
    return queries + _stages(spec) + 36 * spec.tile.stages + spec.tile.m // 64 * 16 + 220


def _query_and_tile_or_state(spec: InstanceSpec) -> int:
    """The query rows and one tile, which keys and values take turns in, or the final state of a block."""
    head_dim = max(spec.head_dim, spec.head_dim_v)
    return max((spec.tile.m + spec.tile.n) * head_dim * spec.dtype.itemsize, spec.tile.m * (head_dim + 2) * 4)


def _query_slices_and_room(spec: InstanceSpec) -> int:
    """The Q tile, which O reuses, and two slices of K or V, of 8 KiB or 16 keys; where a block has more, P."""
    row = max(spec.head_dim, spec.head_dim_v) * spec.dtype.itemsize
    block, piece = spec.tile.n * row, max(8192, 16 * row)
    room = spec.tile.m * spec.tile.n * spec.dtype.itemsize if block > piece else 0
    return spec.tile.m * row + 2 * min(block, piece) + room


_SMEM: dict[Family, Callable[[InstanceSpec], int]] = {
    Family.DECODE: _stages_and_stats,
    Family.FLASH_SM80: _query_stages_and_scores,
    Family.FLASH_SM90: _query_stages_and_barriers,
    Family.MEA: _query_slices_and_room,
    Family.MEA_DECODE: _query_and_tile_or_state,
}

_WORDS: dict[str, type[Word]] = {
    "op": KernelOp,
    "family": Family,
    "dtype": DType,
    "kv_dtype": DType,
    "layout": Layout,
    "mask": Mask,
}


def _any_of(kind: type[Word]) -> str:
    return "|".join(sorted(kind, key=lambda member: (-len(member), member)))


_NUMBER = "0|[1-9][0-9]*"
_NAME = re.compile(
    f"pa_(?P<op>{_any_of(KernelOp)})_(?P<family>{_any_of(Family)})"
    f"_(?P<dtype>{_any_of(DType)})_kv(?P<kv_dtype>{_any_of(DType)})"
    f"_d(?P<head_dim>{_NUMBER})v(?P<head_dim_v>{_NUMBER})"
    f"_(?P<layout>{_any_of(Layout)})_(?P<mask>{_any_of(Mask)})"
    f"_m(?P<m>{_NUMBER})n(?P<n>{_NUMBER})s(?P<stages>{_NUMBER})w(?P<warps>{_NUMBER})(?:c(?P<cluster>[2-9]))?"
)


@lru_cache(maxsize=4096)
def _parse(name: str) -> InstanceSpec:
    match = _NAME.fullmatch(name)
    if match is None:
        rule = "must be pa_<op>_<family>_<dtype>_kv<dtype>_d<D>v<Dv>_<layout>_<mask>_m<M>n<N>s<S>w<W>[c<C>]"
        raise InvalidArgument("instance name", rule, repr(name))
    part = match.groupdict()
    return InstanceSpec(
        op=KernelOp(part["op"]),
        family=Family(part["family"]),
        dtype=DType(part["dtype"]),
        kv_dtype=DType(part["kv_dtype"]),
        head_dim=int(part["head_dim"]),
        head_dim_v=int(part["head_dim_v"]),
        layout=Layout(part["layout"]),
        mask=Mask(part["mask"]),
        tile=Tile(int(part["m"]), int(part["n"]), int(part["stages"]), int(part["warps"]), int(part["cluster"] or 1)),
    )
