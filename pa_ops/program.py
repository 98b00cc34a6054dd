"""Turns the launches that serve a call, fields given by where they come from, into the words of a program.

generator/program.c runs it: it compares the tensors of a later call with what the program was made for, fills in
addresses, strides and sizes, and launches. So a call costs the host one comparison in C, and a program serves every
number of tokens and sequences of its kind. The words are 64-bit integers in the order that program.c reads.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from pa_ops.arguments import ADDRESS, INT32, INT64, MAP_BYTES, Record
from pa_ops.checks import Rule, parse_dim

DTYPES = {  # DLPack's code and bits
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.uint8: (1, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}
FREE_DIMS = ("T", "B", "max_pages", "pages", "total_k", "max_position", "Sq", "total")  # may differ from call to call
MAP_DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
WIDTHS = {ADDRESS: 8, INT64: 8, INT32: 4}

# The handle of a device's current stream, in a tenth of the time that a torch.cuda.Stream takes to be made.
stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class Address(NamedTuple):
    """Where a tensor begins, and bytes beyond."""

    tensor: str
    plus: int = 0


class Stride(NamedTuple):
    """The stride of an axis in units of 1 / `times`: in bytes where `times` is the size of an element."""

    tensor: str
    axis: int
    times: int


class Size(NamedTuple):
    """The size of an axis, `times` and `plus` something; at most the largest of its field."""

    tensor: str
    axis: int
    times: int = 1
    plus: int = 0


Value = Address | Stride | Size | int
"""An integer of a later call: from one of its tensors, or now."""


class TensorMap(NamedTuple):
    """What the copy engine is told of four-dimensional half-precision rows, innermost first.

    sizes: elements of a row, then three extents, of rows, heads and pages of keys, of heads, tokens and sequences of
    queries; strides: bytes from one to the next in each of these. One copy brings `box` of elements, 64 or 32, swizzled
    over their bytes, and of the first two extents.
    """

    address: Value
    sizes: tuple[Value, Value, Value, Value]
    strides: tuple[Value, Value, Value]
    box: tuple[int, int, int]
    dtype: torch.dtype


Source = Value | float | TensorMap
"""Where a field comes from: a tensor of the call, or now."""


class GridRule(IntEnum):
    """How the blocks of a launch follow from tokens and sequences."""

    TILES = 0  # tiles of `a` query rows, at most `b` rows a sequence (-1: unknown), each of `c` heads, `d` at a time
    TOKENS = 1  # a block a token, and up to `a` slices of a token while there are fewer than `b` blocks
    ROWS = 2  # `a` rows a token, `b` a block
    FIXED = 3  # `a` by `b` blocks


class Grid(NamedTuple):
    """A rule and its numbers."""

    rule: GridRule
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 1


@dataclass(frozen=True)
class Launch:
    """One kernel, by the address that its library tells, with the source of every field of its record."""

    kernel: int
    record: Record
    sources: Mapping[str, Source]
    grid: Grid


@dataclass(frozen=True)
class Guard:
    """What one tensor of a call must be: its rule of `pa_ops.checks`, the tensor that the program is made with.

    aligned: its rows must start at multiples of 16 bytes.
    """

    rule: Rule
    tensor: Tensor | None
    aligned: bool


class Program:
    """The words of a program, held where C reads them."""

    def __init__(self, device: int, guards: Sequence[Guard], launches: Sequence[Launch]) -> None:
        places = {guard.rule.argument: place for place, guard in enumerate(guards)}
        words = [len(guards), len(launches), device]
        names: dict[str, int] = {name: number for number, name in enumerate(FREE_DIMS)}
        for guard in guards:
            words += _guard_words(guard, names)
        for launch in launches:
            words += _launch_words(launch, places)
        self._memory = (ctypes.c_int64 * len(words))(*words)
        self.address = ctypes.addressof(self._memory)


class DimRule(IntEnum):
    """How a dimension is compared."""

    CONSTANT = 0
    EQUAL = 1
    AT_LEAST = 2


def _guard_words(guard: Guard, names: Mapping[str, int]) -> Iterator[int]:
    if guard.tensor is None:
        yield from (0, 0, 0, 0)
        return
    code, bits = DTYPES[guard.tensor.dtype]
    yield from (1, code << 8 | bits, guard.tensor.dim(), guard.aligned | guard.rule.written << 1)
    for dim, size in zip(guard.rule.dims.split(), guard.tensor.shape, strict=True):
        name, form = parse_dim(dim)
        if name in names and form != "|1":
            yield from (DimRule.AT_LEAST if form == ".." else DimRule.EQUAL, names[name], int(form == "+1"))
        else:
            yield from (DimRule.CONSTANT, 0, size)


def _launch_words(launch: Launch, places: Mapping[str, int]) -> Iterator[int]:
    record, sources = launch.record, launch.sources
    fixed = {name: 0 if isinstance(source, tuple) else source for name, source in sources.items()}
    data = record.pack({name: value for name, value in fixed.items() if name not in record.maps})
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    patches: list[tuple[int, ...]] = []
    for name, letter in record.fields:
        source = sources[name]
        if isinstance(source, (Address, Stride, Size)):
            patches.append((record.offsets[name], WIDTHS[letter], *_value_words(source, places)))
    for name in record.maps:
        source = sources[name]
        if not isinstance(source, TensorMap):
            raise ValueError(f"{name} must be a tensor map, not {source}")
        patches.append((record.offsets[name], MAP_BYTES, *_map_words(source, places)))
    yield from (launch.kernel, len(data), len(patches), *launch.grid)
    yield from struct.unpack(f"<{len(padded) // 8}q", padded)
    for patch in patches:
        yield from patch


def _map_words(source: TensorMap, places: Mapping[str, int]) -> Iterator[int]:
    yield from (*source.box, MAP_DTYPES[source.dtype])
    for value in (source.address, *source.sizes, *source.strides):
        yield from _value_words(value, places)


def _value_words(source: Value, places: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Source, place, times, plus."""
    if isinstance(source, int):
        return 3, 0, 0, source
    tensor = places[source.tensor] << 8
    if isinstance(source, Address):
        return 0, tensor, 1, source.plus
    if isinstance(source, Stride):
        return 1, tensor | source.axis, source.times, 0
    return 2, tensor | source.axis, source.times, source.plus
