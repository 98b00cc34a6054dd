"""Turns a call on CUDA tensors into a plan, checked and selected once for each key of shapes, strides and overrides.

Upper bounds enter a key by their power of two, so that a decode loop, whose bound grows, keeps hitting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pa_ops import reference
from pa_ops.checks import RULES, Arguments, Sizes, validate
from pa_ops.environment import Settings
from pa_ops.errors import NoInstance
from pa_ops.launch import run_append, run_attention, run_merge
from pa_ops.overrides import REFERENCE, policy, token
from pa_ops.problem import Problem
from pa_ops.registry import for_device
from pa_ops.schema import SCHEMAS, base_of, signature
from pa_ops.selection import AUTO
from pa_ops.trace import Decision

KEPT = 8192  # the table is emptied at this size; a serving process needs some dozens
ALIGNMENT = 16  # bytes; what `Problem.aligned` promises
WORD = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}

LAUNCHES: dict[str, Callable[..., None]] = {
    "paged_attention": run_attention,
    "varlen_attention": run_attention,
    "append_kv": run_append,
    "merge_states": run_merge,
}
REFERENCES: dict[str, Callable[..., Any]] = {
    "paged_attention": reference.paged_attention,
    "paged_attention_": reference.paged_attention_,
    "varlen_attention": reference.varlen_attention,
    "append_kv": reference.append_kv,
    "merge_states": reference.merge_states,
}
ATTENTION = ("paged_attention", "varlen_attention")
REFERENCE_DECISIONS = {op: Decision(op, REFERENCE, REFERENCE, ()) for op in SCHEMAS}

Key = tuple[object, ...]
_BOUNDS = ("max_seqlen_q", "max_seqlen_k")


class Plan(NamedTuple):
    """What serves a key: a kernel's launch or the torch reference, the record of why, the settings that were obeyed.

    The settings are held because the key contains their id.
    """

    launch: Callable[..., object]
    on_reference: bool
    decision: Decision
    settings: Settings


_plans: dict[Key, Plan] = {}


def find(op: str, tensors: tuple[Tensor, ...], options: dict[str, Any], now: Settings) -> Plan:
    """The plan of a call: positional `tensors` and keyword `options` as the dispatcher hands them over.

    Raises InvalidArgument for a call that breaks a rule, NoInstance where no kernel serves it.
    """
    key = _key(op, tensors, options, now)
    plan = _plans.get(key)
    if plan is None:
        plan = _make(op, signature(op).bind(tensors, options), now)
        if len(_plans) >= KEPT:
            _plans.clear()
        _plans[key] = plan
    return plan


def _facts(tensor: Tensor) -> Key:
    """What checks and selection look at, and whether the base pointer is 16-byte aligned."""
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.data_ptr() % ALIGNMENT,
        tensor.requires_grad,
    )


def _key(op: str, tensors: tuple[Tensor, ...], options: dict[str, Any], now: Settings) -> Key:
    parts: list[object] = [op, torch.is_grad_enabled(), *token(options.get("backend", AUTO), now)]
    parts += map(_facts, tensors)
    for name, value in options.items():
        if isinstance(value, Tensor):
            value = _facts(value)
        elif name in _BOUNDS and value is not None and value >= 0:
            value = value.bit_length()
        parts += (name, value)
    return tuple(parts)


def _make(op: str, arguments: Arguments, now: Settings) -> Plan:
    sizes = validate(op, arguments)
    backend = arguments.get("backend", AUTO)
    if base_of(op) in ATTENTION and policy(backend).backend == REFERENCE:
        return Plan(REFERENCES[base_of(op)], True, REFERENCE_DECISIONS[op], now)
    scales = [name for name in ("k_scale", "v_scale") if arguments.get(name) is not None]
    if scales:
        raise NoInstance(f"{op}: no kernel takes {' or '.join(scales)}; CPU tensors, and backend='reference', do")
    problem = problem_of(op, arguments, sizes)
    registry = for_device(arguments[RULES[op][0].argument].device.index)
    selection = registry.select(problem, backend)
    reasons = tuple(map(str, selection.reasons))
    decision = Decision(op, str(selection.family), selection.instance, reasons)
    run = LAUNCHES[base_of(op)]
    return Plan(partial(run, registry.kernel(selection.entry), selection.entry), False, decision, now)


def problem_of(op: str, arguments: Arguments, sizes: Sizes) -> Problem:
    """The problem that a checked call poses; raises InvalidArgument."""
    name = base_of(op)
    if name == "merge_states":
        dtype = WORD[arguments["out_a"].dtype]
        return Problem(op=name, dtype=dtype, head_dim=sizes["Dv"], num_heads=sizes["Hq"], tokens=sizes["T"])
    if name == "append_kv":
        return Problem(
            op=name,
            dtype=WORD[arguments["key"].dtype],
            kv_dtype=WORD[arguments["k_cache"].dtype],
            head_dim=sizes["D"],
            head_dim_v=sizes["Dv"],
            num_heads=sizes["Hkv"],
            page_size=sizes["page_size"],
            aligned=_aligned(arguments, "key", "value", "k_cache", "v_cache"),
            tokens=sizes["T"],
        )
    k, v = ("k_cache", "v_cache") if name == "paged_attention" else ("k", "v")
    return Problem(
        op=name,
        dtype=WORD[arguments["q"].dtype],
        kv_dtype=WORD[arguments[k].dtype],
        head_dim=sizes["D"],
        head_dim_v=sizes["Dv"],
        num_heads=sizes["Hq"],
        num_kv_heads=sizes["Hkv"],
        causal=arguments["causal"],
        window=arguments["sliding_window"] > 0,
        softcap=arguments["softcap"] > 0,
        sinks=arguments["sinks"] is not None,
        page_size=sizes.get("page_size"),
        aligned=_aligned(arguments, "q", k, v, "out"),
        batch=sizes["B"],
        tokens=sizes["T"],
        max_q=arguments["max_seqlen_q"],
        max_k=arguments["max_seqlen_k"],
    )


def _aligned(arguments: Arguments, *names: str) -> bool:
    """Whether every row of the tensors starts at a multiple of 16 bytes; a tensor still to be allocated does."""
    return all(_rows_aligned(tensor) for name in names if (tensor := arguments.get(name)) is not None)


def _rows_aligned(tensor: Tensor) -> bool:
    steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    strides = [stride for size, stride in steps if size > 1]
    return tensor.data_ptr() % ALIGNMENT == 0 and all(s * tensor.element_size() % ALIGNMENT == 0 for s in strides)
