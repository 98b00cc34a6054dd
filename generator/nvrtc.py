"""Turns CUDA C++ into a cubin, or PTX, through NVRTC by ctypes: no toolkit, no host compiler, no GPU.

NVRTC 12.9, from PyPI, compiles for every SM from 5.0 to 12.1; NVRTC 13 begins at 7.5. Compile workers import this
module, so it needs the standard library alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from .ptx import is_target

Program = ctypes.c_void_p


class NvrtcError(Exception):
    """NVRTC refused the source or its options; the text holds its log."""


def load(library: Path | str) -> ctypes.CDLL:
    """The shared library, which finds its builtins beside itself."""
    return ctypes.CDLL(str(library))


def version(library: Path | str) -> str:
    """NVRTC's own version: "12.9"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    load(library).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def sms(library: Path | str) -> frozenset[int]:
    """SM numbers that the library compiles for."""
    nvrtc, count = load(library), ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return frozenset(found)


def _log(nvrtc: ctypes.CDLL, program: Program) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def _options(target: str, include: Path) -> Sequence[str]:
    return (f"-arch={target.rstrip('af')}", "-std=c++17", "-default-device", f"-I{include}")


def compile_image(library: Path | str, source: Path, target: str, include: Path) -> bytes:
    """The code of `source` for `target`, headers found in `include`; raises NvrtcError.

    A cubin for sm_53, sm_90a, ...; for compute_53, ... PTX.
    """
    nvrtc = load(library)
    program = Program()
    text = source.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None)
    try:
        options = [option.encode() for option in _options(target, include)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status != 0:
            raise NvrtcError(f"NVRTC status {status} for {target}\n{_log(nvrtc, program)}")
        size = ctypes.c_size_t()
        kind = "PTX" if is_target(target) else "CUBIN"
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, image)
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
