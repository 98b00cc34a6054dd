"""Streams of the blocks of a sequence's keys, last block first: turn where keys lie into copies to shared memory.

Keys that lie one after another are found by two running addresses, keys on pages by the block table. Keys and values of
a block are copied at different times, each once.
"""

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device import pages
from pa_ops.templates.device.ptx import opaque
from pa_ops.templates.device.ptx_warp import pinned


class Dense(NamedTuple):
    """Where a thread's first chunk of a block goes, and where its next two come from."""

    target: Int32
    sources: Any  # Int64 registers: of keys, of values


class Paged(NamedTuple):
    """Where the pools of keys and values begin, the sequence, where blocks go, and the pages of one block."""

    bases: tuple
    sequence: Int32
    target: Int32
    pages: Any


class DenseKeys:
    """Blocks of keys that lie one after another; values lie `v_offset` bytes behind keys in shared memory."""

    def __init__(self, copies, v_offset):
        self.copies, self.v_offset = copies, v_offset

    def open(self, args, bases, sequence, blocks, s_k, tid, lane):
        """Stand before the last of so many blocks of keys and values from `bases` on, which go to `s_k`."""
        row, chunk = self.copies.place(tid)
        stream = Dense(pinned(self.copies.shape.address(s_k, row, chunk), lane), cute.make_rmem_tensor((2,), Int64))
        row = (blocks - 1) * self.copies.keys + row
        for i, base in enumerate(bases):
            stream.sources[i] = base + Int64(row) * self.strides(args)[i] + Int64(chunk * 16)
        return stream

    def strides(self, args):
        """Bytes from a key to the next, and from a value."""
        return args.k_token_stride, args.v_token_stride

    def look_up(self, args, stream, key_first, low, high, lane):
        """Nothing: these keys need no table."""

    def keys(self, args, stream, key_first, low, high, tid, whole=False):
        """Start copying the keys of the next block, from `key_first` on; zeros outside [low, high).

        `whole`: it has all of them, or none and is never read.
        """
        if whole and not self.copies.ranged:  # else it may begin with hidden ones
            self.whole(args, stream, 0, stream.target, key_first >= 0)
        else:
            self.partial(args, stream, 0, stream.target, key_first, low, high, tid)

    def values(self, args, stream, key_first, low, high, tid, whole=False):
        """The same with values; `whole`: the block has all of them."""
        target = stream.target + self.v_offset
        if whole:
            self.whole(args, stream, 1, target, True)
        else:
            self.partial(args, stream, 1, target, key_first, low, high, tid)

    def whole(self, args, stream, which, target, there):
        stride = self.strides(args)[which]
        self.copies.whole(target, stream.sources[which], stride, there)
        stream.sources[which] = stream.sources[which] - stride * self.copies.keys

    def partial(self, args, stream, which, target, key_first, low, high, tid):
        stride = self.strides(args)[which]
        self.copies.next(args, target, stream.sources[which], stride, key_first, low, high, opaque(tid))
        stream.sources[which] = stream.sources[which] - stride * self.copies.keys


class PagedKeys:
    """Blocks of keys on pages; the stream holds the pages of one block."""

    def __init__(self, copies, v_offset):
        self.copies, self.v_offset = copies, v_offset

    def open(self, args, bases, sequence, blocks, s_k, tid, lane):
        """A stream of blocks from pools at `bases`, each found by its first key, which go to `s_k`."""
        return Paged(bases, sequence, s_k, pages.page_registers(self.copies.keys))

    def look_up(self, args, stream, key_first, low, high, lane):
        """Take the pages of the block whose keys are copied next; those of the one before are needed no more."""
        pages.look_up(args, stream.pages, stream.sequence, key_first, low, high, lane)

    def keys(self, args, stream, key_first, low, high, tid, whole=False):
        """Start copying the keys of the block that was looked up; zeros for those on no page."""
        strides = args.k_page_stride, args.k_token_stride
        self.copies.found(args, stream.target, stream.bases[0], *strides, stream.pages, tid)

    def values(self, args, stream, key_first, low, high, tid, whole=False):
        """Start copying its values."""
        strides = args.v_page_stride, args.v_token_stride
        self.copies.found(args, stream.target + self.v_offset, stream.bases[1], *strides, stream.pages, tid)
