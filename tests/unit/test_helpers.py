"""The helpers of the GPU tests, held against the reference on the CPU: poison stays out, wrong answers are seen."""

from __future__ import annotations

import pytest
import torch

from helpers.parity import error_of, expected
from helpers.problems import Call, Shape, paged, sinks, varlen

CPU = torch.device("cpu")
PAIRS = [(0, 0), (0, 40), (1, 33), (3, 17), (20, 5), (17, 17)]


@pytest.mark.parametrize("page_size", (1, 7, 16, 64))
@pytest.mark.parametrize("window", (0, 1, 9))
@pytest.mark.parametrize("pool", ("separate", "fused", "hnd", "packed"))
def test_poison_is_out_of_every_query_s_sight(page_size: int, window: int, pool: str) -> None:
    shape = Shape(16, page_size=page_size, pool=pool)
    call = paged(PAIRS, shape, CPU, sliding_window=window, sinks=sinks(shape, CPU))
    assert call.tensors["k_cache"].isnan().any() and call.tensors["q"].isnan().any()
    out, lse = expected(call)
    assert out[: call.rows].isfinite().all()
    assert not lse[:, : call.rows].isnan().any()


def test_dense_poison_likewise() -> None:
    call = varlen(PAIRS, Shape(16), CPU, causal=False)
    assert call.tensors["k"].isnan().any()
    assert expected(call)[0][: call.rows].isfinite().all()


def test_the_operator_writes_real_rows_only() -> None:
    call: Call = paged(PAIRS, Shape(16), CPU)
    out, lse = call.poisoned_results()
    call.run_into(out, lse)
    assert not out[: call.rows].isnan().any() and out[call.rows :].isnan().all()
    error_of(out[: call.rows], expected(call)[0][: call.rows], torch.float16, "CPU operator")


@pytest.mark.parametrize("wrong", (torch.nan, torch.inf, 1.02))
def test_the_tolerance_rule_refuses(wrong: float) -> None:
    want = torch.ones(3, 4)
    got = want.clone()
    assert error_of(got, want, torch.float16, "equal") == 0.0
    got[2, 1] = wrong
    with pytest.raises(AssertionError, match=r"first at \(2, 1\)"):
        error_of(got, want, torch.float16, "wrong")


def test_equal_infinities_are_equal() -> None:
    lse = torch.tensor([-torch.inf, 1.0])
    assert error_of(lse, lse.clone(), torch.bfloat16, "lse") == 0.0
