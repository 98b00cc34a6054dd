"""Turns an operator call on CUDA tensors into one kernel launch, with no copy to the host and no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pa_ops.calls import Plan, find
from pa_ops.checked import check_values
from pa_ops.environment import settings
from pa_ops.errors import NoInstance  # placeholder
from pa_ops.schema import signature
from pa_ops.trace import record

Results = tuple[Tensor, Tensor]

_unread: dict[torch.device, list[Tensor]] = {}
_HERE: AbstractContextManager[Any] = nullcontext()


def _attention(op: str) -> Callable[..., Results]:
    """An attention operator that allocates its results; rows past cu_seqlens_q[-1] keep what was there before."""

    def run(*tensors: Tensor, **options: Any) -> Results:
        plan = _plan(op, tensors, options)
        q, v = tensors[0], tensors[2]
        tokens, heads, _ = q.shape
        out = q.new_empty((tokens, heads, v.shape[-1]))
        lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
        _attend(plan, tensors, options, out, lse)
        return out, lse

    return run


def _attention_out(op: str) -> Callable[..., None]:
    """An attention operator that writes into the caller's buffers."""

    def run(*tensors: Tensor, **options: Any) -> None:
        _attend(_plan(op, tensors, options), tensors, options, options["out"], options.get("lse"))

    return run


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


def paged_attention_(*tensors: Tensor | None, **options: Any) -> None:  # placeholder
    """torch.ops.pa_ops.paged_attention_ on CUDA tensors."""  # placeholder
    raise NoInstance("not built yet")  # placeholder


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "paged_attention": _attention("paged_attention"),
    "paged_attention.out": _attention_out("paged_attention.out"),
    "paged_attention_": paged_attention_,  # placeholder
    "paged_attention_.out": paged_attention_,  # placeholder
    "varlen_attention": _attention("varlen_attention"),
    "varlen_attention.out": _attention_out("varlen_attention.out"),
    "append_kv": append_kv,
    "merge_states": merge_states,
}
"""Operator and overload -> what the dispatcher calls for CUDA tensors."""


def _plan(op: str, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Plan:
    now = settings()
    plan = find(op, tensors, options, now)
    if now.checked and not _capturing():
        check_values(op, signature(op).bind(tensors, options))
    return plan


def _attend(plan: Plan, tensors: tuple[Tensor, ...], options: dict[str, Any], out: Tensor, lse: Tensor | None) -> None:
    """Launches the plan's kernel, or runs the reference; `options` are what the caller gave, without defaults."""
    q, k, v, cu_seqlens_q, *where = tensors
    tokens, heads, head_dim = q.shape
    if tokens == 0 or cu_seqlens_q.shape[0] == 1:
        return
    if plan.on_reference:
        given = {name: value for name, value in options.items() if name not in ("backend", "out", "lse")}
        plan.launch(*tensors, **given, out=out, lse=lse)
    else:
        scale = options.get("softmax_scale")
        paged = len(where) == 2
        with _on(q.device):
            plan.launch(
                q=q,
                k=k,
                v=v,
                cu_seqlens_q=cu_seqlens_q,
                seqlens_k=where[0] if paged else None,
                cu_seqlens_k=None if paged else where[0],
                block_table=where[1] if paged else None,
                out=out,
                lse=_unread_lse(heads, tokens, q.device) if lse is None else lse,
                softmax_scale=head_dim**-0.5 if scale is None else scale,
                causal=options.get("causal", True),
                sliding_window=options.get("sliding_window", 0),
                softcap=options.get("softcap", 0.0),
                sinks=options.get("sinks"),
                max_seqlen_q=options.get("max_seqlen_q"),
                max_seqlen_k=options.get("max_seqlen_k"),
            )
    record(plan.decision)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


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
