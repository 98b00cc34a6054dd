"""Turns the device values of a call (lengths, page ids, slots) into an error that names the sequence, in checked mode.

Off by default, because every check copies the values to the host; PA_OPS_CHECKED=1 turns it on. Nothing is copied, and
nothing is checked, while a CUDA graph is being captured. Shapes and dtypes must have passed `pa_ops.checks` before.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pa_ops.checks import Arguments
from pa_ops.errors import InvalidArgument


def check_values(op: str, arguments: Arguments) -> None:
    """Raises InvalidArgument for the first value that breaks a rule; `op` as in `pa_ops.schema.SCHEMAS`."""
    name, _, overload = op.partition(".")
    if name == "append_kv":
        _check_slots(arguments["slot_mapping"], arguments["k_cache"])
    elif name in ("paged_attention", "varlen_attention"):
        tokens = arguments["q"].shape[0]
        new = _lengths("cu_seqlens_q", arguments["cu_seqlens_q"], tokens, "q", padded=overload == "out")
        _check_bound("max_seqlen_q", arguments["max_seqlen_q"], new, "new tokens")
        if name == "paged_attention":
            visible: list[int] = arguments["seqlens_k"].tolist()
            _check_pages(arguments, new, visible)
        else:
            visible = _lengths("cu_seqlens_k", arguments["cu_seqlens_k"], arguments["k"].shape[0], "k", padded=False)
        _check_bound("max_seqlen_k", arguments["max_seqlen_k"], visible, "visible tokens")


def _lengths(argument: str, cu_seqlens: Tensor, total: int, owner: str, *, padded: bool) -> list[int]:
    """The length of every sequence, from prefix sums that must run from 0 to `total` (or below, where padded)."""
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0:
        raise InvalidArgument(argument, "must start at 0", f"{argument}[0] = {ends[0]}")
    lengths = [stop - start for start, stop in pairwise(ends)]
    for sequence, length in enumerate(lengths):
        if length < 0:
            got = f"{argument}[{sequence}:{sequence + 2}] = {ends[sequence : sequence + 2]}"
            raise InvalidArgument(argument, f"must not decrease, as it does in sequence {sequence}", got)
    if ends[-1] > total or (ends[-1] < total and not padded):
        rule = f"counts tokens (not pages) from 0 and must end at the {total} rows of {owner}"
        raise InvalidArgument(argument, rule, f"{argument}[-1] = {ends[-1]}, after sequence {len(lengths) - 1}")
    return lengths


def _check_bound(argument: str, bound: int | None, lengths: list[int], what: str) -> None:
    if bound is None or not lengths or max(lengths) <= bound:
        return
    longest = lengths.index(max(lengths))
    rule = f"must be at least the {lengths[longest]} {what} of sequence {longest}, or left out"
    raise InvalidArgument(argument, rule, bound)


def _check_pages(arguments: Arguments, new: list[int], visible: list[int]) -> None:
    """Every visible token has room in its block_table row, and every page that a query reads exists."""
    pages, page_size = arguments["k_cache"].shape[:2]
    window: int = arguments["sliding_window"]
    table = arguments["block_table"].cpu()
    capacity = table.shape[1] * page_size
    for sequence, (fresh, length) in enumerate(zip(new, visible, strict=True)):
        got = f"seqlens_k[{sequence}] = {length}"
        if length < 0:
            raise InvalidArgument("seqlens_k", f"must be >= 0, as it is not in sequence {sequence}", got)
        if length > capacity:
            rule = f"sequence {sequence} must fit its {table.shape[1]} pages of {page_size} tokens = {capacity}"
            raise InvalidArgument("seqlens_k", rule, got)
        if fresh == 0:
            continue
        first = max(0, length - fresh - window + 1) // page_size if window > 0 else 0
        live = table[sequence, first : -(-length // page_size)]
        wrong = ((live < 0) | (live >= pages)).nonzero().flatten().tolist()
        if wrong:
            place = first + wrong[0]
            rule = f"sequence {sequence} reads page {place} of its row, whose id must be in [0, {pages})"
            raise InvalidArgument("block_table", rule, f"block_table[{sequence}, {place}] = {int(live[wrong[0]])}")


def _check_slots(slot_mapping: Tensor, k_cache: Tensor) -> None:
    slots = k_cache.shape[0] * k_cache.shape[1]
    owner: dict[int, int] = {}
    for token, slot in enumerate(slot_mapping.tolist()):
        if not -1 <= slot < slots:
            rule = f"must be -1 (do not store) or in [0, {slots}), as it is not for token {token}"
            raise InvalidArgument("slot_mapping", rule, f"slot_mapping[{token}] = {slot}")
        if slot >= 0 and owner.setdefault(slot, token) != token:
            rule = f"no two tokens may share a slot, as {owner[slot]} and {token} do"
            raise InvalidArgument("slot_mapping", rule, f"slot_mapping[{token}] = {slot}")
