"""Turns the arguments of a call into named sizes, or into an error: the argument, the rule, the value.

Only what the host knows is looked at: shapes, dtypes, devices, strides and scalars. A table has one row per tensor;
`pa_ops.checked` adds the values that live on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pa_ops import padded_checks, serving_checks
from pa_ops.errors import InvalidArgument
from pa_ops.padding import BNSH, LAYOUTS, Axes
from pa_ops.schema import base_of

HALF = (torch.float16, torch.bfloat16)
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
INT32_MAX = 2**31 - 1

Arguments = Mapping[str, Any]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Rule:
    """What one tensor must be.

    dims: a name per dimension; the first tensor to use a name fixes its size. "B+1" is one more than B, "T.." at
    least T, "Hkv|1" either, "Hkv*D" the product of sizes fixed before. dtypes: what is accepted; a string stands for
    the dtype of that argument.
    """

    argument: str
    dims: str
    dtypes: tuple[torch.dtype | str, ...]
    optional: bool = False
    written: bool = False

    @property
    def shape(self) -> str:
        """The shape as messages spell it."""
        return "[" + ", ".join(self.dims.split()) + "]"


_QUERY = Rule("q", "T Hq D", HALF)
_CU_SEQLENS_Q = Rule("cu_seqlens_q", "B+1", (torch.int32,))
_SCALES = (
    Rule("k_scale", "Hkv|1", (torch.float32,), optional=True),
    Rule("v_scale", "Hkv|1", (torch.float32,), optional=True),
)
_OPTIONS = (Rule("sinks", "Hq", (torch.float32, "q"), optional=True), *_SCALES)
_LSE = Rule("lse", "Hq T", (torch.float32,), optional=True, written=True)
_BUFFERS = (Rule("out", "T Hq Dv", ("q",), written=True), _LSE)
_PAGED = (
    _QUERY,
    Rule("k_cache", "pages page_size Hkv D", ("q", *QUANTISED)),
    Rule("v_cache", "pages page_size Hkv Dv", ("k_cache",)),
    _CU_SEQLENS_Q,
    Rule("seqlens_k", "B", (torch.int32,)),
    Rule("block_table", "B max_pages", (torch.int32,)),
    *_OPTIONS,
)
_SERVING = (
    Rule("query", "T width", HALF),
    Rule("k_cache", "pages page_size Hkv D", ("query", *QUANTISED), written=True),
    Rule("v_cache", "pages page_size Hkv D", ("k_cache",), written=True),
    Rule("key", "T Hkv*D", ("query",), optional=True),
    Rule("value", "T Hkv*D", ("query",), optional=True),
    _CU_SEQLENS_Q,
    Rule("past_lens", "B", (torch.int32,)),
    Rule("block_table", "B max_pages", (torch.int32,)),
    Rule("cos", "max_position rotary_dim/2", (torch.float32, "query"), optional=True),
    Rule("sin", "max_position rotary_dim/2", ("cos",), optional=True),
    Rule("slot_mapping", "T", (torch.int64,), optional=True),
    Rule("sinks", "Hq", (torch.float32, "query"), optional=True),
    *_SCALES,
)
_VARLEN = (
    _QUERY,
    Rule("k", "total_k Hkv D", ("q", *QUANTISED)),
    Rule("v", "total_k Hkv Dv", ("k",)),
    _CU_SEQLENS_Q,
    Rule("cu_seqlens_k", "B+1", (torch.int32,)),
    *_OPTIONS,
)


def _padded(order: Axes) -> tuple[Rule, ...]:
    """The tensors of `attention` with these orders of axes; its mask is of several shapes, and checked apart."""
    q_axes, kv_axes = ("B {0} {1} {2}" if axes == BNSH else "B {1} {0} {2}" for axes in order)
    return (
        Rule("q", q_axes.format("Hq", "Sq", "D"), (*HALF, torch.float32)),
        Rule("k", kv_axes.format("Hkv", "Sk", "D"), ("q", *QUANTISED)),
        Rule("v", kv_axes.format("Hkv", "Sk", "Dv"), ("k",)),
        Rule("past_key", kv_axes.format("Hkv", "P", "D"), ("k",), optional=True),
        Rule("past_value", kv_axes.format("Hkv", "P", "Dv"), ("k",), optional=True),
        Rule("nonpad_kv_seqlen", "B", (torch.int32, torch.int64), optional=True),
        *_OPTIONS,
    )


PADDED: dict[str, tuple[Rule, ...]] = {layout: _padded(order) for layout, order in LAYOUTS.items()}
"""Layout -> the tensors of `attention`, as in RULES."""

RULES: dict[str, tuple[Rule, ...]] = {
    "paged_attention": _PAGED,
    "paged_attention.out": (*_PAGED, *_BUFFERS),
    "paged_attention_": _SERVING,
    "paged_attention_.out": (*_SERVING, Rule("out", "T Hq*D", ("query",), written=True), _LSE),
    "varlen_attention": _VARLEN,
    "varlen_attention.out": (*_VARLEN, *_BUFFERS),
    "attention": (
        Rule("q", "B Sq Hq D", HALF),
        Rule("k", "B total Hkv D", ("q",)),
        Rule("v", "B total Hkv Dv", ("q",)),
        _CU_SEQLENS_Q,
        Rule("kv_lengths", "B", (torch.int32,), optional=True),
        Rule("mask", "B Hq Sq total", (torch.uint8, torch.float32, "q"), optional=True),
        *_OPTIONS,
        *_BUFFERS,
    ),
    "append_kv": (
        Rule("slot_mapping", "T", (torch.int64,)),
        Rule("key", "T.. Hkv D", HALF),
        Rule("value", "T.. Hkv Dv", ("key",)),
        Rule("k_cache", "pages page_size Hkv D", ("key", *QUANTISED), written=True),
        Rule("v_cache", "pages page_size Hkv Dv", ("k_cache",), written=True),
        *_SCALES,
    ),
    "gather_kv": (
        Rule("k", "T Hkv D", HALF, written=True),
        Rule("v", "T Hkv Dv", ("k",), written=True),
        Rule("k_cache", "pages page_size Hkv D", ("k",)),
        Rule("v_cache", "pages page_size Hkv Dv", ("k",)),
        Rule("cu_seqlens_k", "B+1", (torch.int32,)),
        Rule("block_table", "B max_pages", (torch.int32,)),
    ),
    "merge_states": (
        Rule("out_a", "T Hq Dv", HALF),
        Rule("lse_a", "Hq T", (torch.float32,)),
        Rule("out_b", "T Hq Dv", ("out_a",)),
        Rule("lse_b", "Hq T", (torch.float32,)),
    ),
}
"""Operator and overload -> its tensors, in the order in which sizes are fixed; those of `attention` are
in PADDED, and here are the views that a kernel with a mask tensor gets of them."""

_AT_LEAST_ONE = ("Hq", "Hkv", "D", "Dv", "page_size", "max_position", "rotary_dim/2")


def validate(op: str, arguments: Arguments) -> Sizes:
    """The named sizes of a call of `op` (T, B, Hq, Hkv, D, Dv, page_size, ...); raises InvalidArgument."""
    rules = PADDED[padded_checks.layout_of(arguments)] if op == "attention" else RULES[op]
    device = arguments[rules[0].argument].device
    serving = base_of(op) == "paged_attention_"
    fixed: dict[str, tuple[int, str]] = serving_checks.fixed_sizes(arguments) if serving else {}
    for rule in rules:
        tensor = arguments[rule.argument]
        if tensor is None and rule.optional:
            continue
        _check_shape(rule, tensor, fixed)
        _check_dtype(rule, tensor, arguments)
        _check_strides(rule, tensor)
        _check_place(rule.argument, tensor, rules[0].argument, device)
    _check_heads(fixed)
    _check_scalars(arguments)
    sizes = {name: size for name, (size, _) in fixed.items()}
    if serving:
        serving_checks.check_widths(arguments, sizes)
    if op == "attention":
        sizes = padded_checks.completed(arguments, sizes)
        if (mask := arguments["attn_mask"]) is not None:
            _check_place("attn_mask", mask, "q", device)
    return sizes


def _check_place(argument: str, tensor: Tensor, first: str, device: torch.device) -> None:
    """Every tensor is on the device of the first, and none waits for a backward."""
    if tensor.device != device:
        raise InvalidArgument(argument, f"must be on {first}'s device, {device}", tensor.device)
    if tensor.requires_grad and torch.is_grad_enabled():
        rule = "must not require grad: pa_ops is inference only and has no backward; detach it or use no_grad()"
        raise InvalidArgument(argument, rule, "requires_grad=True")


def _check_shape(rule: Rule, tensor: Tensor, fixed: dict[str, tuple[int, str]]) -> None:
    dims = rule.dims.split()
    got = f"shape {list(tensor.shape)}"
    if tensor.dim() != len(dims):
        raise InvalidArgument(rule.argument, f"must have {len(dims)} dimensions {rule.shape}", got)
    for place, (dim, size) in enumerate(zip(dims, tensor.shape, strict=True)):
        name, form = parse_dim(dim)
        least = 1 if form == "+1" or name in _AT_LEAST_ONE else 0
        if size < least:
            raise InvalidArgument(rule.argument, f"must be {rule.shape} with {dim} >= 1 in dimension {place}", got)
        if "*" in name:
            fixed[name] = _product(name, fixed)
        if name not in fixed:
            fixed[name] = (size - 1 if form == "+1" else size, rule.argument)
            continue
        want, origin = fixed[name]
        fits, need = _FORMS[form]
        if not fits(size, want):
            need = need.format(name=name, want=want, more=want + 1)
            whence = f"in dimension {place} ({name} comes from {origin})"
            raise InvalidArgument(rule.argument, f"must be {rule.shape} with {need} {whence}", got)


def _product(name: str, fixed: dict[str, tuple[int, str]]) -> tuple[int, str]:
    """The size of a flattened dimension such as "Hkv*D", and where its factors come from."""
    sizes, origins = zip(*(fixed[factor] for factor in name.split("*")), strict=True)
    return math.prod(sizes), " and ".join(origins)


_FORMS: dict[str, tuple[Callable[[int, int], bool], str]] = {
    "+1": (lambda size, want: size == want + 1, "{name}+1 = {more}"),
    "..": (lambda size, want: size >= want, "{name} >= {want}"),
    "|1": (lambda size, want: size in (want, 1), "{name} = {want} or 1"),
    "": (lambda size, want: size == want, "{name} = {want}"),
}
"""How a dimension is spelled after its name -> when a size fits, and what it should be."""


@cache
def parse_dim(dim: str) -> tuple[str, str]:
    """The name of a dimension and the form of its rule: "B+1" -> ("B", "+1"), "D" -> ("D", "")."""
    form = next(form for form in _FORMS if dim.endswith(form))
    return dim.removesuffix(form), form


def _check_dtype(rule: Rule, tensor: Tensor, arguments: Arguments) -> None:
    accepted = [kind if isinstance(kind, torch.dtype) else arguments[kind].dtype for kind in rule.dtypes]
    if tensor.dtype not in accepted:
        spelled = ", ".join(
            _word(dtype) if isinstance(kind, torch.dtype) else f"{_word(dtype)} (as {kind})"
            for kind, dtype in zip(rule.dtypes, accepted, strict=True)
        )
        raise InvalidArgument(rule.argument, f"dtype must be one of {spelled}", _word(tensor.dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_strides(rule: Rule, tensor: Tensor) -> None:
    shape, strides = tensor.shape, tensor.stride()
    if shape[-1] > 1 and strides[-1] != 1:
        raise InvalidArgument(rule.argument, "the last dimension must be dense (stride 1)", f"strides {list(strides)}")
    if rule.written and any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
        raise InvalidArgument(
            rule.argument, "is written, so no two elements may share memory (stride 0)", f"strides {list(strides)}"
        )


def _check_heads(fixed: dict[str, tuple[int, str]]) -> None:
    if "Hq" in fixed and "Hkv" in fixed:
        heads, (kv_heads, origin) = fixed["Hq"][0], fixed["Hkv"]
        if heads % kv_heads:
            raise InvalidArgument("q", f"Hq must be a multiple of {origin}'s Hkv = {kv_heads}", f"Hq = {heads}")


def _check_scalars(arguments: Arguments) -> None:
    scale = arguments.get("softmax_scale")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise InvalidArgument("softmax_scale", "must be finite and > 0", scale)
    softcap = arguments.get("softcap", 0.0)
    if not (math.isfinite(softcap) and softcap >= 0):
        raise InvalidArgument("softcap", "must be finite and >= 0 (0 = off)", softcap)
    if not -INT32_MAX <= arguments.get("sliding_window", 0) <= INT32_MAX:
        raise InvalidArgument("sliding_window", "must fit 32 bits (<= 0 = off)", arguments["sliding_window"])
    for bound in ("max_seqlen_q", "max_seqlen_k"):
        value = arguments.get(bound)
        if value is not None and value < 0:
            raise InvalidArgument(bound, "must be >= 0, or left out", value)
