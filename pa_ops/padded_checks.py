"""Turns the arguments of `attention` that no table holds (layout, past, mask) into sizes, or into an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pa_ops.errors import InvalidArgument
from pa_ops.padding import LAYOUTS

_AXES = ("B", "Hq", "Sq", "total")


def layout_of(arguments: Mapping[str, Any]) -> str:
    """The layout, one of LAYOUTS."""
    layout: str = arguments["layout"]
    if layout not in LAYOUTS:
        rule = "must be one of " + ", ".join(LAYOUTS) + " (after a slash, that of k, v, past and present)"
        raise InvalidArgument("layout", rule, repr(layout))
    return layout


def completed(arguments: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes with P, 0 without a past, and total = P + Sk, of tensors that passed the table of shapes."""
    past_key, past_value = arguments["past_key"], arguments["past_value"]
    if (past_key is None) != (past_value is None):
        given, missing = ("past_value", "past_key") if past_key is None else ("past_key", "past_value")
        raise InvalidArgument(missing, "past_key and past_value come together or not at all", f"{given} alone")
    past = sizes.get("P", 0)
    sizes = {**sizes, "P": past, "total": past + sizes["Sk"]}
    if arguments["attn_mask"] is not None:
        _check_mask(arguments["attn_mask"], arguments["q"].dtype, sizes)
    return sizes


def _check_mask(mask: Tensor, dtype: torch.dtype, sizes: Mapping[str, int]) -> None:
    accepted = (torch.bool, dtype, torch.float32)
    if mask.dtype not in accepted:
        spelled = ", ".join(dict.fromkeys(str(kind).removeprefix("torch.") for kind in accepted))
        got = str(mask.dtype).removeprefix("torch.")
        raise InvalidArgument("attn_mask", f"dtype must be one of {spelled} (bool, q's, or float32)", got)
    shape, got = list(mask.shape), f"shape {list(mask.shape)}"
    if not 2 <= len(shape) <= 4:
        raise InvalidArgument("attn_mask", "must have 2, 3 or 4 dimensions, the last two being [Sq, total]", got)
    axes = _AXES[-len(shape) :]
    if any(size not in (1, sizes[axis]) for size, axis in zip(shape, axes, strict=True)):
        wanted = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes)
        rule = f"must be [{', '.join(axes)}] with {wanted}, or 1 where it is broadcast (total counts past and new keys)"
        raise InvalidArgument("attn_mask", rule, got)
