"""Turns CPU tensors and a stand-in driver into the CUDA operators, in a namespace where nothing else serves them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

import pa_ops
from pa_ops import cuda, native, registry, scratch, steps
from pa_ops.schema import SCHEMAS

NAMESPACE = "twin"
LIBRARY = "libcuda.so.1"
SM90 = pa_ops.Capability.of_sm(90)
# at::detail::empty_strided_cpu(IntArrayRef, IntArrayRef, ScalarType, bool): the flag, of pinned memory, lies where the
# device's type is passed to the one for CUDA, and the type of CPUs is 0.
EMPTY = "_ZN2at6detail17empty_strided_cpuEN3c108ArrayRefIlEES3_NS1_10ScalarTypeEb"
WORDS = scratch.workspace_words(SM90.num_sms)

held: list[torch.library.Library] = []  # PyTorch takes an operator back with what has defined it


def compiled(folder: Path, *options: str) -> Path:
    """A folder with the driver, for LD_LIBRARY_PATH; `-DQUIET` is one that does nothing."""
    command = ["gcc", "-O2", "-shared", "-fPIC", "-w", f"-Wl,-soname,{LIBRARY}", *options]
    subprocess.run([*command, Path(__file__).with_suffix(".c"), "-o", folder / LIBRARY], check=True)
    return folder


def current_stream() -> ctypes.c_void_p:
    """The handle of the current stream, to be set."""
    return ctypes.c_void_p.in_dll(ctypes.CDLL(LIBRARY), "stand_in_current_stream")


def serve(home: str, implementations: native.Implementations = cuda.IMPLEMENTATIONS, *, directly: bool = True) -> None:
    """Attaches the kernels of a home's product, with these operators for whatever they leave to Python.

    directly: results are made by PyTorch's own function, as on GPUs, not by its interface's.
    """
    os.environ["PA_OPS_HOME"] = home
    registry.capability_of = lambda index: SM90
    mask = torch.zeros(1, dtype=torch.int32)
    steps.mask_of = lambda device: mask
    stream = current_stream()

    def workspace(out: Tensor) -> Tensor:
        return scratch.held.setdefault((0, stream.value or 0), torch.zeros(WORDS, dtype=torch.int32))

    scratch.workspace_for = workspace
    torch.cuda.is_current_stream_capturing = lambda: False
    held.append(torch.library.Library(NAMESPACE, "DEF"))
    for op, schema in SCHEMAS.items():
        held[0].define(op + schema)
    kernels = registry.for_device(0)
    kernels.kernel(kernels.entries[0])
    path = kernels.library()
    assert path is not None and native.able(path), "this PyTorch has the interface, and the product has kernels"
    told = ctypes.cast(ctypes.CDLL(LIBRARY).stand_in_stream, ctypes.c_void_p).value
    assert told
    empty = native._optional(native.TORCH_CPU, EMPTY) if directly else 0
    assert bool(empty) is directly
    native._kernels = native.Kernels(path, implementations, NAMESPACE, "CPU", told, empty)
