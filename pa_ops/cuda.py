"""Turns an operator call on CUDA tensors into kernel launches, with no copy to the host and no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pa_ops import scratch
from pa_ops.calls import REFERENCES, TENSORS, Plan, kind_of, known, launched, plan_of
from pa_ops.checked import check_values
from pa_ops.checks import validate
from pa_ops.environment import settings
from pa_ops.native import keep
from pa_ops.padded import attention
from pa_ops.schema import base_of, signature
from pa_ops.trace import record

Results = tuple[Tensor, Tensor]
Given = tuple[Tensor | None, ...]
Options = dict[str, Any]


def _attention(op: str) -> Callable[..., Results]:
    """An attention operator that allocates its results; rows past cu_seqlens_q[-1] keep what was there before."""

    def run(*tensors: Tensor, **options: Any) -> Results:
        q, v = tensors[0], tensors[2]
        out = q.new_empty(q.shape[:2] + v.shape[-1:])
        lse = torch.empty(q.shape[1::-1], dtype=torch.float32, device=q.device)
        _run(op, tensors, options, _attention_given(tensors, options, out, lse))
        return out, lse

    return run


def _attention_out(op: str) -> Callable[..., None]:
    """An attention operator that writes into the caller's buffers."""

    def run(*tensors: Tensor, **options: Any) -> None:
        _run(op, tensors, options, _attention_given(tensors, options, options["out"], options.get("lse")))

    return run


def _attention_given(tensors: tuple[Tensor, ...], options: Options, out: Tensor, lse: Tensor | None) -> Given:
    get = options.get
    return (*tensors, get("sinks"), get("k_scale"), get("v_scale"), out, lse, scratch.workspace_for(out))


def paged_attention_(*tensors: Tensor, **options: Any) -> Tensor:
    """torch.ops.pa_ops.paged_attention_ on CUDA tensors."""
    query, k_cache = tensors[0], tensors[3]
    width = max(options["num_heads"], 0) * (k_cache.shape[-1] if k_cache.dim() else 0)
    out = query.new_empty((*query.shape[:1], width))
    _run("paged_attention_", tensors, options, _serving_given(tensors, options, out, None))
    return out


def paged_attention_out_(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.paged_attention_.out on CUDA tensors."""
    given = _serving_given(tensors, options, options["out"], options.get("lse"))
    _run("paged_attention_.out", tensors, options, given)


def _serving_given(tensors: tuple[Tensor, ...], options: Options, out: Tensor, lse: Tensor | None) -> Given:
    get = options.get
    turns = (get("cos"), get("sin"), get("slot_mapping"))
    return (*tensors, *turns, get("sinks"), get("k_scale"), get("v_scale"), out, lse, scratch.workspace_for(out))


def append_kv(*tensors: Tensor, **options: Any) -> None:
    """torch.ops.pa_ops.append_kv on CUDA tensors."""
    given = (tensors[4], *tensors[:4], options.get("k_scale"), options.get("v_scale"))
    _run("append_kv", tensors, options, given)


def gather_kv(*tensors: Tensor) -> None:
    """torch.ops.pa_ops.gather_kv on CUDA tensors."""
    _run("gather_kv", tensors, {}, (*tensors[4:], *tensors[:4]))


def merge_states(*tensors: Tensor) -> Results:
    """torch.ops.pa_ops.merge_states on CUDA tensors."""
    out, lse = (torch.empty_like(side, memory_format=torch.contiguous_format) for side in tensors[:2])
    _run("merge_states", tensors, {}, (*tensors, out, lse))
    return out, lse


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "paged_attention": _attention("paged_attention"),
    "paged_attention.out": _attention_out("paged_attention.out"),
    "paged_attention_": paged_attention_,
    "paged_attention_.out": paged_attention_out_,
    "varlen_attention": _attention("varlen_attention"),
    "varlen_attention.out": _attention_out("varlen_attention.out"),
    "attention": attention,
    "append_kv": append_kv,
    "gather_kv": gather_kv,
    "merge_states": merge_states,
}
"""Operator and overload -> what the dispatcher calls for CUDA tensors."""


def _run(op: str, tensors: tuple[Tensor, ...], options: Options, given: Given) -> None:
    """Runs the plan that fits; checks the call and makes one where none does. `given` are a program's tensors."""
    now = settings()
    kind = kind_of(op, tensors, options, now)
    plans = known(kind)
    if not now.checked and not _wants_grad(given):
        try:
            for plan in plans:
                if _launched(plan, given):
                    return
        except (BufferError, RuntimeError):
            validate(op, signature(op).bind(tensors, options))  # says more of a tensor that cannot be handed over
            raise
    arguments = signature(op).bind(tensors, options)
    sizes = validate(op, arguments)
    if now.checked and not torch.cuda.is_current_stream_capturing():
        check_values(op, arguments)
    if sizes["T"] == 0 or sizes.get("B") == 0:
        return
    if now.checked and any(_launched(plan, given) for plan in plans):
        return
    named = dict(zip(TENSORS[base_of(op)], given, strict=True))
    plan = plan_of(kind, op, {**arguments, **named}, sizes, now)
    if plan.program is None:
        _refer(op, tensors, options, {name: named[name] for name in ("out", "lse") if named[name] is not None})
        record(now, *plan.decisions)
    elif not _launched(plan, given):
        raise AssertionError(f"{op}: a program does not fit the call that it was made for")


def _wants_grad(given: Given) -> bool:
    """Whether a backward would be expected; a plain loop, for it runs in every call."""
    if torch.is_grad_enabled():
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _launched(plan: Plan, given: Given) -> bool:
    """Whether the plan's program fits and its kernels are on their way, or there are no rows to do."""
    done = launched(plan, given)
    if done == 1:
        keep(plan)
    return bool(done)


def _refer(op: str, tensors: tuple[Tensor, ...], options: Options, results: dict[str, Tensor | None]) -> None:
    """Runs the reference into the results; `options` are what the caller gave, without defaults."""
    given = {name: value for name, value in options.items() if name != "backend"}
    REFERENCES[base_of(op)](*tensors, **{**given, **results})
