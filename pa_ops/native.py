"""Turns the programs of a process into kernels that PyTorch's dispatcher calls, so that a steady call enters no Python.

generator/operators.c has the kernels, in every product; here they are told what an operator's arguments are, which
functions of PyTorch and Python to use, and which program serves a kind of call. PyTorch has the interface since 2.10;
where it, or the GIL, is missing, and for whatever the kernels leave to them, the Python implementations serve.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from pa_ops import scratch
from pa_ops.calls import KEPT, SIZED, STEADY, TENSORS, Plan
from pa_ops.environment import KEYS, RAW, settings_of
from pa_ops.overrides import BLOCKS
from pa_ops.program import DTYPES
from pa_ops.registry import for_device
from pa_ops.schema import NAMESPACE, SCHEMAS, base_of
from pa_ops.trace import SINKS

# As in operators.c: the version of PyTorch's interface, and the rows of its tables.
ABI = 2 << 56 | 10 << 48
ARGUMENTS, RESULTS, DTYPE_ROWS = 32, 2, 8
# In the order of host.h.
TORCH = (
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_string_length",
    "torch_string_c_str",
    "torch_delete_string",
    "torch_call_dispatcher",
    "aoti_torch_grad_mode_is_enabled",
)
TORCH_CPU, TORCH_CUDA, C10, STDCXX = "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libstdc++.so.6"
# Of c10::TensorImpl, beyond the interface: requires_grad, without which calls in grad mode are left to Python, and
# incref_pyobject, which PyTorch has since tensors hold their Python objects.
MEMBERS = ("_ZNK3c1010TensorImpl13requires_gradEv", "_ZNK3c1010TensorImpl15incref_pyobjectEv")
STREAM = "aoti_torch_get_current_cuda_stream"
# at::detail::empty_strided_cuda(IntArrayRef, IntArrayRef, ScalarType, optional<Device>), called as x86-64 passes these.
EMPTY = "_ZN2at6detail18empty_strided_cudaEN3c108ArrayRefIlEES3_NS1_10ScalarTypeESt8optionalINS1_6DeviceEE"
CALLED_AS = "x86_64"
PYTHON = (
    "PyGILState_Ensure",
    "PyGILState_Release",
    "PyDict_GetItemWithError",
    "PyContextVar_Get",
    "PyList_GetItem",
    "PyList_Size",
    "PyObject_CallOneArg",
    "PyObject_CallNoArgs",
    "Py_DecRef",
    "PyErr_Clear",
)
CXX = (
    "_Znwm",  # operator new, and delete
    "_ZdlPv",
    "__cxa_allocate_exception",
    "__cxa_throw",
    "_ZNSt13runtime_errorC1EPKc",
    "_ZNSt13runtime_errorD1Ev",
    "_ZNKSt13runtime_error4whatEv",
    "_ZTISt13runtime_error",
    "_ZTVN10__cxxabiv120__si_class_type_infoE",
)
REGISTER = ("aoti_torch_library_init_impl", "torch_library_impl")


class Argument(IntEnum):
    """What an argument is to a kernel."""

    TENSOR = 0
    MAYBE_TENSOR = 1
    NUMBER = 2
    MAYBE_NUMBER = 3
    BOUND = 4  # an int or None, of which the power of two matters
    TEXT = 5


_TYPES = {
    "Tensor": Argument.TENSOR,
    "Optional[Tensor]": Argument.MAYBE_TENSOR,
    "bool": Argument.NUMBER,
    "int": Argument.NUMBER,
    "float": Argument.NUMBER,
    "Optional[float]": Argument.MAYBE_NUMBER,
    "Optional[int]": Argument.BOUND,
    "str": Argument.TEXT,
}

Implementations = Mapping[str, Callable[..., Any]]
Values = tuple[object, ...]


class Kernels:
    """The kernels of one library, serving `key` in `namespace`; for good, for PyTorch forgets no such kernel.

    stream, empty: the addresses of the functions that tell a device's stream and make a tensor of it, 0 for the
    interface's own.
    """

    def __init__(
        self, library: Path, python: Implementations, namespace: str, key: str, stream: int, empty: int = 0
    ) -> None:
        self._library = ctypes.PyDLL(str(library))
        self._library.pa_operator.restype = ctypes.c_void_p
        self._raised = threading.local()
        self._kept: list[Plan] = []
        self._keeping = threading.Lock()
        self._tokens: dict[object, int] = {}
        self._watched: Values = ()
        self._held: list[object] = [self._raise]
        others = (*_addresses(None, PYTHON), *_addresses(STDCXX, CXX))
        members = (_optional(C10, name) for name in MEMBERS)
        addresses = (*_addresses(TORCH_CPU, TORCH), stream, *members, empty, *others)
        tables = (ctypes.c_void_p * len(addresses))(*addresses), _words(*_dtype_numbers())
        objects = ctypes.py_object(SINKS), ctypes.py_object(self._held[0])
        _check(self._library.pa_attach(ctypes.c_int64(len(addresses)), *tables, *objects))
        twins: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        self._held.append(twins)
        torch_, handle = _loaded(TORCH_CPU), ctypes.c_void_p()
        where = namespace.encode(), key.encode(), b"pa_ops", ctypes.c_uint32(0)
        _check(torch_.aoti_torch_library_init_impl(*where, ctypes.byref(handle)))
        for index, op in enumerate(STEADY):
            twins.define(f"_{op}{SCHEMAS[op]}")
            twins.impl(f"_{op}", self._twin(op, python[op]), key)
            kernel = ctypes.c_void_p(self._kernel(index, op, namespace))
            _check(torch_.torch_library_impl(handle, op.encode(), kernel, ctypes.c_uint64(ABI)))

    def keep(self, plan: Plan) -> None:
        """Keeps a plan for the kind of call that a kernel has left to Python, if it has and no other is being kept."""
        if len(self._kept) < KEPT and self._keeping.acquire(blocking=False):
            try:
                self._keep(plan)
            finally:
                self._keeping.release()

    def _keep(self, plan: Plan) -> None:
        values = tuple(map(RAW.get, KEYS))
        now = settings_of(values)
        if plan.program is None or now != plan.settings or now.checked or now.debug:
            return
        blocks = tuple(variable.get() for variable in BLOCKS)
        self._watch((*values, *blocks), self._tokens.setdefault((now, blocks), len(self._tokens)))
        for (device, stream), tensor in scratch.held.items():
            place = ctypes.c_void_p(stream), ctypes.c_void_p(tensor.data_ptr())
            self._library.pa_lend(ctypes.c_int64(device), *place, ctypes.c_int64(tensor.numel()))
        if self._library.pa_keep(ctypes.c_void_p(plan.program.address), ctypes.py_object(plan.decisions)):
            self._kept.append(plan)

    def _watch(self, values: Values, token: int) -> None:
        """Lets kernels run what is kept from now on, as long as overrides and environment are these very objects."""
        if len(values) == len(self._watched) and all(map(lambda a, b: a is b, values, self._watched)):
            return
        owners = [(0, id(RAW), id(key)) for key in KEYS] + [(1, id(variable), 0) for variable in BLOCKS]
        words = [word for owner, value in zip(owners, values, strict=True) for word in (*owner, _address(value))]
        self._library.pa_watch(ctypes.c_int64(token), ctypes.c_int64(len(values)), _words(*words))
        self._watched = values

    def _kernel(self, index: int, op: str, namespace: str) -> int:
        name, _, overload = op.partition(".")
        texts = [f"{namespace}::_{name}".encode(), overload.encode()]
        self._held += texts
        kernel: int = self._library.pa_operator(*texts, _words(index, *_description(op)))
        return kernel

    def _twin(self, op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The Python implementation as kernels call it: an error waits here while C++ unwinds, see `_raise`.

        It returns new tensors all the same: autograd leaves its mark on what an operator returns.
        """
        results = SCHEMAS[op].rpartition(" -> ")[2].count("Tensor")

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except BaseException as error:
                self._raised.error = error
                self._library.pa_raise()
                nothing = torch.empty(0)
                return (None, nothing, (nothing, nothing))[results]

        return call

    def _raise(self) -> None:
        raise vars(self._raised).pop("error", None) or RuntimeError("PyTorch could not call pa_ops' Python")


