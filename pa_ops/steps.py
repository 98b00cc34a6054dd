"""Turns a checked call on CUDA tensors into its launches: which kernels, in which order, and why these.

Attention is one launch, or two that share a batch's sequences or tiles out; the serving operator stores first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pa_ops.checks import INT32_MAX, Arguments, Sizes
from pa_ops.faults import mask_of
from pa_ops.heuristics import SPLITTING, Division, certain_division, division, extremes, runs_beside
from pa_ops.launch import (
    ALIGNMENT,
    Attention,
    Keys,
    Rows,
    Scores,
    Setting,
    attention_launch,
    decode_launch,
    persistent_launch,
)
from pa_ops.launch_rows import Rotary, append_launch, gather_launch, merge_launch
from pa_ops.manifest import Entry
from pa_ops.overrides import policy
from pa_ops.portions import Portion, shared_out, whole
from pa_ops.problem import Problem
from pa_ops.program import Launch
from pa_ops.registry import Registry
from pa_ops.schema import base_of
from pa_ops.selection import AUTO, Selection
from pa_ops.spec import EIGHT, PAIR, Family
from pa_ops.trace import Decision

WORD = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}


class Step(NamedTuple):
    """One launch, the record of why it is this one, the tensors whose rows it takes to be 16-byte aligned."""

    launch: Launch
    decision: Decision
    aligned: tuple[str, ...]


def selected(op: str, problem: Problem, arguments: Arguments, registry: Registry) -> tuple[int, Entry, Decision]:
    """The kernel that serves `problem`, its row, and the record of the choice."""
    selection = registry.serve(problem, arguments.get("backend", AUTO))
    return registry.kernel(selection.entry), selection.entry, _decision(op, selection)


def _scores(arguments: Arguments, head_dim: int) -> Scores:
    """The options of attention that are numbers; a bound stands for every bound of its kind."""
    scale, bound = arguments["softmax_scale"], arguments["max_seqlen_q"]
    return Scores(
        head_dim**-0.5 if scale is None else scale,
        arguments["sliding_window"],
        arguments["softcap"],
        None if bound is None else (1 << bound.bit_length()) - 1,
    )


def attention_of(arguments: Arguments, sizes: Sizes, q: Rows, out: Rows, keys: Keys) -> Attention:
    """The attention that a call asks for, of these rows and keys."""
    lse = None if arguments["lse"] is None else "lse"
    heads, head_dim = sizes["Hq"], sizes["D"]
    scores = _scores(arguments, head_dim)
    return Attention(q, out, keys, heads, head_dim, sizes["Dv"], scores, lse, arguments["sinks"])


def _attention_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    paged = base_of(op) == "paged_attention"
    k, v, lengths = ("k_cache", "v_cache", "seqlens_k") if paged else ("k", "v", "cu_seqlens_k")
    keys = Keys(k, v, lengths, sizes["Hkv"], sizes.get("page_size", 0))
    call = attention_of(arguments, sizes, Rows.of("q"), Rows.of("out"), keys)
    problem = problem_of(op, arguments, sizes)
    yield from _attend(op, problem, arguments, registry, call, ("q", k, v, "out"), stored=False)


def _attend(
    op: str,
    problem: Problem,
    arguments: Arguments,
    registry: Registry,
    call: Attention,
    aligned: tuple[str, ...],
    *,
    stored: bool,
) -> Iterator[Step]:
    """One launch, or two that share the sequences of a paged batch out: those of few query rows, and the others. The
    others' may be two again, that share their tiles out.

    stored: the launch before them stores this call's keys, and nothing else that they read.
    """
    few, many = _division(problem, arguments, registry)
    limit = 0 if few is None else few.entry.spec.tile.m // problem.group
    invariant, sms = policy(arguments["backend"]).batch_invariant, registry.capability.num_sms
    beside = few is not None and many is not None and not invariant and runs_beside(problem, many.family)
    if few is not None:
        launch = decode_launch(
            registry.kernel(few.entry),
            few.entry.spec,
            call,
            causal=arguments["causal"] or problem.window,
            skip_above=INT32_MAX if many is None else limit,
            lengths_ready=stored,
            invariant=invariant,
            beside=beside,
            capability=registry.capability,
        )
        yield Step(launch, _decision(op, few), aligned)
    if many is not None:
        for entry, portion in _grids(many.entry, registry, arguments[call.keys.k].device.index or 0):
            kernel, setting = registry.kernel(entry), Setting(sms, portion, limit, beside, invariant)
            launch = LAUNCHES[entry.spec.family](kernel, entry.spec, call, setting)
            yield Step(launch, _decision(op, replace(many, entry=entry)), aligned)


def _grids(entry: Entry, registry: Registry, device: int) -> Iterator[tuple[Entry, Portion]]:
    """The kernels that share the tiles out, and the portion of each: one with all of them, or clusters of eight and
    pairs beside them, where those are built."""
    sms, tile = registry.capability.num_sms, entry.spec.tile
    pairs = registry.sibling(entry, PAIR) if tile.cluster == EIGHT else None
    if pairs is None:
        yield entry, whole(sms, tile.cluster)
        return
    for portion in shared_out(sms, registry.clusters(entry, device)):
        yield (entry if portion.cluster == EIGHT else pairs), portion


def _division(problem: Problem, arguments: Arguments, registry: Registry) -> tuple[Selection | None, Selection | None]:
    """The kernels for sequences of few query rows and for the others; None where all go to the one that is there.

    A batch is divided only between a splitting family and one that is not, which have launches of their own; whatever
    else the extremes are served by, the choice for the problem itself serves it whole.
    """
    backend = arguments["backend"]
    few, many = (registry.serve(extreme, backend).family for extreme in extremes(problem))
    if few not in SPLITTING or many in SPLITTING:
        chosen = registry.serve(problem, backend)
        return (chosen, None) if chosen.family in SPLITTING else (None, chosen)
    splitting, other = (registry.find(problem, backend, family) for family in (few, many))
    assert splitting is not None and other is not None
    divide = certain_division if policy(backend).batch_invariant else division
    chosen_by = divide(problem, splitting.entry.spec.tile.m)
    return None if chosen_by is Division.PREFILL else splitting, None if chosen_by is Division.DECODE else other


LAUNCHES: dict[Family, Callable[..., Launch]] = {
    Family.FLASH_SM80: attention_launch,
    Family.FLASH_SM90: persistent_launch,
    Family.MEA: attention_launch,
}


def _decision(op: str, selection: Selection) -> Decision:
    return Decision(op, str(selection.family), selection.instance, tuple(map(str, selection.reasons)))


def _append_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    kernel, _, decision = selected(op, problem_of(op, arguments, sizes), arguments, registry)
    names = ("key", "value", "k_cache", "v_cache")
    aligned = _aligned(arguments, *names)
    launch = append_launch(
        kernel,
        key=Rows.of("key"),
        value=Rows.of("value"),
        k_cache=arguments["k_cache"],
        v_cache=arguments["v_cache"],
        tokens="slot_mapping",
        slots="slot_mapping",
        serving=False,
        rotary=None,
        aligned=aligned,
        faults=_faults(arguments["key"]),
    )
    yield Step(launch, decision, names if aligned else ())


def _gather_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    kernel, _, decision = selected(op, problem_of(op, arguments, sizes), arguments, registry)
    heads = sizes["Hkv"], sizes["D"], sizes["Dv"]
    yield Step(gather_launch(kernel, *heads, page_size=sizes["page_size"]), decision, ())


def _merge_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    kernel, entry, decision = selected(op, problem_of(op, arguments, sizes), arguments, registry)
    yield Step(merge_launch(kernel, entry.spec, heads=sizes["Hq"], width=sizes["Dv"]), decision, ())


def _serving_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    """Store and rotate, then attend. Rotated queries wait in the output: a row is read before it is written."""
    heads, kv_heads, head_dim = sizes["Hq"], sizes["Hkv"], sizes["D"]
    packed, rotated = arguments["key"] is None, arguments["cos"] is not None
    where = (("query", heads), ("query", heads + kv_heads)) if packed else (("key", 0), ("value", 0))
    key, value = (Rows.packed(name, head_dim, first) for name, first in where)
    query, out = (Rows.packed(name, head_dim) for name in ("query", "out"))
    tensors = ("query", "key", "value", "k_cache", "v_cache", "out", "cos", "sin")
    aligned = _aligned(arguments, *tensors)
    view = _as_paged(arguments, rotated)
    sizes = {**sizes, "Dv": head_dim}
    kernel, _, decision = selected(op, problem_of("append_kv", view, sizes), arguments, registry)
    launch = append_launch(
        kernel,
        key=key,
        value=value,
        k_cache=arguments["k_cache"],
        v_cache=arguments["v_cache"],
        tokens="query",
        slots=None if arguments["slot_mapping"] is None else "slot_mapping",
        serving=True,
        rotary=Rotary(query, out, heads, arguments["cos"], arguments["rotary_interleaved"]) if rotated else None,
        aligned=aligned,
        faults=_faults(arguments["query"]),
    )
    yield Step(launch, decision, tensors if aligned else ())
    problem = problem_of("paged_attention", view, sizes)
    keys = Keys("k_cache", "v_cache", "past_lens", kv_heads, sizes["page_size"], past=True)
    read = ("out" if rotated else "query", "k_cache", "v_cache", "out")
    call = attention_of(arguments, sizes, out if rotated else query, out, keys)
    yield from _attend(op, problem, arguments, registry, call, read, stored=True)


def _as_paged(arguments: Arguments, rotated: bool) -> Arguments:
    """The serving operator's arguments under the names that its two halves know them by."""
    query = arguments["query"]
    rows = arguments["out"] if rotated else query
    stand_in = query if arguments["key"] is None else arguments["key"]
    return {**arguments, "q": rows, "key": stand_in, "value": stand_in}


