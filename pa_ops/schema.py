"""Turns the public surface into torch.library schema strings, one table, and calls into arguments by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

NAMESPACE = "pa_ops"

_OPTIONS = (
    "float? softmax_scale=None, bool causal=True, int sliding_window=0, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    'str backend="auto"'
)
_PAGED = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqlens_k, Tensor block_table"
_VARLEN = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_SERVING = (
    "Tensor query, Tensor? key, Tensor? value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cu_seqlens_q, "
    "Tensor past_lens, Tensor block_table, *, int num_heads, int num_kv_heads, Tensor? cos=None, Tensor? sin=None, "
    f"bool rotary_interleaved=False, Tensor? slot_mapping=None, {_OPTIONS}"
)
_PADDED = (
    "Tensor q, Tensor k, Tensor v, *, Tensor? attn_mask=None, Tensor? past_key=None, Tensor? past_value=None, "
    'Tensor? nonpad_kv_seqlen=None, str layout="bnsh", '
    f"{_OPTIONS.replace('bool causal=True', 'bool causal=False')}, bool need_present=True"
)
_BUFFERS = "Tensor(a!) out, Tensor(b!)? lse=None"

SCHEMAS: dict[str, str] = {
    "paged_attention": f"({_PAGED}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "paged_attention.out": f"({_PAGED}, *, {_OPTIONS}, {_BUFFERS}) -> ()",
    "paged_attention_": f"({_SERVING}) -> Tensor out",
    "paged_attention_.out": f"({_SERVING}, Tensor(c!) out, Tensor(d!)? lse=None) -> ()",
    "varlen_attention": f"({_VARLEN}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "varlen_attention.out": f"({_VARLEN}, *, {_OPTIONS}, {_BUFFERS}) -> ()",
    "attention": f"({_PADDED}) -> (Tensor out, Tensor present_key, Tensor present_value, Tensor lse)",
    "append_kv": (
        "(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
        "Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
    ),
    "gather_kv": (
        "(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens_k, Tensor(a!) k, Tensor(b!) v) -> ()"
    ),
    "merge_states": "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
}
"""Operator and overload -> its arguments and results."""


def base_of(op: str) -> str:
    """The operator without its overload: paged_attention.out -> paged_attention."""
    return op.partition(".")[0]


def writes_buffers(op: str) -> bool:
    """Whether the caller brings the results' memory."""
    return op.endswith(".out")


@dataclass(frozen=True)
class Signature:
    """An operator's argument names in order, and the defaults of those that may be left out."""

    names: tuple[str, ...]
    defaults: dict[str, Any]

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by name, defaults filled in; the dispatcher has checked that the rest is there."""
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}


@cache
def signature(op: str) -> Signature:
    """The signature of a key of SCHEMAS, as PyTorch parses it."""
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{op}{SCHEMAS[op]}").arguments
    return Signature(
        tuple(argument.name for argument in arguments),
        {argument.name: argument.default_value for argument in arguments if argument.has_default_value()},
    )
