"""Turns the operators into typed Python functions: the same calls, with defaults and documentation.

A function hands over what it is given and no more, for PyTorch looks at every argument: the ten defaults of
`paged_attention` cost 2 us, a third of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from torch import Tensor

from pa_ops.ops import OPERATORS
from pa_ops.selection import AUTO

Results = tuple[Tensor, Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def _as(operator: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a declaration a function that calls `operator`."""

    def declare(declaration: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(declaration)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast(R, operator(*args, **kwargs))

        return call

    return declare


@_as(OPERATORS.paged_attention.default)
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
    raise NotImplementedError


@_as(OPERATORS.paged_attention_.default)
def paged_attention_(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    past_lens: Tensor,
    block_table: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    slot_mapping: Tensor | None = None,
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
) -> Tensor:
    """A serving engine's attention layer: rotates Q and K, stores K and V in place, attends: -> out [T, Hq * D].

    query: [T, Hq * D] fp16 or bf16, the new tokens of B sequences, packed; with key = value = None it is
        [T, (Hq + 2 * Hkv) * D], rows of Q, K, V. Hq = num_heads is a multiple of Hkv = num_kv_heads.
    key, value: [T, Hkv * D] in query's dtype, both or neither; any row strides (a slice of packed QKV is fine).
    k_cache, v_cache: [pages, page_size, Hkv, D], updated in place: rotated K, and V as it is; strides and dtypes as
        in `paged_attention`. A cache of another dtype holds value / scale, to nearest, saturating.
    cu_seqlens_q: [B+1] int32, prefix sums of the new tokens, from 0 to T.
    past_lens: [B] int32, tokens of each sequence that are in the caches before the call.
    block_table: [B, max_pages] int32, page ids, for past and new tokens; one outside [0, pages) is unmapped.
    cos, sin: [max_position, rotary_dim / 2] fp32 or query's dtype, both or neither (no rotation); rotary_dim <= D,
        channels beyond it are copied. Token j of a sequence stands at past_lens + j; past the table, at its end.
    rotary_interleaved: channels (2i, 2i + 1) turn together, instead of (i, i + rotary_dim / 2).
    slot_mapping: [T] int64, page * page_size + offset of each token's K and V; a slot outside the caches (-1) is not
        stored, its query attends all the same. Unless given, slots come from block_table.
    The other options, from softmax_scale to backend, as in `paged_attention`; causal is bottom-right.

    Rotated Q and K are rounded once to query's dtype. Rows past cu_seqlens_q[-1] are neither stored nor attended:
    their results are unspecified; `torch.ops.pa_ops.paged_attention_.out(..., out=, lse=None)` writes into the caller's
    buffers, [T, Hq * D] and [Hq, T] fp32, and leaves them alone.

    Raises InvalidArgument (the argument, the rule, what it got) before anything is written, NoInstance where no kernel
    serves the call.
    """
    raise NotImplementedError


@_as(OPERATORS.varlen_attention.default)
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
    raise NotImplementedError


@_as(OPERATORS.attention.default)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    layout: str = "bnsh",
    softmax_scale: float | None = None,
    causal: bool = False,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = AUTO,
    need_present: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of padded batches: -> (out, present_key, present_value, lse [B, Hq, Sq] fp32), as ONNX's Attention.

    q: [B, Hq, Sq, D] ("bnsh") or [B, Sq, Hq, D] ("bsnh") fp16 or bf16, or fp32 by the reference; out likewise with Dv.
    k, v: [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv], or tokens first, q's dtype; Hq is a multiple of Hkv, Dv may differ from
        D; any strides with a dense last dimension.
    past_key, past_value: [B, Hkv, P, D] and [.., Dv] in the order of k, both or neither; present = cat(past, new), of
        total = P + Sk tokens, contiguous.
    attn_mask: bool (True = attend), or added to the scaled, capped score, in q's dtype or fp32; [Sq, total],
        [Hq, Sq, total] or [B, Hq, Sq, total], 1 where it is broadcast. An addend of -1e30 or less hides the key.
    nonpad_kv_seqlen: [B] int32 or int64, tokens that each sequence sees of `total`; what lies behind is never read.
    layout: "bnsh", "bsnh", or one for q and out and, after a slash, one for k, v, past and present ("bsnh/bnsh").
    causal: row j sees keys up to j without a past (top-left), up to total - Sq + j with one (bottom-right).
    sliding_window: keys a row sees, its own included, counted from there: (pos - W, pos]; <= 0 is off.
    need_present: False returns empty presents, and spares the copy that they are where there is no past.
    The other options, from softmax_scale to backend, as in `paged_attention`; scales of quantised K and V on the CPU.

    Scores are scaled, capped, masked. A row that sees no key is zeros with lse = -inf, or the sink's value. V of a key
    that is hidden by the mask tensor alone must be finite. Out has the memory of [B, Sq, Hq, Dv], lse of [Hq, B, Sq].

    Raises InvalidArgument (the argument, the rule, what it got) before anything is written, NoInstance where no kernel
    serves the call.
    """
    raise NotImplementedError


@_as(OPERATORS.append_kv.default)
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
    raise NotImplementedError


@_as(OPERATORS.gather_kv.default)
def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_k: Tensor, k: Tensor, v: Tensor
) -> None:
    """Copies each sequence's first tokens out of its pages into contiguous rows, bit by bit: what `append_kv` undoes.

    k_cache, v_cache: [pages, page_size, Hkv, D] and [..., Dv] fp16 or bf16; strides as in `paged_attention`.
    block_table: [B, max_pages] int32, page ids; a token whose page is outside [0, pages), or beyond the row, is zeros.
    cu_seqlens_k: [B+1] int32, prefix sums of the tokens to copy, from 0 on; they are read on the device alone.
    k, v: [T, Hkv, D] and [T, Hkv, Dv] in the caches' dtype, any strides with a dense last dimension, written in place:
        row cu_seqlens_k[b] + i is token i of sequence b. Rows past cu_seqlens_k[-1] stay as they are.

    The rows are what `varlen_attention` takes. Raises InvalidArgument, NoInstance.
    """
    raise NotImplementedError


@_as(OPERATORS.merge_states.default)
def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Results:
    """Attention over two disjoint sets of keys from the two partial results: -> (out [T, Hq, Dv], lse [Hq, T] fp32).

    out_a, out_b: [T, Hq, Dv] fp16 or bf16; lse_a, lse_b: [Hq, T] fp32, natural logs. A side whose lse is -inf (or
    +inf) is empty, whatever its out holds. Raises InvalidArgument, NoInstance.
    """
    raise NotImplementedError
