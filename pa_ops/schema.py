"""Turns the public surface into torch.library schema strings: one table, from which operators are defined."""

from __future__ import annotations

_OPTIONS = (
    "float? softmax_scale=None, bool causal=True, int sliding_window=0, float softcap=0.0, Tensor? sinks=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    'str backend="auto"'
)
_PAGED = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqlens_k, Tensor block_table"
_VARLEN = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_BUFFERS = "Tensor(a!) out, Tensor(b!)? lse=None"

SCHEMAS: dict[str, str] = {
    "paged_attention": f"({_PAGED}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "paged_attention.out": f"({_PAGED}, *, {_OPTIONS}, {_BUFFERS}) -> ()",
    "varlen_attention": f"({_VARLEN}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "varlen_attention.out": f"({_VARLEN}, *, {_OPTIONS}, {_BUFFERS}) -> ()",
    "append_kv": (
        "(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
        "Tensor? k_scale=None, Tensor? v_scale=None) -> ()"
    ),
    "merge_states": "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
}
"""Operator and overload -> its arguments and results."""
