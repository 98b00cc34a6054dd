"""Turns the operators into torch.ops.pa_ops.*, for CPU, CUDA and meta tensors, and into typed Python functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from pa_ops import cuda
from pa_ops.calls import ATTENTION, REFERENCE_DECISIONS, REFERENCES
from pa_ops.checked import check_values
from pa_ops.checks import RULES, validate
from pa_ops.environment import settings
from pa_ops.errors import InvalidArgument
from pa_ops.overrides import REFERENCE, policy
from pa_ops.schema import NAMESPACE, SCHEMAS, base_of, signature, writes_buffers
from pa_ops.selection import AUTO
from pa_ops.trace import record

Arguments = dict[str, Any]
Results = tuple[Tensor, Tensor]


def _on_cpu(op: str) -> Callable[..., Any]:
    """The CPU kernel of an operator: the reference, behind the checks that every backend shares."""
    function = REFERENCES[base_of(op)]

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(op).bind(args, kwargs)
        validate(op, arguments)
        _require_reference(op, arguments.pop("backend", AUTO))
        if settings().checked:
            check_values(op, arguments)
        results = function(**arguments)
        record(REFERENCE_DECISIONS[op])
        return None if writes_buffers(op) else results

    return run


def _require_reference(op: str, backend: str) -> None:
    """CPU tensors know no kernel family: a choice of one is refused, and never dropped."""
    if base_of(op) not in ATTENTION:
        return
    chosen = policy(backend)
    if chosen.backend not in (AUTO, REFERENCE):
        rule = f"CPU tensors are served by {REFERENCE!r} only, so it must be {REFERENCE!r} or {AUTO!r}"
        raise InvalidArgument("backend", rule, f"{chosen.backend!r} (set by {chosen.backend_source})")


def _on_meta(op: str) -> Callable[..., Any]:
    """The shapes and dtypes of an operator's results, behind the same checks of shapes, dtypes and scalars."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(op).bind(args, kwargs)
        sizes = validate(op, arguments)
        if not SCHEMAS[op].endswith("lse)"):
            return None
        first: Tensor = arguments[RULES[op][0].argument]
        shape = (sizes["T"], sizes["Hq"], sizes["Dv"])
        return first.new_empty(shape), first.new_empty((sizes["Hq"], sizes["T"]), dtype=torch.float32)

    return run


def _register() -> torch.library.Library:
    library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    for op, schema in SCHEMAS.items():
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, _on_cpu(op), "CPU")
        library.impl(op, cuda.IMPLEMENTATIONS[op], "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{op}", _on_meta(op), lib=library)
    return cast(torch.library.Library, library)


_LIBRARY = _register()  # the operators live as long as this object does


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = AUTO,
) -> Results:
    """Attention of packed queries over paged K/V caches: -> (out [T, Hq, Dv] in q's dtype, lse [Hq, T] fp32).

    q: [T, Hq, D] fp16 or bf16, the new tokens of B sequences, packed.
    k_cache, v_cache: [pages, page_size, Hkv, D] and [..., Dv], q's dtype (or fp8 e4m3fn, e5m2, int8 on CPU tensors);
        any strides with a dense last dimension; Hq is a multiple of Hkv.
    cu_seqlens_q: [B+1] int32, prefix sums of the new tokens, from 0 to T.
    seqlens_k: [B] int32, tokens visible to each sequence, the new ones included.
    block_table: [B, max_pages] int32, page ids; one outside [0, pages) is unmapped, and its keys are masked.
    softmax_scale: multiplies q·k; D ** -0.5 unless given.
    causal: query j of a sequence stands at seqlens_k - new + j and sees keys up to there (bottom-right).
    sliding_window: keys a query sees, itself included: (pos - W, pos]; <= 0 is off.
    softcap: s -> softcap * tanh(s / softcap) after the scale; 0 is off.
    sinks: [Hq] fp32 or q's dtype, an extra logit a head in the denominator.
    k_scale, v_scale: [1] or [Hkv] fp32; value = stored * scale.
    max_seqlen_q, max_seqlen_k: upper bounds of new and visible tokens of one sequence; they change no result.
    backend: "auto", a family of `pa_ops.families()`, or "reference".

    A row that sees no key is zeros with lse = -inf, or the sink's value; lse is a natural log. Rows past
    cu_seqlens_q[-1] of the results are unspecified; `torch.ops.pa_ops.paged_attention.out(..., out=, lse=None)` writes
    into the caller's buffers and leaves them alone. On CUDA nothing is copied to the host and nothing synchronises.

    Raises InvalidArgument (the argument, the rule, what it got), NoInstance where no kernel serves the call.
    """
    return cast(
        Results,
        torch.ops.pa_ops.paged_attention.default(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            seqlens_k,
            block_table,
            softmax_scale=softmax_scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            backend=backend,
        ),
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = AUTO,
) -> Results:
    """Attention of packed queries over packed K/V: -> (out [T, Hq, Dv] in q's dtype, lse [Hq, T] fp32).

    k, v: [total_k, Hkv, D] and [total_k, Hkv, Dv], the tokens of B sequences, packed; any strides with a dense last
    dimension. cu_seqlens_k: [B+1] int32, prefix sums of tokens (not of pages), from 0 to total_k. Causal is
    bottom-right. Everything else, results and errors included, as in `paged_attention`.
    """
    return cast(
        Results,
        torch.ops.pa_ops.varlen_attention.default(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale=softmax_scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            backend=backend,
        ),
    )


def append_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Stores new keys and values into their slots of the paged caches, in place.

    key, value: [T, Hkv, D] and [T, Hkv, Dv] fp16 or bf16, any strides with a dense last dimension (a slice of packed
        QKV is fine); T is slot_mapping's, rows beyond it are ignored.
    k_cache, v_cache: as in `paged_attention`; only the slots named are written.
    slot_mapping: [T] int64, page * page_size + offset of each token; a slot outside the caches (-1) is not stored.
    k_scale, v_scale: [1] or [Hkv] fp32; a cache of another dtype holds value / scale, to nearest, saturating.

    Raises InvalidArgument, NoInstance.
    """
    torch.ops.pa_ops.append_kv.default(key, value, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Results:
    """Attention over two disjoint sets of keys from the two partial results: -> (out [T, Hq, Dv], lse [Hq, T] fp32).

    out_a, out_b: [T, Hq, Dv] fp16 or bf16; lse_a, lse_b: [Hq, T] fp32, natural logs. A side whose lse is -inf (or
    +inf) is empty, whatever its out holds. Raises InvalidArgument, NoInstance.
    """
    return cast(Results, torch.ops.pa_ops.merge_states.default(out_a, lse_a, out_b, lse_b))
