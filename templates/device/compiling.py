"""Turns a kernel object and its argument record into a cubin; the host code that the DSL makes with it is left behind.

Products launch kernels by themselves (generator/launch.c), so what a template compiles is device code alone.
"""

import tempfile
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

TYPES = {"Q": Int64, "q": Int64, "i": Int32, "f": Float32}


def arguments_of(record):
    """A named tuple of zeros with the fields of a `pa_ops.arguments.Record`, in the types that kernels read."""
    fields = [(name, TYPES[letter]) for name, letter in record.fields]
    return NamedTuple("Arguments", fields)(*(kind(0) for _, kind in fields))


def compile_cubin(kernel, record, arch, smem):
    """The cubin of `kernel` for `arch` (sm_80, sm_90a, ...), which a launch will give `smem` bytes; no GPU needed."""
    if kernel.smem_bytes != smem:
        raise ValueError(f"the kernel needs {kernel.smem_bytes} B of shared memory, its spec says {smem} B")
    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch {arch} --keep-cubin --dump-dir {folder}"
        return cute.compile(kernel, arguments_of(record), options=options).artifacts.CUBIN