def _faults(tensor: Tensor) -> int:
    """The address of the fault mask of a tensor's device."""
    return mask_of(tensor.device.index or 0).data_ptr()


MAKERS: dict[str, Callable[[str, Arguments, Sizes, Registry], Iterator[Step]]] = {
    "paged_attention": _attention_steps,
    "varlen_attention": _attention_steps,
    "paged_attention_": _serving_steps,
    "append_kv": _append_steps,
    "gather_kv": _gather_steps,
    "merge_states": _merge_steps,
}


STORED = {"append_kv": ("key", "value"), "gather_kv": ("k", "v")}
"""Operators that move rows of heads into pages or out of them -> the tensors that hold the rows."""


def problem_of(op: str, arguments: Arguments, sizes: Sizes) -> Problem:
    """The problem that a checked call poses; raises InvalidArgument."""
    name = base_of(op)
    if name == "merge_states":
        dtype = WORD[arguments["out_a"].dtype]
        return Problem(op=name, dtype=dtype, head_dim=sizes["Dv"], num_heads=sizes["Hq"], tokens=sizes["T"])
    if name in STORED:
        tensors = STORED[name]
        return Problem(
            op=name,
            dtype=WORD[arguments[tensors[0]].dtype],
            kv_dtype=WORD[arguments["k_cache"].dtype],
            head_dim=sizes["D"],
            head_dim_v=sizes["Dv"],
            num_heads=sizes["Hkv"],
            page_size=sizes["page_size"],
            aligned=_aligned(arguments, *tensors, "k_cache", "v_cache"),
            tokens=sizes["T"],
        )
    k, v = ("k_cache", "v_cache") if name == "paged_attention" else ("k", "v")
    return Problem(
        op=name,
        **facts_of(arguments, sizes, k),
        page_size=sizes.get("page_size"),
        aligned=_aligned(arguments, "q", k, v, "out"),
        batch=sizes["B"],
        tokens=sizes["T"],
        max_q=arguments["max_seqlen_q"],
        max_k=arguments["max_seqlen_k"],
    )


