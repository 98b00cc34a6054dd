"""Turns a program's words and a call's tensors into the launches that generator/program.c makes of them, in Python."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pa_ops.arguments import MAP_BYTES, Record
from pa_ops.checks import INT32_MAX
from pa_ops.plan import attention_tiles
from pa_ops.program import DTYPES, DimRule, GridRule

MAX_BLOCKS = 65535
MAP = struct.Struct("<12q32x")  # address, four sizes, three strides; three extents of a box, element type


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's address, its argument record, blocks of the grid."""

    kernel: int
    record: bytes
    x: int
    y: int


class Map(NamedTuple):
    """A tensor map as the stand-in driver of tests/helpers/stand_in.c keeps it: nothing is encoded."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    dtype: int

    @classmethod
    def of(cls, data: bytes) -> Map:
        """The map of these bytes."""
        address, *extents, dtype = MAP.unpack(data)
        return cls(address, tuple(extents[:4]), tuple(extents[4:7]), tuple(extents[7:]), dtype)

    @property
    def data(self) -> bytes:
        """The bytes of the map."""
        return MAP.pack(self.address, *self.sizes, *self.strides, *self.box, self.dtype)


def maps_of(record: Record, data: bytes) -> dict[str, Map]:
    """The tensor maps of a launch by name."""
    return {name: Map.of(data[record.offsets[name] :][:MAP_BYTES]) for name in record.maps}


class Words:
    """The 64-bit words at an address, one after another."""

    def __init__(self, address: int) -> None:
        self.address = address

    def take(self, count: int) -> tuple[int, ...]:
        words = (ctypes.c_int64 * count).from_address(self.address)
        self.address += 8 * count
        return tuple(words)

    def one(self) -> int:
        return self.take(1)[0]


def _dim_fits(words: Words, sizes: dict[int, int], size: int) -> bool:
    rule, name, value = words.take(3)
    if rule == DimRule.CONSTANT:
        return size == value
    if name not in sizes:
        sizes[name] = size - value
        return size >= value
    return size == sizes[name] + value if rule == DimRule.EQUAL else size >= sizes[name]


def _strides_fit(tensor: Tensor, flags: int) -> bool:
    aligned, written = bool(flags & 1), bool(flags & 2)
    if aligned and tensor.data_ptr() % 16:
        return False
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        last = axis == tensor.dim() - 1
        if size < 2:
            continue
        if (last and stride != 1) or (not last and aligned and stride * tensor.element_size() % 16):
            return False
        if written and stride == 0:
            return False
    return True


def _tensor_fits(words: Words, sizes: dict[int, int], tensor: Tensor | None) -> bool:
    present, dtype, dimensions, flags = words.take(4)
    if present != (tensor is not None):
        return False
    if tensor is None:
        return True
    if tensor.device.type == "meta" or tensor.requires_grad:
        raise BufferError("what has no memory, or a gradient, is not handed over")
    if tensor.dtype not in DTYPES:
        return False
    code, bits = DTYPES[tensor.dtype]
    if dtype != code << 8 | bits or tensor.dim() != dimensions:
        return False
    return all(_dim_fits(words, sizes, size) for size in tensor.shape) and _strides_fit(tensor, flags)


def _value(words: Words, tensors: tuple[Tensor | None, ...]) -> int:
    source, place, times, plus = words.take(4)
    if source == 3:
        return plus
    tensor = tensors[place >> 8]
    assert tensor is not None
    if source == 0:
        return tensor.data_ptr() + plus
    return (tensor.stride() if source == 1 else tensor.shape)[place & 0xFF] * times + plus


def _map(words: Words, tensors: tuple[Tensor | None, ...]) -> Map:
    *box, dtype = words.take(4)
    address, *sizes = (_value(words, tensors) for _ in range(5))
    strides = [_value(words, tensors) for _ in range(3)]
    steps = tuple(stride if size > 1 else 16 for size, stride in zip(sizes[1:], strides, strict=True))
    assert tensors[0] is not None
    return Map(address or tensors[0].data_ptr(), tuple(max(size, 1) for size in sizes), steps, tuple(box), dtype)


def _patch(words: Words, record: bytearray, tensors: tuple[Tensor | None, ...]) -> None:
    offset, width = words.take(2)
    if width == MAP_BYTES:
        record[offset : offset + width] = _map(words, tensors).data
        return
    value = _value(words, tensors)
    struct.pack_into("<i" if width == 4 else "<q", record, offset, min(value, INT32_MAX) if width == 4 else value)


def grid_of(rule: int, a: int, b: int, c: int, d: int, tokens: int, sequences: int) -> tuple[int, int]:
    """Blocks of a launch."""
    if rule == GridRule.TILES:
        return attention_tiles(tokens, sequences, a, None if b < 0 else b) * d, c // d
    if rule == GridRule.TOKENS:
        x = min(tokens, MAX_BLOCKS)
        return x, max(min(a, b // max(x, 1)), 1)
    return (a, b) if rule == GridRule.FIXED else (min(-(-tokens * a // b), MAX_BLOCKS), 1)


def run(address: int, *tensors: Tensor | None) -> int | list[Launched]:
    """0 where the call does not fit, 2 where it has no rows, else its launches."""
    words, sizes = Words(address), dict[int, int]()
    count, steps, _ = words.take(3)
    assert count == len(tensors), "a program is called with the tensors that it was made for"
    if not all(_tensor_fits(words, sizes, tensor) for tensor in tensors):
        return 0
    if sizes.get(0, 0) == 0 or sizes.get(1) == 0:
        return 2
    made = []
    for _ in range(steps):
        kernel, size, patches, *grid = words.take(8)
        padded = -(-size // 8)
        record = bytearray(struct.pack(f"<{padded}q", *words.take(padded))[:size])
        for _ in range(patches):
            _patch(words, record, tensors)
        made.append(Launched(kernel, bytes(record), *grid_of(*grid, sizes[0], sizes.get(1, 0))))
    return made
