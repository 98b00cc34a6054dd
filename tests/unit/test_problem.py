"""Problems: defaults, facts against sizes, and refusals that name the field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pa_ops.errors import InvalidArgument
from pa_ops.problem import Problem
from pa_ops.spec import DType, KernelOp, Layout, Mask, Op


def paged(**changes: Any) -> Problem:
    return Problem(**{"op": "paged_attention", "dtype": "bf16", "head_dim": 128, **changes})


def test_defaults_follow_the_query() -> None:
    problem = paged(num_heads=8)
    assert problem.op is Op.PAGED_ATTENTION
    assert problem.dtype is problem.kv_dtype is DType.BF16
    assert (problem.num_kv_heads, problem.group) == (8, 1)
    assert (problem.layout, problem.page_size, problem.mask) == (Layout.GATHER, 16, Mask.CAUSAL)
    assert problem.kernel_op is KernelOp.ATTN


def test_C11_value_head_size_zero_or_absent_means_the_key_head_size() -> None:
    assert paged(head_dim_v=0) == paged() == paged(head_dim_v=128)
    assert paged(head_dim_v=64).head_dim_v == 64


def test_a_window_is_causal_whatever_causal_says() -> None:
    assert paged(window=True, causal=False).mask is paged(window=True).mask is Mask.WINDOW
    assert paged(window=True, causal=False).facts == paged(window=True, causal=True).facts
    assert paged(causal=False).mask is Mask.FULL


def test_sizes_are_not_facts() -> None:
    problem = paged()
    grown = replace(problem, batch=64, tokens=4096, max_q=64, max_k=1 << 20)
    assert grown.facts == problem.facts
    assert hash(grown.facts) == hash(problem.facts)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp16"},
        {"kv_dtype": "int8"},
        {"head_dim": 64},
        {"head_dim_v": 64},
        {"causal": False},
        {"window": True},
        {"softcap": True},
        {"sinks": True},
        {"page_size": 64},
        {"aligned": False},
        {"num_heads": 4, "num_kv_heads": 2},
    ],
)
def test_every_fact_is_in_the_key(change: dict[str, Any]) -> None:
    assert paged(**change).facts != paged().facts


@pytest.mark.parametrize(
    ("change", "argument", "rule"),
    [
        ({"op": "attend"}, "op", "must be one of paged_attention"),
        ({"dtype": "fp64"}, "dtype", "must be one of fp16, bf16"),
        ({"head_dim": 0}, "head_dim", ">= 1"),
        ({"head_dim": True}, "head_dim", ">= 1"),
        ({"head_dim_v": -1}, "head_dim_v", ">= 0"),
        ({"num_heads": 7, "num_kv_heads": 2}, "num_heads", "multiple of num_kv_heads = 2"),
        ({"layout": "dense"}, "layout", "paged_attention reads the layout gather"),
        ({"op": "varlen_attention", "page_size": 16}, "page_size", "has no pages"),
        ({"page_size": 0}, "page_size", ">= 1"),
        ({"batch": -1}, "batch", ">= 0"),
        ({"max_q": -1}, "max_q", ">= 0"),
        ({"causal": 1}, "causal", "must be a bool"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], argument: str, rule: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        paged(**change)
    assert caught.value.argument == argument
    assert rule in caught.value.rule
