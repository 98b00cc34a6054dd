"""Turns the layouts, pasts and masks of padded batches into tensors with one order of axes, mostly by views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BNSH, BSNH = "bnsh", "bsnh"


class Axes(NamedTuple):
    """The order of axes of q and out, and of k, v, past and present: [B, H, S, D] (bnsh) or [B, S, H, D] (bsnh)."""

    q: str
    kv: str


LAYOUTS: dict[str, Axes] = {
    BNSH: Axes(BNSH, BNSH),
    BSNH: Axes(BSNH, BSNH),
    f"{BNSH}/{BSNH}": Axes(BNSH, BSNH),
    f"{BSNH}/{BNSH}": Axes(BSNH, BNSH),
}
"""What `layout=` may be: one order for all, or that of q and out before that of k, v, past and present."""


def turned(tensor: Tensor, order: str) -> Tensor:
    """A view with heads and tokens exchanged where `order` has heads first: [B, S, H, D] from or to it."""
    return tensor.transpose(1, 2) if order == BNSH else tensor


def present_of(new: Tensor, past: Tensor | None, order: str) -> Tensor:
    """cat(past, new) along the tokens, contiguous, written once; `new` itself where there is no past."""
    if past is None:
        return new
    axis = order.index("s")
    shape = list(new.shape)
    shape[axis] += past.shape[axis]
    return torch.cat([past, new], axis, out=new.new_empty(shape))


def handed_over(key: Tensor, value: Tensor, past: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor]:
    """Present as a result: what was made of a past, a copy where there is none, for results are the caller's own.

    wanted: False makes them empty, and spares the copy.
    """
    if not wanted:
        return key.new_empty(0), value.new_empty(0)
    if past is not None:
        return key, value
    return key.clone(memory_format=torch.contiguous_format), value.clone(memory_format=torch.contiguous_format)


def row_results(q: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """New tensors for out and lse as kernels write them, [B, Sq, Hq, Dv] and [Hq, B, Sq]."""
    batch, queries, heads = (sizes[name] for name in ("B", "Sq", "Hq"))
    lse = q.new_empty((heads, batch, queries), dtype=torch.float32)
    return q.new_empty((batch, queries, heads, sizes["Dv"])), lse


def padded_results(arguments: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """New tensors for out, present key and value, and lse of a checked call of `attention`."""
    order, wanted = LAYOUTS[arguments["layout"]], arguments["need_present"]
    out, lse = row_results(arguments["q"], sizes)
    widths = {"B": sizes["B"], "Hkv": sizes["Hkv"], "total": sizes["total"]}
    names = ("B", "Hkv", "total") if order.kv == BNSH else ("B", "total", "Hkv")
    shapes = ([*(widths[name] for name in names), sizes[width]] if wanted else [0] for width in ("D", "Dv"))
    key, value = (arguments[name].new_empty(shape) for name, shape in zip("kv", shapes, strict=True))
    return turned(out, order.q), key, value, lse.transpose(0, 1)


def first_position(queries: int, keys: int, past: bool) -> int:
    """Where the first of `queries` rows stands among `keys` keys: they end together with a past, else begin so."""
    return keys - queries if past else 0


def mask_rows(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """A mask of rank 2 to 4 as [B, Hq, Sq, Sk], broadcast axes by a stride of 0 and the last one dense.

    Only a mask that is not dense in its last dimension is copied, as it is given: broadcast over the keys, it is no
    larger than the scores of one head and batch if it is one there.
    """
    if (keys > 1 and mask.stride(-1) != 1) or mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    return mask.expand(batch, heads, queries, keys)


def padding_of(mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Lengths [B] int32 of what a bool mask [.., total] shows, the same for all rows of a sequence, and whether that is
    all that it says: in no sequence a hidden key before one that is seen. Both stay on the device."""
    seen = mask.reshape(-1, mask.shape[-1])
    lengths = seen.sum(-1, dtype=torch.int32)
    keys = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    return lengths.expand(batch).contiguous(), ((keys < lengths[:, None]) == seen).all()
