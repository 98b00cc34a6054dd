"""Turns the name of a script into its module: `scripts/` is no package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from core_rows import ROOT


def script(name: str) -> ModuleType:
    """The module of scripts/`name`.py, run anew."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module
