"""Turns a call into the problem that selection sees, and into the families that may serve such a call here."""

from __future__ import annotations

import pa_ops
from helpers.problems import Call
from helpers.serving import Arguments
from pa_ops.heuristics import extremes
from pa_ops.selection import AUTO
from pa_ops.steps import WORD


def problem_of(call: Call) -> pa_ops.Problem:
    """Its facts, sizes left at one row."""
    q, k, v = (tensor for name, tensor in call.tensors.items() if name in ("q", "k", "v", "k_cache", "v_cache"))
    return pa_ops.Problem(
        op=call.op,
        dtype=WORD[q.dtype],
        head_dim=q.shape[2],
        head_dim_v=v.shape[-1],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[-2],
        causal=call.options.get("causal", True),
        window=call.options.get("sliding_window", 0) > 0,
        softcap=call.options.get("softcap", 0.0) > 0,
        sinks=call.options.get("sinks") is not None,
        page_size=k.shape[1] if k.dim() == 4 else None,
    )


def serving_problem(arguments: Arguments) -> pa_ops.Problem:
    """The attention of a call of the serving operator."""
    k_cache = arguments["k_cache"]
    return pa_ops.Problem(
        op="paged_attention",
        dtype=WORD[arguments["query"].dtype],
        head_dim=k_cache.shape[3],
        num_heads=arguments["num_heads"],
        num_kv_heads=arguments["num_kv_heads"],
        window=arguments.get("sliding_window", 0) > 0,
        softcap=arguments.get("softcap", 0.0) > 0,
        sinks=arguments.get("sinks") is not None,
        page_size=k_cache.shape[1],
    )


def few_and_many(problem: pa_ops.Problem, backend: str = AUTO) -> tuple[str, str]:
    """The families that selection names for few query rows of such a problem, and for many."""
    few, many = (str(pa_ops.select(extreme, backend=backend).family) for extreme in extremes(problem))
    return few, many


def able(problem: pa_ops.Problem) -> list[str]:
    """The families that `backend=` takes for the problem."""
    found = []
    for family in pa_ops.families():
        try:
            pa_ops.select(problem, backend=family)
        except pa_ops.NoInstance:
            continue
        found.append(family)
    return found
