"""Turns a cubin into the compiler's facts: kernel, code target, registers, stack frame, argument and code size.

A cubin is an ELF image of machine EM_CUDA; facts are read from the very bytes that ship. The attribute numbers are
those that NVIDIA's own cuobjdump prints by name. A frame is what a thread keeps in local memory: registers that were
spilled and arrays that are indexed at run time look alike in it, so a kernel without such arrays spills exactly its
frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ELF_MAGIC = b"\x7fELF"
_EM_CUDA = 190
_NEWER_ABI = 8  # from this ABI version on, flags hold the SM as a number in bits 8-23
_ACCELERATED = 0x800
_SUFFIXES = {0x0A: "a"}  # by bits 0-7 of the newer flags; other values say nothing: nvcc 13.0 writes 4 for 80 and 90a
_INFO_SECTION = ".nv.info"
_KERNEL_SECTION = ".nv.info."  # the kernel's symbol follows
_FORMAT_SIZED = 4  # attribute formats below it carry their value in the two bytes that hold the size here
_ARGUMENT_BYTES = 0x19
_FRAME_SIZE = 0x11
_REGISTERS = 0x2F
_NO_BITS = 8  # section type of .nv.shared.*
_SHARED_SECTION = ".nv.shared."
_SYSTEM_SHARED = ".nv.shared.reserved."  # the system's own share, not counted against a block's limit


@dataclass(frozen=True)
class KernelFacts:
    """What the compiler made of a kernel.

    entry: its symbol. registers a thread, frame_bytes of local memory a thread, static_smem_bytes a block,
    argument_bytes of a launch, image_bytes of the cubin.
    """

    entry: str
    target: str
    registers: int
    frame_bytes: int
    static_smem_bytes: int
    argument_bytes: int
    image_bytes: int


def is_code_for(made: str, target: str) -> bool:
    """Whether an image that says `made` can be the code of `target`: an image need not tell its suffix."""
    return made in (target, target.rstrip("af"))


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int


def _target(flags: int, abi: int) -> str:
    if abi >= _NEWER_ABI:
        return f"sm_{flags >> 8 & 0xFFFF}{_SUFFIXES.get(flags & 0xFF, '')}"
    return f"sm_{flags & 0xFF}{'a' if flags & _ACCELERATED else ''}"


def _sections(data: bytes, start: int) -> tuple[list[_Section], int]:
    """The sections of the image at `start`, and its length in bytes."""
    (table,) = struct.unpack_from("<Q", data, start + 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, start + 58)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, start + table + i * entry_size) for i in range(count)]
    names = start + rows[names_index][4]
    sections = []
    for row in rows:
        begin = names + row[0]
        name = data[begin : data.index(b"\0", begin)].decode()
        sections.append(_Section(name, row[1], start + row[4], row[5]))
    (segments,) = struct.unpack_from("<Q", data, start + 32)
    segment_size, segment_count = struct.unpack_from("<HH", data, start + 54)
    ends = [section.offset - start + section.size for section in sections if section.kind != _NO_BITS]
    return sections, max([table + count * entry_size, segments + segment_count * segment_size, *ends])


def _attributes(data: bytes, section: _Section) -> Iterator[tuple[int, int]]:
    """(attribute, value) of each entry of a .nv.info section; of a sized one the second word, after the function."""
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form != _FORMAT_SIZED:
            yield attribute, size
            continue
        if size >= 8:
            yield attribute, struct.unpack_from("<I", data, at + 4)[0]
        at += size


def _read(data: bytes, start: int) -> KernelFacts:
    abi = data[start + 8]
    (flags,) = struct.unpack_from("<I", data, start + 48)
    sections, length = _sections(data, start)
    values: dict[int, int] = {}
    kernels = []
    for section in sections:
        if section.name.startswith(_KERNEL_SECTION):
            kernels.append(section.name.removeprefix(_KERNEL_SECTION))
        if section.name.startswith(_INFO_SECTION):
            for attribute, value in _attributes(data, section):
                values[attribute] = max(value, values.get(attribute, 0))
    if _REGISTERS not in values or len(kernels) != 1:
        raise ValueError(f"the image must hold one kernel and its register count, it holds {kernels or 'none'}")
    shared = [s for s in sections if s.name.startswith(_SHARED_SECTION) and not s.name.startswith(_SYSTEM_SHARED)]
    smem = max((section.size for section in shared), default=0)
    return KernelFacts(
        entry=kernels[0],
        target=_target(flags, abi),
        registers=values[_REGISTERS],
        frame_bytes=values.get(_FRAME_SIZE, 0),
        static_smem_bytes=smem,
        argument_bytes=values.get(_ARGUMENT_BYTES, 0),
        image_bytes=length,
    )


def read_facts(data: bytes) -> tuple[KernelFacts, ...]:
    """The facts of every cubin inside `data`, a cubin or a library; raises ValueError when there is none."""
    found = []
    at = data.find(_ELF_MAGIC)
    while at >= 0:
        if struct.unpack_from("<H", data, at + 18)[0] == _EM_CUDA:
            found.append(_read(data, at))
        at = data.find(_ELF_MAGIC, at + 4)
    if not found:
        raise ValueError("no device code found: there is no uncompressed cubin in it")
    return tuple(found)
