"""Turns an operator call on CUDA tensors into kernel launches, with no copy to the host and no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pa_ops.calls import REFERENCES, Plan, Step, find
from pa_ops.checked import check_values
from pa_ops.environment import settings
from pa_ops.faults import mask_of
from pa_ops.launch import address
from pa_ops.schema import base_of, signature
from pa_ops.trace import record

Results = tuple[Tensor, Tensor]
Tensors = tuple[Tensor | None, ...]
Options = dict[str, Any]


def _attention(op: str) -> Callable[..., Results]:
    """An attention operator that allocates its results; rows past cu_seqlens_q[-1] keep what was there before."""

    def run(*tensors: Tensor, **options: Any) -> Results:
        plan = _plan(op, tensors, options)
        q, v = tensors[0], tensors[2]
        tokens, heads, _ = q.shape
        out = q.new_empty((tokens, heads, v.shape[-1]))
        lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
        _attend(op, plan, tensors, options, out, lse)
        return out, lse

    return run


def _attention_out(op: str) -> Callable[..., None]:
    """An attention operator that writes into the caller's buffers."""

    def run(*tensors: Tensor, **options: Any) -> None:
        _attend(op, _plan(op, tensors, options), tensors, options, options["out"], options.get("lse"))

    return run


def paged_attention_(*tensors: Tensor, **options: Any) -> Tensor:
    """torch.ops.pa_ops.paged_attention_ on CUDA tensors."""
    plan = _plan("paged_attention_", tensors, options)
    query, k_cache = tensors[0], tensors[3]
    out = query.new_empty((query.shape[0], options["num_heads"] * k_cache.shape[3]))
    _serve("paged_attention_", plan, tensors, options, out, None)
    return out


def paged_attention_out_(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.paged_attention_.out on CUDA tensors."""
    op = "paged_attention_.out"
    _serve(op, _plan(op, tensors, options), tensors, options, options["out"], options.get("lse"))


def append_kv(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.append_kv on CUDA tensors."""
    [step] = _plan("append_kv", tensors, options).steps
    key, value, k_cache, v_cache, slot_mapping = map(address, tensors)
    if step.launch is not None and tensors[4].shape[0]:
        faults = address(mask_of(step.launch.device))
        step.launch(0, key, value, 0, k_cache, v_cache, 0, 0, slot_mapping, 0, 0, 0, faults)
        record(step.decision)


def merge_states(*tensors: Tensor) -> Results:
    """torch.ops.pa_ops.merge_states on CUDA tensors."""
    [step] = _plan("merge_states", tensors, {}).steps
    out_a, lse_a, _, _ = tensors
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    if step.launch is not None and out_a.shape[0]:
        step.launch(*map(address, (*tensors, out, lse)))
        record(step.decision)
    return out, lse


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "paged_attention": _attention("paged_attention"),
    "paged_attention.out": _attention_out("paged_attention.out"),
    "paged_attention_": paged_attention_,
    "paged_attention_.out": paged_attention_out_,
    "varlen_attention": _attention("varlen_attention"),
    "varlen_attention.out": _attention_out("varlen_attention.out"),
    "append_kv": append_kv,
    "merge_states": merge_states,
}
"""Operator and overload -> what the dispatcher calls for CUDA tensors."""


def _plan(op: str, tensors: Tensors, options: Options) -> Plan:
    now = settings()
    plan = find(op, tensors, options, now)
    if now.checked and not _capturing():
        check_values(op, signature(op).bind(tensors, options))
    return plan


def _refer(op: str, plan: Plan, tensors: Tensors, options: Options, **buffers: Tensor | None) -> None:
    """Runs the reference; `options` are what the caller gave, without defaults."""
    given = {name: value for name, value in options.items() if name not in ("backend", "out", "lse")}
    REFERENCES[base_of(op)](*tensors, **given, **buffers)
    record(plan.steps[0].decision)


def _attend(
    op: str, plan: Plan, tensors: tuple[Tensor, ...], options: Options, out: Tensor, lse: Tensor | None
) -> None:
    """Launches the plan's kernel, or runs the reference."""
    q, k, v, cu_seqlens_q, lengths, *table = tensors
    if q.shape[0] == 0 or cu_seqlens_q.shape[0] == 1:
        return
    [step] = plan.steps
    if step.launch is None:
        return _refer(op, plan, tensors, options, out=out, lse=lse)
    pages, sinks = address(table[0] if table else None), address(options.get("sinks"))
    step.launch(*map(address, (q, k, v, out, lse, cu_seqlens_q, lengths)), pages, sinks)
    record(step.decision)


def _serve(op: str, plan: Plan, tensors: tuple[Tensor, ...], options: Options, out: Tensor, lse: Tensor | None) -> None:
    """Launches the plan's kernels, or runs the reference."""
    if tensors[0].shape[0] == 0 or tensors[5].shape[0] == 1:
        return
    if plan.on_reference:
        return _refer(op, plan, tensors, options, out=out, lse=lse)
    serve(plan.steps, tensors, options, out, lse)


def serve(steps: tuple[Step, ...], tensors: Tensors, options: Options, out: Tensor, lse: Tensor | None) -> None:
    """The serving operator's two launches: store (and rotate) into the caches and `out`, then attend from there."""
    query, key, value, k_cache, v_cache, *where = map(address, tensors)
    pages = tensors[3]
    if tensors[1] is None and pages is not None:
        head_bytes = pages.shape[3] * out.element_size()
        key = query + options["num_heads"] * head_bytes
        value = key + options["num_kv_heads"] * head_bytes
    target = out.data_ptr()
    rotated = options.get("cos") is not None
    tables = map(address, (options.get("cos"), options.get("sin"), options.get("slot_mapping")))
    turned = (query, target) if rotated else (0, 0)
    append, attend = steps
    assert append.launch is not None and attend.launch is not None
    faults = address(mask_of(append.launch.device))
    append.launch(turned[0], key, value, turned[1], k_cache, v_cache, *tables, *where, faults)
    record(append.decision)
    q = target if rotated else query
    attend.launch(q, k_cache, v_cache, target, address(lse), *where, address(options.get("sinks")))
    record(attend.decision)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
