"""Turns a padded batch with a mask tensor, or positions that lengths do not tell, into the launch that serves it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pa_ops.arguments import record_of
from pa_ops.checks import Arguments, Sizes
from pa_ops.launch import ALIGNMENT, DTYPES, HALF, Attention, Keys, Rows, axis_strides, fields_of, rows_of_keys
from pa_ops.plan import QUERY_ROWS, columns_of
from pa_ops.portions import whole
from pa_ops.problem import Problem
from pa_ops.program import Address, Grid, GridRule, Launch, Size, Source, Stride, TensorMap
from pa_ops.registry import Registry
from pa_ops.spec import InstanceSpec, TensorMask
from pa_ops.steps import Step, attention_of, facts_of, rows_aligned, selected

_KINDS = {torch.uint8: TensorMask.BOOL, torch.float32: TensorMask.ADDITIVE_FP32}


def masked_steps(op: str, arguments: Arguments, sizes: Sizes, registry: Registry) -> Iterator[Step]:
    """The launch for the views of `RULES["attention"]`; `position` is that of the first row among the keys."""
    kernel, entry, decision = selected(op, masked_problem(arguments, sizes), arguments, registry)
    q = Rows(Address("q"), Stride("q", 1, HALF), Stride("q", 2, HALF))
    call = attention_of(arguments, sizes, q, Rows.of("out"), Keys("k", "v", "kv_lengths", sizes["Hkv"]))
    mask: Tensor | None = arguments["mask"]
    by_rows = ("mask",) if mask is not None and mask_aligned(mask) else ()
    launch = _launch(kernel, entry.spec, call, arguments, registry.capability.num_sms)
    yield Step(launch, decision, ("q", "k", "v", "out", *by_rows))


def mask_aligned(mask: Tensor) -> bool:
    """Whether every row of a mask starts and ends at a multiple of 16 bytes."""
    return rows_aligned(mask) and mask.shape[-1] * mask.element_size() % ALIGNMENT == 0


def masked_problem(arguments: Arguments, sizes: Sizes) -> Problem:
    """The problem that the views pose."""
    mask: Tensor | None = arguments["mask"]
    kind = TensorMask.NONE
    if mask is not None:
        kind = _KINDS.get(mask.dtype, TensorMask.ADDITIVE)
    return Problem(
        op="attention",
        **facts_of(arguments, sizes, "k"),
        aligned=all(rows_aligned(arguments[name]) for name in ("q", "k", "v", "out")),
        attn_mask=kind,
        mask_aligned=mask is None or mask_aligned(mask),
        anchored=mask is None,
        batch=sizes["B"],
        tokens=sizes["B"] * sizes["Sq"],
        max_q=sizes["Sq"],
        max_k=sizes["total"],
    )


def _launch(kernel: int, spec: InstanceSpec, call: Attention, arguments: Arguments, num_sms: int) -> Launch:
    record = record_of(spec)
    sources: dict[str, Source] = {
        **call.sources(),
        **_places(arguments["kv_lengths"] is not None),
        **_mask_sources(arguments["mask"]),
        "skip_up_to": 0,
        "section_bits": 0,
        "causal": int(arguments["causal"] or arguments["sliding_window"] > 0),
        "position": arguments["position"],
        "mask_factor": 1.0 / (call.scores.softcap or call.scores.softmax_scale),
    }
    grid = Grid(GridRule.TILES, spec.tile.m, -1, call.heads)
    if record.maps:
        portion = whole(num_sms)
        sources |= {
            **_maps(spec, call),
            "tickets": Address("workspace", portion.tickets_at(num_sms)),
            "box_rows": spec.tile.n,
            "boxes": 1,
            "page_factor": 0,
            "beside": 0,
            **portion.fields(),
        }
        grid = Grid(GridRule.FIXED, portion.blocks, 1)
    return Launch(kernel, record, fields_of(record, sources), grid)


def _maps(spec: InstanceSpec, call: Attention) -> dict[str, Source]:
    """Tensor maps of q, k and v: elements, heads, tokens, sequences, keys before heads."""
    dtype = DTYPES[spec.dtype]
    token, head, sequence = (Stride("q", axis, HALF) for axis in (1, 2, 0))
    q_sizes = (call.head_dim, call.heads, Size("q", 1), Size("q", 0))
    q_map = TensorMap(Address("q"), q_sizes, (head, token, sequence), (columns_of(spec.head_dim), 1, QUERY_ROWS), dtype)
    made: dict[str, Source] = {"q_map": q_map}
    for letter, name, head_dim, columns in rows_of_keys(spec, call):
        token, head, sequence = (Stride(name, axis, HALF) for axis in (1, 2, 0))
        sizes = (head_dim, Size(name, 1), call.keys.kv_heads, Size(name, 0))
        strides = (token, head, sequence)
        made[f"{letter}_map"] = TensorMap(Address(name), sizes, strides, (columns, spec.tile.n, 1), dtype)
    return made


def _places(lengths: bool) -> dict[str, Source]:
    """How rows of a padded batch are found: the sequence's, then the token's, then the head's."""
    return {
        **axis_strides("k", "v"),
        "q_sequence_stride": Stride("q", 0, HALF),
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
