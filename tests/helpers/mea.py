"""Turns a call into a verdict on one of the mea families alone, and a paged call into the dense one it must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.parity import Evidence, check
from helpers.problems import SPARE_ROWS, Call, prefix_sums
from helpers.rooms import as_it_began, poison

PTX = ("compute_53", "compute_70", "compute_75")
MASKS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "sliding_window": 37},
}


def on_mea(call: Call, evidence: Evidence, what: object = "") -> tuple[Tensor, Tensor]:
    """Checks a call that the mea family must serve alone; the word alone means mea_decode too."""
    with pytest.MonkeyPatch.context() as patch, pa_ops.trace.recording() as calls:
        patch.setenv("PA_OPS_DISABLE", "mea_decode")
        found = check(call.with_options(backend="mea"), evidence, what)
    assert [made.family for made in calls] == ["mea"]
    return found


def on_decode(call: Call, evidence: Evidence, what: object = "") -> tuple[Tensor, Tensor]:
    """Checks a call that the mea_decode family must serve alone, from a workspace of NaN, and leave counters at 0."""
    device = call.tensors["q"].device
    poison(device)
    with pa_ops.trace.recording() as calls:
        found = check(call.with_options(backend="mea_decode"), evidence, what)
    assert [made.family for made in calls] == ["mea_decode"]
    assert as_it_began(device), what
    return found


def gathered(call: Call) -> Call:
    """The dense twin of a paged call: keys and values copied out of their pages by the operator, NaN past the end."""
    paged = call.tensors
    ends = prefix_sums(paged["seqlens_k"].tolist(), paged["q"].device)
    rows = int(ends[-1]) + SPARE_ROWS
    k, v = (paged[name].new_full((rows, *paged[name].shape[2:]), torch.nan) for name in ("k_cache", "v_cache"))
    torch.ops.pa_ops.gather_kv(paged["k_cache"], paged["v_cache"], paged["block_table"], ends, k, v)
    dense = {"q": paged["q"], "k": k, "v": v, "cu_seqlens_q": paged["cu_seqlens_q"], "cu_seqlens_k": ends}
    return Call("varlen_attention", dense, call.rows, call.options)
