"""What a row sees of a block of keys, by templates/device/hiding.py itself, with plain integers for the DSL's."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
COLUMNS = [tile * 8 + column for tile in range(16) for column in range(2)]  # a thread's, of 128 keys


def loaded() -> Callable[[int], int]:
    """`columns_before`, run with Python's integers."""
    cutlass, cute, device = ModuleType("cutlass"), ModuleType("cutlass.cute"), ModuleType("device")
    vars(cutlass).update(cute=cute, min=min, max=max, Float32=float, Int32=int, Uint32=int)
    vars(device).update(dict.fromkeys(("ld_shared_32", "row_of", "END", "KEYS", "POSITION")))
    vars(device).update(low_bits=lambda count: (1 << min(count, 32)) - 1)
    imported = ("ptx", "ptx_masks", "shared_sm90", "warpgroup")
    stubs = {f"pa_ops.templates.device.{name}": device for name in imported}
    stubs |= {"cutlass": cutlass, "cutlass.cute": cute}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        found: Callable[[int], int] = runpy.run_path(str(ROOT / "templates" / "device" / "hiding.py"))["columns_before"]
    return found


columns_before = loaded()


@given(st.integers(-(2**31), 2**31 - 1) | st.integers(-20, 150))
def test_bits_are_the_columns_before_a_key(stop: int) -> None:
    """Every bound that a tile can have, far below and far above its own keys too."""
    assert columns_before(stop) == sum(1 << bit for bit, column in enumerate(COLUMNS) if column < stop)


@given(st.integers(-200, 400), st.integers(1, 300))
def test_two_bounds_are_a_window(position: int, window: int) -> None:
    """The columns of (position - window, position] are those before its end that are not before its begin."""
    seen = columns_before(position + 1) & ~columns_before(position - window + 1)
    assert seen == sum(1 << bit for bit, column in enumerate(COLUMNS) if position - window < column <= position)
