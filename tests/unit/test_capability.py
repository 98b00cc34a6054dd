"""Devices: features, shared memory, and the code that each SM loads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_ops.capability import MODELS, Capability, Feature, min_sm, parse_target
from pa_ops.errors import InvalidArgument

SMEM_KIB = {53: 48, 60: 48, 61: 48, 62: 48, 70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}
SMEM_KIB |= {100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


@pytest.mark.parametrize(("sm", "kib"), SMEM_KIB.items())
def test_B9_shared_memory_by_sm(sm: int, kib: int) -> None:
    assert Capability.of_sm(sm).smem_optin_bytes == kib * 1024


@pytest.mark.parametrize(
    ("sm", "first", "loads", "refuses"),
    [
        (75, "sm_75", ("sm_70", "compute_53"), ("sm_80", "sm_62", "compute_80")),
        (86, "sm_86", ("sm_80", "compute_80"), ("sm_87", "sm_86a", "sm_75")),
        (90, "sm_90a", ("sm_90", "compute_80"), ("sm_80", "sm_89", "sm_100f")),
        (100, "sm_100a", ("sm_100f", "sm_100"), ("sm_90", "sm_103a", "sm_103f")),
        (103, "sm_103a", ("sm_100f", "sm_103f", "sm_100"), ("sm_100a", "sm_110f")),
        (110, "sm_110a", ("sm_110f",), ("sm_100f", "sm_103f", "sm_110f0")),
        (121, "sm_121a", ("sm_120f", "sm_120"), ("sm_120a", "sm_110f")),
        (122, "sm_122a", ("sm_121f", "sm_120f", "compute_121"), ("sm_121a", "sm_120a")),
    ],
)
def test_code_loads_within_its_major_only(
    sm: int, first: str, loads: tuple[str, ...], refuses: tuple[str, ...]
) -> None:
    targets = Capability.of_sm(sm).targets
    assert targets[0] == first
    assert set(loads) <= set(targets)
    assert set(refuses).isdisjoint(targets)


@given(st.integers(50, 300))
def test_an_unknown_sm_is_taken_for_the_newest_known_below_it(sm: int) -> None:
    capability = Capability.of_sm(sm)
    known = max(other for other in MODELS if other <= sm)
    assert capability.sm == sm
    assert capability.features == Capability.of_sm(known).features
    assert len(set(capability.targets)) == len(capability.targets)
    assert all(parse_target(target) <= sm for target in capability.targets)


@pytest.mark.parametrize(
    ("sm", "target"), [(53, "sm_53"), (62, "sm_62"), (75, "sm_75"), (80, "sm_80"), (86, "sm_80"), (90, "sm_90a")]
)
def test_what_to_build_for_a_device(sm: int, target: str) -> None:
    assert Capability.of_sm(sm).build_target == target


def test_oldest_sm_of_a_feature() -> None:
    assert min_sm(frozenset({Feature.CP_ASYNC, Feature.MMA_BF16})) == 80
    assert min_sm(frozenset({Feature.MMA_F16})) == 75
    assert min_sm(frozenset({Feature.WGMMA})) == 90
    assert min_sm(frozenset({Feature.WGMMA, Feature.TCGEN05})) is None


@pytest.mark.parametrize("sm", [0, 49, -90, True, 9.0])
def test_an_sm_that_never_was_is_refused(sm: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^sm: "):
        Capability.of_sm(sm)  # type: ignore[arg-type]


def test_fields_are_checked() -> None:
    with pytest.raises(InvalidArgument, match=r"^num_sms: "):
        Capability(90, 232448, 0)
    with pytest.raises(InvalidArgument, match=r"^smem_optin_bytes: "):
        Capability(90, -1, 132)
    with pytest.raises(InvalidArgument, match=r"^target: "):
        parse_target("sm90")
