"""What a row sees of a block of keys, by templates/device/hiding.py itself, with plain integers for the DSL's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helpers import plain

COLUMNS = [tile * 8 + column for tile in range(16) for column in range(2)]  # a thread's, of 128 keys


columns_before = plain.run(
    "hiding",
    {
        "ptx": {"ld_shared_32": None},
        "ptx_masks": {"low_bits": lambda count: (1 << min(count, 32)) - 1},
        "shared_sm90": dict.fromkeys(("END", "KEYS", "POSITION")),
        "warpgroup": {"row_of": None},
    },
)["columns_before"]


@given(st.integers(-(2**31), 2**31 - 1) | st.integers(-20, 150))
def test_bits_are_the_columns_before_a_key(stop: int) -> None:
    """Every bound that a tile can have, far below and far above its own keys too."""
    assert columns_before(stop) == sum(1 << bit for bit, column in enumerate(COLUMNS) if column < stop)


@given(st.integers(-200, 400), st.integers(1, 300))
def test_two_bounds_are_a_window(position: int, window: int) -> None:
    """The columns of (position - window, position] are those before its end that are not before its begin."""
    seen = columns_before(position + 1) & ~columns_before(position - window + 1)
    assert seen == sum(1 << bit for bit, column in enumerate(COLUMNS) if position - window < column <= position)