def _description(op: str) -> Iterator[int]:
    """The words of `Operator` in operators.c that follow its index."""
    schema = torch._C.parse_schema(f"{NAMESPACE}::{op}{SCHEMAS[op]}")
    names = [argument.name for argument in schema.arguments]
    places = {name: place for place, name in enumerate(TENSORS[base_of(op)])}
    made = [places[result.name] for result in schema.returns]
    yield from (len(names), len(places), *(places[names[place]] for place in SIZED[base_of(op)]))
    yield from (places.get("workspace", -1), len(made), *made, *[0] * (RESULTS - len(made)))
    for argument in schema.arguments:
        yield from (_TYPES[str(argument.type)], places.get(argument.name, -1))
    yield from [0, 0] * (ARGUMENTS - len(names))


def _dtype_numbers() -> Iterator[int]:
    """The table `dtypes` of operators.c."""
    for dtype, (code, bits) in DTYPES.items():
        number = getattr(_loaded(TORCH_CPU), "aoti_torch_dtype_" + str(dtype).removeprefix("torch."))
        yield from (code << 8 | bits, number())
    yield from [-1, -1] * (DTYPE_ROWS - len(DTYPES))


def _optional(library: str, name: str) -> int:
    """Where a function is that some versions of PyTorch have, or 0."""
    return next(_addresses(library, [name])) if _has(library, name) else 0


