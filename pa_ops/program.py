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

from pa_ops.arguments import ADDRESS, INT32, INT64, Record
from pa_ops.checks import Rule, parse_dim

DTYPES = {  # DLPack's code and bits
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}
FREE_DIMS = ("T", "B", "max_pages", "pages", "total_k", "max_position")  # may differ from call to call
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


Source = Address | Stride | Size | int | float
"""Where a field comes from: a tensor of the call, or now."""


class GridRule(IntEnum):
    """How the blocks of a launch follow from tokens and sequences."""

    TILES = 0  # tiles of `a` query rows, at most `b` rows a sequence (-1: unknown), for each of `c` heads
    TOKENS = 1  # a block a token, and up to `a` slices of a token while there are fewer than `b` blocks
    ROWS = 2  # `a` rows a token, `b` a block
    FIXED = 3  # `a` by `b` blocks


class Grid(NamedTuple):
    """A rule and its numbers."""

    rule: GridRule
    a: int = 0
    b: int = 0
    c: int = 0


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
    data = record.pack({name: 0 if isinstance(source, tuple) else source for name, source in sources.items()})
    padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
    patches = [
        (record.offsets[name], WIDTHS[letter], *_patch(source, places))
        for name, letter in record.fields
        if isinstance(source := sources[name], tuple)
    ]
    yield from (launch.kernel, len(data), len(patches), *launch.grid)
    yield from struct.unpack(f"<{len(padded) // 8}q", padded)
    for patch in patches:
        yield from patch


def _patch(source: Address | Stride | Size, places: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Source, place, times, plus."""
    tensor = places[source.tensor] << 8
    if isinstance(source, Address):
        return 0, tensor, 1, source.plus
    if isinstance(source, Stride):
        return 1, tensor | source.axis, source.times, 0
    return 2, tensor | source.axis, source.times, source.plus
