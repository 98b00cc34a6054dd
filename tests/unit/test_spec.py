"""Names of kernels: total, true, invertible, unique."""

from __future__ import annotations

import re
from itertools import product

import pytest
from core_rows import declared_pairs
from hypothesis import given
from hypothesis import strategies as st

from pa_ops.errors import InvalidArgument
from pa_ops.spec import NAME_LIMIT, DType, Family, InstanceSpec, KernelOp, Layout, Mask, Tile

FLASH = "pa_attn_flash_sm80_bf16_kvbf16_d128v128_gather_causal_m128n64s1w4"
EXTENTS = st.integers(0, 256)
SPECS = st.builds(
    InstanceSpec,
    op=st.sampled_from(KernelOp),
    family=st.sampled_from(Family),
    dtype=st.sampled_from((DType.FP16, DType.BF16)),
    kv_dtype=st.sampled_from(DType),
    head_dim=EXTENTS,
    head_dim_v=EXTENTS,
    layout=st.sampled_from(Layout),
    mask=st.sampled_from(Mask),
    tile=st.builds(Tile, EXTENTS, EXTENTS, st.integers(0, 9), st.integers(0, 16), st.integers(1, 9)),
)


@given(SPECS)
def test_G3_names_are_invertible(spec: InstanceSpec) -> None:
    assert InstanceSpec.parse(spec.name) == spec
    assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
    assert len(spec.name) <= NAME_LIMIT


@given(SPECS, SPECS)
def test_G3_names_are_unique(a: InstanceSpec, b: InstanceSpec) -> None:
    assert (a.name == b.name) == (a == b)


def test_G3_every_axis_is_spelled() -> None:
    spec = InstanceSpec.parse(FLASH)
    assert spec == InstanceSpec(
        op=KernelOp.ATTN,
        family=Family.FLASH_SM80,
        dtype=DType.BF16,
        kv_dtype=DType.BF16,
        head_dim=128,
        head_dim_v=128,
        layout=Layout.GATHER,
        mask=Mask.CAUSAL,
        tile=Tile(128, 64, 1, 4),
    )
    assert str(spec.tile) == "m128n64s1w4"


@pytest.mark.parametrize(
    "name",
    [
        "",
        FLASH.upper(),
        FLASH + "_",
        FLASH.replace("_kvbf16", ""),
        FLASH.replace("d128", "d0128"),
        FLASH.replace("causal", "causl"),
        FLASH.replace("flash_sm80", "flash"),
        FLASH + "\n",
    ],
)
def test_G3_nothing_else_parses(name: str) -> None:
    with pytest.raises(InvalidArgument, match="instance name"):
        InstanceSpec.parse(name)


def test_B27_declared_names_are_distinct_and_none_claims_the_math_path() -> None:
    specs = {spec for spec, _ in declared_pairs()}
    assert len({spec.name for spec in specs}) == len(specs)
    assert len(set(Family)) == len({str(family) for family in Family})
    for word, spec in product(("unfused", "reference", "math"), specs):
        assert word not in spec.name


def test_shared_memory_is_the_q_tile_and_every_stage_of_k_and_v() -> None:
    spec = InstanceSpec.parse(FLASH)
    assert spec.smem_bytes == (128 * 128 + 2 * 64 * 128) * 2
    two_stages = InstanceSpec.parse(FLASH.replace("s1", "s2"))
    assert two_stages.smem_bytes - spec.smem_bytes == 2 * 64 * 128 * 2
    assert spec.threads == 128


def test_a_bad_axis_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"spec\.mask: must be one of full, causal, window, tensor; got 'banded'"):
        InstanceSpec(
            op=KernelOp.ATTN,
            family=Family.FLASH_SM80,
            dtype=DType.BF16,
            kv_dtype=DType.BF16,
            head_dim=64,
            head_dim_v=64,
            layout=Layout.DENSE,
            mask="banded",  # type: ignore[arg-type]
            tile=Tile(128, 64, 1, 4),
        )
    with pytest.raises(InvalidArgument, match=r"tile\.n: must be an integer >= 0; got -1"):
        Tile(128, -1, 1, 4)
