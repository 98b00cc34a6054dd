"""Turns a call on CUDA tensors into a plan, checked and selected once for each key of shapes, strides and overrides.

Upper bounds enter a key by their power of two, so that a decode loop, whose bound grows, keeps hitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pa_ops import reference
from pa_ops.checks import RULES, Arguments, Sizes, validate
from pa_ops.environment import Settings
from pa_ops.errors import NoInstance
from pa_ops.launch import Launch, append_launch, attention_launch, merge_launch
from pa_ops.manifest import Entry
from pa_ops.overrides import REFERENCE, policy, token
from pa_ops.problem import Problem
from pa_ops.reference_serving import split
from pa_ops.registry import Kernel, for_device
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

REFERENCES: dict[str, Callable[..., Any]] = {
    "paged_attention": reference.paged_attention,
    "paged_attention_": reference.paged_attention_,
    "varlen_attention": reference.varlen_attention,
    "append_kv": reference.append_kv,
    "merge_states": reference.merge_states,
}
ATTENTION = ("paged_attention", "paged_attention_", "varlen_attention")
REFERENCE_DECISIONS = {op: Decision(op, REFERENCE, REFERENCE, ()) for op in SCHEMAS}

Key = tuple[object, ...]
_BOUNDS = ("max_seqlen_q", "max_seqlen_k")


class Step(NamedTuple):
    """One launch of a plan (none where the torch reference answers), and the record of why it is this one."""

    launch: Launch | None
    decision: Decision


class Plan(NamedTuple):
    """What serves a key: its steps in order, and the settings that were obeyed, held because the key has their id."""

    steps: tuple[Step, ...]
    settings: Settings

    @property
    def on_reference(self) -> bool:
        """Whether the torch reference answers."""
        return self.steps[0].launch is None


_plans: dict[Key, Plan] = {}


def find(op: str, tensors: tuple[Tensor | None, ...], options: dict[str, Any], now: Settings) -> Plan:
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


def _key(op: str, tensors: tuple[Tensor | None, ...], options: dict[str, Any], now: Settings) -> Key:
    parts: list[object] = [op, torch.is_grad_enabled(), *token(options.get("backend", AUTO), now)]
    parts += [None if tensor is None else _facts(tensor) for tensor in tensors]
    for name, value in options.items():
        if isinstance(value, Tensor):
            value = _facts(value)
        elif name in _BOUNDS and value is not None and value >= 0:
            value = value.bit_length()
        parts += (name, value)
    return tuple(parts)


def _make(op: str, arguments: Arguments, now: Settings) -> Plan:
    sizes = validate(op, arguments)
    if base_of(op) in ATTENTION and policy(arguments["backend"]).backend == REFERENCE:
        return Plan((Step(None, REFERENCE_DECISIONS[op]),), now)
    scales = [name for name in ("k_scale", "v_scale") if arguments.get(name) is not None]
    if scales:
        raise NoInstance(f"{op}: no kernel takes {' or '.join(scales)}; CPU tensors, and backend='reference', do")
    return Plan(tuple(MAKERS[base_of(op)](op, arguments, sizes)), now)


def _select(op: str, problem: Problem, arguments: Arguments) -> tuple[Kernel, Entry, Decision]:
    """The kernel that serves `problem`, its row, and the record of the choice."""
    registry = for_device(arguments[RULES[op][0].argument].device.index)
    selection = registry.select(problem, arguments.get("backend", AUTO))
    decision = Decision(op, str(selection.family), selection.instance, tuple(map(str, selection.reasons)))
    return registry.kernel(selection.entry), selection.entry, decision


def _attention_steps(op: str, arguments: Arguments, sizes: Sizes) -> Iterator[Step]:
    kernel, entry, decision = _select(op, problem_of(op, arguments, sizes), arguments)
    k, v = ("k_cache", "v_cache") if base_of(op) == "paged_attention" else ("k", "v")
    launch = attention_launch(
        kernel,
        entry.spec,
        q=arguments["q"],
        k=arguments[k],
        v=arguments[v],
        cu_seqlens_q=arguments["cu_seqlens_q"],
        block_table=arguments.get("block_table"),
        out=arguments.get("out"),
        lse=arguments.get("lse"),
        **_options(arguments),
    )
    yield Step(launch, decision)


def _options(arguments: Arguments) -> dict[str, Any]:
    """The options of attention that a launch takes; a bound stands for every bound of its key."""
    bound = arguments["max_seqlen_q"]
    return {
        "sinks": arguments["sinks"],
        "softmax_scale": arguments["softmax_scale"],
        "sliding_window": arguments["sliding_window"],
        "softcap": arguments["softcap"],
        "max_seqlen_q": None if bound is None else (1 << bound.bit_length()) - 1,
    }


def _append_steps(op: str, arguments: Arguments, sizes: Sizes) -> Iterator[Step]:
    kernel, _, decision = _select(op, problem_of(op, arguments, sizes), arguments)
    names = ("key", "value", "k_cache", "v_cache")
    yield Step(append_launch(kernel, tokens=sizes["T"], **{name: arguments[name] for name in names}), decision)


def _merge_steps(op: str, arguments: Arguments, sizes: Sizes) -> Iterator[Step]:
    kernel, entry, decision = _select(op, problem_of(op, arguments, sizes), arguments)
    names = ("out_a", "lse_a", "out_b", "lse_b")
    yield Step(merge_launch(kernel, entry.spec, **{name: arguments[name] for name in names}), decision)


def _serving_steps(op: str, arguments: Arguments, sizes: Sizes) -> Iterator[Step]:
    """Store and rotate, then attend. Rotated queries wait in the output: a block reads its rows, then writes them."""
    heads = (sizes["Hq"], sizes["Hkv"])
    query, key, value = split(arguments["query"], arguments["key"], arguments["value"], *heads, sizes["D"])
    out = arguments.get("out")
    if out is None:
        out = query.new_empty(query.shape[0], sizes["Hq"] * sizes["D"])
    rows = out.view(query.shape)
    rotated = arguments["cos"] is not None
    view = {
        **arguments,
        "q": rows if rotated else query,
        "key": key,
        "value": value,
        "out": rows,
    }
    sizes = {**sizes, "Dv": sizes["D"]}
    kernel, _, decision = _select(op, problem_of("append_kv", view, sizes), arguments)
    append = append_launch(
        kernel,
        key=key,
        value=value,
        k_cache=arguments["k_cache"],
        v_cache=arguments["v_cache"],
        tokens=sizes["T"],
        query=query if rotated else None,
        query_out=rows if rotated else None,
        cos=arguments["cos"],
        sin=arguments["sin"],
        interleaved=arguments["rotary_interleaved"],
        sequences=sizes["B"],
        block_table=arguments["block_table"],
    )
    yield Step(append, decision)
    kernel, entry, decision = _select(op, problem_of("paged_attention", view, sizes), arguments)
    attend = attention_launch(
        kernel,
        entry.spec,
        q=view["q"],
        k=arguments["k_cache"],
        v=arguments["v_cache"],
        cu_seqlens_q=arguments["cu_seqlens_q"],
        block_table=arguments["block_table"],
        out=rows,
        lse=arguments.get("lse"),
        past_lengths=True,
        **_options(arguments),
    )
    yield Step(attend, decision)


MAKERS: dict[str, Callable[[str, Arguments, Sizes], Iterator[Step]]] = {
    "paged_attention": _attention_steps,
    "varlen_attention": _attention_steps,
    "paged_attention_": _serving_steps,
    "append_kv": _append_steps,
    "merge_states": _merge_steps,
}


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
