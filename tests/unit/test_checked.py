"""Checked mode: device values that lie are an error naming the sequence; unchecked, they stay inside the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pa_ops
from pa_ops import InvalidArgument


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(**change: Any) -> dict[str, Any]:
    """Three sequences with 2, 0 and 3 new tokens of 7, 4 and 5; four tokens a page, two pages a sequence."""
    tensors = {
        "q": torch.randn(5, 2, 8).half(),
        "k_cache": torch.randn(6, 4, 1, 8).half(),
        "v_cache": torch.randn(6, 4, 1, 8).half(),
        "cu_seqlens_q": int32(0, 2, 2, 5),
        "seqlens_k": int32(7, 4, 5),
        "block_table": int32(0, 1, 2, 3, 4, 5).reshape(3, 2),
    }
    return {**tensors, **change}


def varlen(**change: Any) -> dict[str, Any]:
    tensors = {
        "q": torch.randn(5, 2, 8).half(),
        "k": torch.randn(9, 1, 8).half(),
        "v": torch.randn(9, 1, 8).half(),
        "cu_seqlens_q": int32(0, 2, 2, 5),
        "cu_seqlens_k": int32(0, 4, 4, 9),
    }
    return {**tensors, **change}


def append(*slots: int) -> dict[str, Any]:
    key, value = torch.randn(2, len(slots), 1, 8).half()
    k_cache, v_cache = torch.zeros(2, 2, 4, 1, 8).half()
    return {"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": torch.tensor(slots)}


def gather(**change: Any) -> dict[str, Any]:
    """Three sequences of 7, 0 and 2 tokens; four tokens a page, two pages a sequence."""
    k, v = torch.zeros(2, 9, 1, 8).half()
    pages = {name: tensor for name, tensor in paged().items() if name in ("k_cache", "v_cache", "block_table")}
    return {**pages, "cu_seqlens_k": int32(0, 7, 7, 9), "k": k, "v": v, **change}


def table(*pages: int) -> Tensor:
    return int32(*pages).reshape(3, 2)


Call = tuple[Callable[..., Any], dict[str, Any]]
LIES: list[tuple[str, Call, str]] = [
    ("cu_seqlens_q", (pa_ops.paged_attention, paged(cu_seqlens_q=int32(1, 2, 2, 5))), "start at 0 / [0] = 1"),
    ("cu_seqlens_q", (pa_ops.paged_attention, paged(cu_seqlens_q=int32(0, -3, 2, 5))), "sequence 0 / [0, -3]"),
    ("cu_seqlens_q", (pa_ops.paged_attention, paged(cu_seqlens_q=int32(0, 4, 2, 5))), "sequence 1 / [4, 2]"),
    ("cu_seqlens_q", (pa_ops.paged_attention, paged(cu_seqlens_q=int32(0, 2, 2, 4))), "5 rows of q / = 4 / sequence 2"),
    ("cu_seqlens_q", (pa_ops.paged_attention, paged(cu_seqlens_q=int32(0, 2, 2, 9))), "5 rows of q / = 9"),
    ("seqlens_k", (pa_ops.paged_attention, paged(seqlens_k=int32(7, -1, 5))), "sequence 1 / >= 0 / -1"),
    (
        "seqlens_k",
        (pa_ops.paged_attention, paged(seqlens_k=int32(7, 4, 9))),
        "sequence 2 / 2 pages of 4 tokens = 8 / 9",
    ),
    ("block_table", (pa_ops.paged_attention, paged(block_table=table(0, 6, 2, 3, 4, 5))), "sequence 0 / page 1 / 6"),
    ("block_table", (pa_ops.paged_attention, paged(block_table=table(0, 1, 2, 3, -1, 5))), "sequence 2 / page 0 / -1"),
    ("max_seqlen_q", (pa_ops.paged_attention, paged(max_seqlen_q=2)), "3 new tokens of sequence 2 / got 2"),
    ("max_seqlen_k", (pa_ops.paged_attention, paged(max_seqlen_k=6)), "7 visible tokens of sequence 0 / got 6"),
    ("cu_seqlens_q", (pa_ops.varlen_attention, varlen(cu_seqlens_q=int32(0, 3, 2, 5))), "sequence 1 / [3, 2]"),
    ("cu_seqlens_k", (pa_ops.varlen_attention, varlen(cu_seqlens_k=int32(0, 4, 3, 9))), "sequence 1 / [4, 3]"),
    ("max_seqlen_k", (pa_ops.varlen_attention, varlen(max_seqlen_k=4)), "5 visible tokens of sequence 2 / got 4"),
    ("slot_mapping", (pa_ops.append_kv, append(0, 8)), "[0, 8) / token 1 / 8"),
    ("slot_mapping", (pa_ops.append_kv, append(-2, 1)), "-1 (do not store) / token 0 / -2"),
    ("slot_mapping", (pa_ops.append_kv, append(5, -1, 5)), "share a slot / 0 and 2 / 5"),
    ("cu_seqlens_k", (pa_ops.gather_kv, gather(cu_seqlens_k=int32(0, 7, 6, 9))), "sequence 1 / [7, 6]"),
    ("cu_seqlens_k", (pa_ops.gather_kv, gather(cu_seqlens_k=int32(0, 7, 7, 10))), "9 rows of k / = 10"),
    ("cu_seqlens_k", (pa_ops.gather_kv, gather(cu_seqlens_k=int32(0, 0, 0, 9))), "sequence 2 / of 4 tokens = 8 / 9"),
    ("block_table", (pa_ops.gather_kv, gather(block_table=table(0, 6, 2, 3, 4, 5))), "sequence 0 / page 1 / 6"),
]


@pytest.mark.parametrize(("argument", "call", "words"), LIES, ids=lambda value: value if isinstance(value, str) else "")
def test_B24_a_lie_is_an_error_in_checked_mode_and_harmless_outside(
    argument: str, call: Call, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = call
    results = function(**arguments)
    assert all(not torch.isnan(t).any() for t in results or ())
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    with pytest.raises(InvalidArgument) as caught:
        function(**arguments)
    assert caught.value.argument == argument
    for word in words.split(" / "):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_honest_calls_pass_in_checked_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    pa_ops.paged_attention(**paged(max_seqlen_q=3, max_seqlen_k=7))
    pa_ops.paged_attention(**paged(seqlens_k=int32(7, 4, 1)))  # fewer keys than new tokens is legal
    pa_ops.paged_attention(**paged(block_table=table(0, 1, -1, 99, 4, 5)))  # sequence 1 has no query
    pa_ops.paged_attention(**paged(block_table=table(-1, 1, 2, 3, 4, 5), sliding_window=2))  # behind the window
    pa_ops.varlen_attention(**varlen())
    pa_ops.append_kv(**append(-1, 3, -1, 7))
    pa_ops.gather_kv(**gather(block_table=table(0, 1, -1, 99, 4, -1)))  # none of the three is reached
    pa_ops.gather_kv(**gather(cu_seqlens_k=int32(0, 3, 3, 5)))  # rows to spare


def test_padded_buffers_are_legal_in_checked_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    arguments = paged(q=torch.randn(8, 2, 8).half())
    out = torch.full((8, 2, 8), 7.0).half()
    torch.ops.pa_ops.paged_attention.out(**arguments, out=out)
    assert (out[5:] == 7).all() and not (out[:5] == 7).any()
    with pytest.raises(InvalidArgument, match="cu_seqlens_q: counts tokens"):
        pa_ops.paged_attention(**arguments)


def test_D9_page_counts_are_not_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    pages = int32(0, 1, 1, 3)  # a page indptr of the same batch
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_k: counts tokens \(not pages\) from 0 .* 9 rows of k"):
        pa_ops.varlen_attention(**varlen(cu_seqlens_k=pages))
    with pytest.raises(InvalidArgument, match=r"seqlens_k: must be \[B\] with B = 3"):
        pa_ops.paged_attention(**paged(seqlens_k=pages))
