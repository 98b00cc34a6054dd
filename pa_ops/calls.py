"""Turns a call on CUDA tensors into a program, made once for each kind of call and then matched in C.

A kind is what options, overrides and the powers of two of the sizes say; within it a few programs differ in dtypes,
head sizes and layouts. A decode loop, whose lengths and batches change from step to step, keeps hitting one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pa_ops import reference
from pa_ops.checks import RULES, Arguments, Rule, Sizes
from pa_ops.environment import Settings
from pa_ops.errors import NoInstance
from pa_ops.overrides import REFERENCE, policy, token
from pa_ops.padded_steps import masked_steps
from pa_ops.program import Guard, Program
from pa_ops.registry import for_device
from pa_ops.schema import SCHEMAS, base_of
from pa_ops.steps import MAKERS, Step
from pa_ops.trace import Decision, record

KEPT = 8192  # kinds; the table is emptied at this size, a serving process needs some dozens
REFERENCES: dict[str, Callable[..., Any]] = {
    "paged_attention": reference.paged_attention,
    "paged_attention_": reference.paged_attention_,
    "varlen_attention": reference.varlen_attention,
    "attention": reference.attention,
    "append_kv": reference.append_kv,
    "gather_kv": reference.gather_kv,
    "merge_states": reference.merge_states,
}
ATTENTION = ("paged_attention", "paged_attention_", "varlen_attention")
_MAKERS = {**MAKERS, "attention": masked_steps}
REFERENCE_DECISIONS = {op: Decision(op, REFERENCE, REFERENCE, ()) for op in SCHEMAS}

_OPTIONS = ("sinks", "k_scale", "v_scale", "out", "lse", "workspace")
TENSORS: dict[str, tuple[str, ...]] = {
    "paged_attention": (
        "q",
        "k_cache",
        "v_cache",
        "cu_seqlens_q",
        "seqlens_k",
        "block_table",
        *_OPTIONS,
    ),
    "varlen_attention": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", *_OPTIONS),
    "paged_attention_": (
        "query",
        "key",
        "value",
        "k_cache",
        "v_cache",
        "cu_seqlens_q",
        "past_lens",
        "block_table",
        "cos",
        "sin",
        "slot_mapping",
        *_OPTIONS,
    ),
    "attention": ("q", "k", "v", "cu_seqlens_q", "kv_lengths", "mask", *_OPTIONS),
    "append_kv": ("slot_mapping", "key", "value", "k_cache", "v_cache", "k_scale", "v_scale"),
    "gather_kv": ("k", "v", "k_cache", "v_cache", "block_table", "cu_seqlens_k"),
    "merge_states": ("out_a", "lse_a", "out_b", "lse_b", "out", "lse"),
}
"""Operator -> the tensors that a program is called with, results among them; the first fixes the number of tokens."""

_OWN = (
    Rule("out", "T Hq Dv", ("out_a",), written=True),
    Rule("lse", "Hq T", (torch.float32,), written=True),
    Rule("workspace", "words", (torch.int32,), written=True),
)
_NUMBERS = ("softmax_scale", "causal", "sliding_window", "softcap", "backend")
NUMBERS: dict[str, tuple[str, ...]] = {
    "paged_attention": _NUMBERS,
    "varlen_attention": _NUMBERS,
    "paged_attention_": (*_NUMBERS, "num_heads", "num_kv_heads", "rotary_interleaved"),
    "append_kv": (),
    "gather_kv": (),
    "merge_states": (),
}
"""Operator -> the options that are no tensors, bounds left out: they enter a kind by their power of two."""

SIZED: dict[str, tuple[int, int]] = {
    "paged_attention": (0, 3),
    "varlen_attention": (0, 3),
    "paged_attention_": (0, 5),
    "append_kv": (4, 4),
    "gather_kv": (4, 3),
    "merge_states": (0, 0),
}
"""Operator -> the places of the tensors whose sizes, tokens and sequences, may rank kernels."""

STEADY = tuple(op for op in SCHEMAS if base_of(op) in SIZED)
"""Operators that kernels in C serve once a program is kept."""

_KINDS = {op: (NUMBERS[base_of(op)], *SIZED[base_of(op)]) for op in STEADY}

Key = tuple[object, ...]


class Plan(NamedTuple):
    """What serves a kind of call: a program and the function that runs it, none where the reference answers.

    decisions: why, one a launch. settings: those that were obeyed, held because the kind has their id.
    """

    program: Program | None
    run: Callable[..., int]
    decisions: tuple[Decision, ...]
    settings: Settings


_plans: dict[Key, list[Plan]] = {}


def kind_of(op: str, tensors: tuple[Tensor, ...], options: dict[str, Any], now: Settings) -> Key:
    """The kind of a call: positional `tensors` and keyword `options` as the dispatcher hands them over."""
    get = options.get
    numbers, tokens, sequences = _KINDS[op]
    return (
        op,
        tensors[tokens].numel().bit_length(),
        tensors[sequences].numel().bit_length(),
        _size_class(get("max_seqlen_q")),
        _size_class(get("max_seqlen_k")),
        *map(get, numbers),
        *token(now),
    )


def _size_class(bound: int | None) -> int | None:
    """The power of two of a bound; one that is not allowed stands for itself."""
    return bound if bound is None or bound < 0 else bound.bit_length()


def known(kind: Key) -> list[Plan]:
    """The plans of a kind so far."""
    return _plans.get(kind, [])


def plan_of(kind: Key, op: str, arguments: Arguments, sizes: Sizes, now: Settings) -> Plan:
    """A plan for a call that was checked, kept for others of its kind; raises NoInstance where no kernel serves it."""
    plan = _make(op, arguments, sizes, now)
    if plan.program is not None:
        if len(_plans) >= KEPT:
            _plans.clear()
        _plans.setdefault(kind, []).append(plan)
    return plan


def launched(plan: Plan, given: tuple[Tensor | None, ...]) -> int:
    """1: the plan's program fits and its kernels are on their way, 2: it fits and has no rows to do, 0: neither."""
    done = 0 if plan.program is None else plan.run(plan.program.address, *given)
    if done == 1:
        record(plan.settings, *plan.decisions)
    return done


def _make(op: str, arguments: Arguments, sizes: Sizes, now: Settings) -> Plan:
    base = base_of(op)
    if base in ATTENTION and policy(arguments["backend"]).backend == REFERENCE:
        return Plan(None, _nothing, (REFERENCE_DECISIONS[op],), now)
    scales = [name for name in ("k_scale", "v_scale") if arguments.get(name) is not None]
    if scales:
        raise NoInstance(f"{op}: no kernel takes {' or '.join(scales)}; CPU tensors, and backend='reference', do")
    registry = for_device(arguments[TENSORS[base][0]].device.index or 0)
    steps = tuple(_MAKERS[base](op, arguments, sizes, registry))
    program = program_of(op, arguments, steps)
    return Plan(program, registry.caller(), tuple(step.decision for step in steps), now)


def program_of(op: str, arguments: Arguments, steps: Sequence[Step]) -> Program:
    """The program that launches `steps` for calls like the one with these arguments."""
    base = base_of(op)
    aligned = {name for step in steps for name in step.aligned}
    rules = {rule.argument: rule for rule in (*_OWN, *RULES.get(f"{base}.out", RULES[base]))}
    guards = [Guard(rules[name], arguments.get(name), name in aligned) for name in TENSORS[base]]
    device = arguments[TENSORS[base][0]].device.index or 0
    return Program(device, guards, [step.launch for step in steps])


def _nothing(*_: object) -> int:
    return 0
