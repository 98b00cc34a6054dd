"""Turns a padded batch with a mask tensor, or positions that lengths do not tell, into the launch that serves it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pa_ops.arguments import record_of
from pa_ops.checks import Arguments, Sizes
from pa_ops.launch import Attention, Keys, Rows
from pa_ops.problem import Problem
from pa_ops.program import Address, Grid, GridRule, Launch, Size, Source, Stride
from pa_ops.registry import Registry
from pa_ops.spec import InstanceSpec, TensorMask
from pa_ops.steps import Step, attention_of, facts_of, rows_aligned, selected

_HALF = 2  # bytes of an element of fp16 or bf16


def masked_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    """The launch for the views of `RULES["attention"]`; `position` is that of the first row among the keys."""
    kernel, entry, decision = selected(op, masked_problem(arguments, sizes), arguments, registry)
    q = Rows(Address("q"), Stride("q", 1, _HALF), Stride("q", 2, _HALF))
    call = attention_of(arguments, sizes, q, Rows.of("out"), Keys("k", "v", "kv_lengths", sizes["Hkv"]))
    mask: Tensor | None = arguments["mask"]
    by_rows = ("mask",) if mask is not None and rows_aligned(mask) else ()
    yield Step(_launch(kernel, entry.spec, call, arguments), decision, ("q", "k", "v", "out", *by_rows))


def masked_problem(arguments: Arguments, sizes: Sizes) -> Problem:
    """The problem that the views pose."""
    mask: Tensor | None = arguments["mask"]
    kind = TensorMask.NONE
    if mask is not None:
        kind = TensorMask.BOOL if mask.dtype is torch.uint8 else TensorMask.ADDITIVE
    return Problem(
        op="attention",
        **facts_of(arguments, sizes, "k"),
        aligned=all(rows_aligned(arguments[name]) for name in ("q", "k", "v", "out")),
        attn_mask=kind,
        mask_aligned=mask is None or rows_aligned(mask),
        anchored=mask is None,
        batch=sizes["B"],
        tokens=sizes["B"] * sizes["Sq"],
        max_q=sizes["Sq"],
        max_k=sizes["total"],
    )


def _launch(kernel: int, spec: InstanceSpec, call: Attention, arguments: Arguments) -> Launch:
    record = record_of(spec)
    sources: dict[str, Source] = {
        **call.sources(),
        **_places(arguments["kv_lengths"] is not None),
        **_mask_sources(arguments["mask"]),
        "skip_up_to": 0,
        "head_dim_v": call.head_dim_v,
        "causal": int(arguments["causal"] or arguments["sliding_window"] > 0),
        "position": arguments["position"],
        "mask_factor": 1.0 / (call.scores.softcap or call.scores.softmax_scale),
    }
    fields = {name: sources[name] for name, _ in record.fields}
    return Launch(kernel, record, fields, Grid(GridRule.TILES, spec.tile.m, -1, call.heads))


def _places(lengths: bool) -> dict[str, Source]:
    """How rows of a padded batch are found: the sequence's, then the token's, then the head's."""
    strides: dict[str, Source] = {}
    for name in "kv":
        for axis, what in enumerate(("page", "token", "head")):
            strides[f"{name}_{what}_stride"] = Stride(name, axis, _HALF)
    return {
        **strides,
        "q_sequence_stride": Stride("q", 0, _HALF),
        "kv_lengths": Address("kv_lengths") if lengths else 0,
        "tokens": Size("out", 0),
        "keys": Size("k", 1),
    }


def _mask_sources(mask: Tensor | None) -> dict[str, Source]:
    names = ("mask_sequence_stride", "mask_head_stride", "mask_row_stride")
    if mask is None:
        return {"mask": 0, "mask_bytes": 0, **dict.fromkeys(names, 0)}
    size = mask.element_size()
    strides = {name: Stride("mask", axis, size) for axis, name in enumerate(names)}
    return {"mask": Address("mask"), "mask_bytes": size, **strides}
