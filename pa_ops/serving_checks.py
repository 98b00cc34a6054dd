"""Turns the serving operator's scalars, pairs and widths into sizes for the table of `pa_ops.checks`, or into an error.

Widths are compared as products; nothing is divided, so no remainder gets lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pa_ops.errors import InvalidArgument

PAIRS = (("key", "value", "both, or neither for packed QKV in query"), ("cos", "sin", "both, or neither"))
"""Tensors that come together: two arguments, and what must be given of them."""


def fixed_sizes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The sizes that scalars fix before any tensor is looked at, each with its origin; raises InvalidArgument."""
    for first, second, rule in PAIRS:
        if (arguments[first] is None) != (arguments[second] is None):
            missing, given = (first, second) if arguments[first] is None else (second, first)
            got = f"None beside {given} of shape {list(arguments[given].shape)}"
            raise InvalidArgument(missing, f"{first} and {second} come together: {rule}", got)
    for heads in ("num_heads", "num_kv_heads"):
        if arguments[heads] < 1:
            raise InvalidArgument(heads, "must be >= 1", arguments[heads])
    num_heads, num_kv_heads = arguments["num_heads"], arguments["num_kv_heads"]
    if num_heads % num_kv_heads:
        raise InvalidArgument("num_heads", f"must be a multiple of num_kv_heads = {num_kv_heads}", num_heads)
    return {"Hq": (num_heads, "num_heads"), "Hkv": (num_kv_heads, "num_kv_heads")}


def check_widths(arguments: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """The width of query, which depends on whether it is packed, and the rotary size; raises InvalidArgument."""
    query: Tensor = arguments["query"]
    dim, heads, kv_heads = sizes["D"], sizes["Hq"], sizes["Hkv"]
    packed = arguments["key"] is None
    want = (heads + 2 * kv_heads if packed else heads) * dim
    if query.shape[1] != want:
        width = "(Hq+2*Hkv)*D" if packed else "Hq*D"
        why = "packed QKV, as key and value are absent" if packed else "as key and value are given"
        sizes_text = f"Hq = {heads}, Hkv = {kv_heads}, k_cache's D = {dim}"
        rule = f"must be [T, {width}] with {width} = {want} in dimension 1 ({why}; {sizes_text})"
        raise InvalidArgument("query", rule, f"shape {list(query.shape)}")
    cos: Tensor | None = arguments["cos"]
    if cos is not None and 2 * cos.shape[1] > dim:
        rule = f"rotary_dim, twice its dimension 1, must be at most k_cache's D = {dim}"
        raise InvalidArgument("cos", rule, f"rotary_dim = {2 * cos.shape[1]}, shape {list(cos.shape)}")
