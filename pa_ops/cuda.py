"""Turns an operator call on CUDA tensors into one kernel launch, with no copy to the host and no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pa_ops.checked import check_values
from pa_ops.environment import settings
from pa_ops.plans import Plan, find
from pa_ops.schema import signature
from pa_ops.trace import record

Results = tuple[Tensor, Tensor]

_unread: dict[torch.device, list[Tensor]] = {}
_HERE: AbstractContextManager[Any] = nullcontext()


def paged_attention(*tensors: Tensor, **options: Any) -> Results:
    """torch.ops.pa_ops.paged_attention on CUDA tensors."""
    plan = _plan("paged_attention", tensors, options)
    out, lse = _attention_results(tensors[0], tensors[2])
    _paged(plan, tensors, out=out, lse=lse, **options)
    return out, lse


def paged_attention_out(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.paged_attention.out on CUDA tensors."""
    plan = _plan("paged_attention.out", tensors, options)
    _paged(plan, tensors, **options)


def varlen_attention(*tensors: Tensor, **options: Any) -> Results:
    """torch.ops.pa_ops.varlen_attention on CUDA tensors."""
    plan = _plan("varlen_attention", tensors, options)
    out, lse = _attention_results(tensors[0], tensors[2])
    _varlen(plan, tensors, out=out, lse=lse, **options)
    return out, lse


def varlen_attention_out(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.varlen_attention.out on CUDA tensors."""
    plan = _plan("varlen_attention.out", tensors, options)
    _varlen(plan, tensors, **options)


def append_kv(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.append_kv on CUDA tensors."""
    plan = _plan("append_kv", tensors, options)
    key, value, k_cache, v_cache, slot_mapping = tensors
    if slot_mapping.shape[0]:
        with _on(key.device):
            plan.launch(key=key, value=value, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
        record(plan.decision)


def merge_states(*tensors: Tensor) -> Results:
    """torch.ops.pa_ops.merge_states on CUDA tensors."""
    plan = _plan("merge_states", tensors, {})
    out_a, lse_a, out_b, lse_b = tensors
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    if out_a.shape[0]:
        with _on(out_a.device):
            plan.launch(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b, out=out, lse=lse)
        record(plan.decision)
    return out, lse


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "paged_attention": paged_attention,
    "paged_attention.out": paged_attention_out,
    "varlen_attention": varlen_attention,
    "varlen_attention.out": varlen_attention_out,
    "append_kv": append_kv,
    "merge_states": merge_states,
}
"""Operator and overload -> what the dispatcher calls for CUDA tensors."""


def _plan(op: str, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Plan:
    now = settings()
    plan = find(op, tensors, options, now)
    if now.checked and not torch.cuda.is_current_stream_capturing():
        check_values(op, signature(op).bind(tensors, options))
    return plan


def _attention_results(q: Tensor, v: Tensor) -> Results:
    """Buffers for the results; rows past cu_seqlens_q[-1] keep what the allocator left there."""
    tokens, heads, _ = q.shape
    return q.new_empty((tokens, heads, v.shape[-1])), q.new_empty((heads, tokens), dtype=torch.float32)


def _paged(plan: Plan, tensors: tuple[Tensor, ...], **options: Any) -> None:
    q, k_cache, v_cache, cu_seqlens_q, seqlens_k, block_table = tensors
    if plan.on_reference:
        _on_reference(plan, tensors, options)
    else:
        _attend(
            plan, (q, k_cache, v_cache), cu_seqlens_q, {"seqlens_k": seqlens_k, "block_table": block_table}, **options
        )


def _varlen(plan: Plan, tensors: tuple[Tensor, ...], **options: Any) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    if plan.on_reference:
        _on_reference(plan, tensors, options)
    else:
        _attend(plan, (q, k, v), cu_seqlens_q, {"cu_seqlens_k": cu_seqlens_k}, **options)


def _attend(
    plan: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens_q: Tensor,
    where: dict[str, Tensor],
    *,
    out: Tensor,
    lse: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: None = None,
    v_scale: None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "",
) -> None:
    """Launches an attention kernel; `where` holds, by argument name, the tensors that tell where the keys are."""
    q, k, v = qkv
    tokens, heads, head_dim = q.shape
    if tokens == 0 or cu_seqlens_q.shape[0] == 1:
        return
    with _on(q.device):
        plan.launch(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            **where,
            out=out,
            lse=_unread_lse(heads, tokens, q.device) if lse is None else lse,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
    record(plan.decision)


def _on_reference(plan: Plan, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    plan.launch(*tensors, **{name: value for name, value in options.items() if name != "backend"})
    record(plan.decision)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which `device` is the current one; free of charge where it already is."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _unread_lse(heads: int, tokens: int, device: torch.device) -> Tensor:
    """Memory for an lse that nobody reads, [heads, tokens] fp32.

    One buffer a device, shared by all streams since nothing is read. It doubles when it is too small, and an outgrown
    buffer is kept, because a captured graph may still write to it.
    """
    buffers = _unread.setdefault(device, [])
    if not buffers or buffers[-1].numel() < heads * tokens:
        size = 1 << max(16, (heads * tokens - 1).bit_length())
        buffers.append(torch.empty(size, dtype=torch.float32, device=device))
    return buffers[-1][: heads * tokens].view(heads, tokens)
