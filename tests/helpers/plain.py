"""Turns a device module into its names, run with Python's numbers for the DSL's."""

from __future__ import annotations

import ctypes
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

DEVICE = Path(__file__).parents[2] / "templates" / "device"


class Float32(float):
    """The nearest fp32."""

    inf = float("inf")

    def __new__(cls, value: float) -> Float32:
        return super().__new__(cls, ctypes.c_float(value).value)


CUTE = {
    "arch": SimpleNamespace(clz=lambda x: 32 - x.bit_length(), fmin=min),
    "jit": lambda function: function,
    "size": len,
}
CUTLASS: dict[str, Any] = {
    **dict.fromkeys(("Int32", "Int64", "Uint32", "Uint64"), int),
    "Float32": Float32,
    "Constexpr": object,
    "const_expr": bool,
    "range_constexpr": range,
    "min": min,
    "max": max,
    "select_": lambda where, a, b: a if where else b,
}


def run(name: str, imported: Mapping[str, Mapping[str, Any]], **arch: Any) -> dict[str, Any]:
    """The names of templates/device/`name`.py; `imported`: the names of each device module that it imports; `arch`:
    more of `cute.arch`."""
    cute = _module("cutlass.cute", {**CUTE, "arch": SimpleNamespace(**vars(CUTE["arch"]), **arch)})
    modules = [cute, _module("cutlass", {**CUTLASS, "cute": cute})]
    modules += [_module(f"pa_ops.templates.device.{each}", names) for each, names in imported.items()]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module.__name__, module)
        return runpy.run_path(str(DEVICE / f"{name}.py"))


def _module(name: str, names: Mapping[str, Any]) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made