def _addresses(library: str | None, names: Sequence[str]) -> Iterator[int]:
    """Where the functions of a loaded library are, or of Python."""
    loaded = ctypes.pythonapi if library is None else _loaded(library)
    for name in names:
        yield ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0


def _loaded(library: str) -> ctypes.CDLL:
    """A library that this process has loaded; raises OSError where it has not."""
    return ctypes.CDLL(library, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)


def _has(library: str, *names: str) -> bool:
    """Whether a library is loaded and has these functions."""
    try:
        return all(hasattr(_loaded(library), name) for name in names)
    except OSError:
        return False


def _words(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _address(value: object) -> int:
    return 0 if value is None else id(value)


def _check(failed: int) -> None:
    if failed:
        raise RuntimeError("PyTorch or the product refuses pa_ops' kernels: build the product again")


_kernels: Kernels | None = None
_attaching = threading.Lock()


def attach(device: int, python: Implementations) -> None:
    """Lets the kernels of the first library that a device has loaded serve CUDA tensors, where they can."""
    global _kernels
    with _attaching:
        library = for_device(device).library()
        if _kernels is None and library is not None and able(library) and _has(TORCH_CUDA, STREAM):
            stream = next(_addresses(TORCH_CUDA, [STREAM]))
            empty = _optional(TORCH_CUDA, EMPTY) if platform.machine() == CALLED_AS else 0
            _kernels = Kernels(library, python, NAMESPACE, "CUDA", stream, empty)


def attached() -> bool:
    """Whether kernels serve CUDA tensors."""
    return _kernels is not None


def able(library: Path) -> bool:
    """Whether this PyTorch, this Python and a product have what the kernels need."""
    with_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    interface = _has(TORCH_CPU, *TORCH, *REGISTER) and _has(STDCXX, *CXX)
    return with_gil and interface and _has(str(library), "pa_attach")


def keep(plan: Plan) -> None:
    """Keeps a plan that has just served a call, for the kernels that are attached."""
    if _kernels is not None:
        _kernels.keep(plan)