def _aligned(arguments: Arguments, *names: str) -> bool:
    """Whether every row of the tensors starts at a multiple of 16 bytes; a tensor still to be allocated does."""
    return all(rows_aligned(tensor) for name in names if (tensor := arguments.get(name)) is not None)


def facts_of(arguments: Arguments, sizes: Sizes, keys: str) -> dict[str, Any]:
    """The facts that every attention problem has, by field; `keys` names the tensor of keys."""
    return {
        "dtype": WORD[arguments["q"].dtype],
        "kv_dtype": WORD[arguments[keys].dtype],
        "head_dim": sizes["D"],
        "head_dim_v": sizes["Dv"],
        "num_heads": sizes["Hq"],
        "num_kv_heads": sizes["Hkv"],
        "causal": arguments["causal"],
        "window": arguments["sliding_window"] > 0,
        "softcap": arguments["softcap"] > 0,
        "sinks": arguments["sinks"] is not None,
    }


def rows_aligned(tensor: Tensor) -> bool:
    """Whether every row of a tensor starts at a multiple of 16 bytes."""
    steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    strides = [stride for size, stride in steps if size > 1]
    return tensor.data_ptr() % ALIGNMENT == 0 and all(s * tensor.element_size() % ALIGNMENT == 0 for s in strides)
