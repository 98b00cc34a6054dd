"""Turns the device values of a call (lengths, page ids, slots) into an error that names the sequence, in checked mode.

Off by default, because every check copies the values to the host; PA_OPS_CHECKED=1 turns it on. Nothing is copied, and
nothing is checked, while a CUDA graph is being captured. Shapes and dtypes must have passed `pa_ops.checks` before.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from pa_ops.checks import Arguments
from pa_ops.errors import InvalidArgument
from pa_ops.padding import LAYOUTS


def check_values(op: str, arguments: Arguments) -> None:
    """Raises InvalidArgument for the first value that breaks a rule; `op` as in `pa_ops.schema.SCHEMAS`."""
    name, _, overload = op.partition(".")
    if name == "append_kv":
        _check_slots(arguments["slot_mapping"], arguments["k_cache"])
    elif name == "gather_kv":
        _check_gathered(arguments)
    elif name == "paged_attention_":
        _check_serving(arguments, padded=overload == "out")
    elif name == "attention":
        _check_visible(arguments)
    elif name in ("paged_attention", "varlen_attention"):
        tokens = arguments["q"].shape[0]
        new = _lengths("cu_seqlens_q", arguments["cu_seqlens_q"], tokens, "q", padded=overload == "out")
        _check_bound("max_seqlen_q", arguments["max_seqlen_q"], new, "new tokens")
        if name == "paged_attention":
            visible: list[int] = arguments["seqlens_k"].tolist()
            _check_pages("seqlens_k", visible, arguments, new, visible)
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


def _check_visible(arguments: Arguments) -> None:
    """Every sequence of a padded batch sees keys that are there: past and new ones."""
    if arguments["nonpad_kv_seqlen"] is None:
        return
    axis = LAYOUTS[arguments["layout"]].kv.index("s")
    total = sum(arguments[name].shape[axis] for name in ("k", "past_key") if arguments[name] is not None)
    for sequence, length in enumerate(arguments["nonpad_kv_seqlen"].tolist()):
        if not 0 <= length <= total:
            rule = f"must be in [0, {total}], the past and new keys, as it is not in sequence {sequence}"
            raise InvalidArgument("nonpad_kv_seqlen", rule, f"nonpad_kv_seqlen[{sequence}] = {length}")


def _check_serving(arguments: Arguments, *, padded: bool) -> None:
    """The values of `paged_attention_`: lengths, then pages, then positions, then slots."""
    new = _lengths("cu_seqlens_q", arguments["cu_seqlens_q"], arguments["query"].shape[0], "query", padded=padded)
    _check_bound("max_seqlen_q", arguments["max_seqlen_q"], new, "new tokens")
    past: list[int] = arguments["past_lens"].tolist()
    visible = [before + fresh for before, fresh in zip(past, new, strict=True)]
    _check_pages("past_lens", past, arguments, new, visible)
    _check_bound("max_seqlen_k", arguments["max_seqlen_k"], visible, "visible tokens")
    if arguments["cos"] is not None:
        _check_positions(arguments["cos"].shape[0], past, new)
    if arguments["slot_mapping"] is not None:
        _check_slots(arguments["slot_mapping"][: sum(new)], arguments["k_cache"])
    else:
        _check_owners(arguments["block_table"].tolist(), arguments["k_cache"].shape[1], past, new)


def _check_pages(argument: str, given: list[int], arguments: Arguments, new: list[int], visible: list[int]) -> None:
    """Every visible token has room in its block_table row, and every page that a query reads exists.

    `argument`, whose values are `given`, is what the lengths come from. The window of a sequence's first query
    includes that query's own key, so pages that new tokens are stored to are among those read.
    """
    pages, page_size = arguments["k_cache"].shape[:2]
    window: int = arguments["sliding_window"]
    table = arguments["block_table"].cpu()
    for sequence, (value, fresh, length) in enumerate(zip(given, new, visible, strict=True)):
        got = f"{argument}[{sequence}] = {value}"
        if value < 0:
            raise InvalidArgument(argument, f"must be >= 0, as it is not in sequence {sequence}", got)
        if length > table.shape[1] * page_size:
            rule = _room(sequence, table.shape[1], page_size)
            raise InvalidArgument(argument, rule, got if value == length else f"{got}, with {fresh} new = {length}")
        if fresh == 0:
            continue
        first = max(0, length - fresh - window + 1) // page_size if window > 0 else 0
        _check_mapped(table, sequence, first, -(-length // page_size), pages)


def _room(sequence: int, row: int, page_size: int) -> str:
    """The rule that a sequence which is too long for its row of the block table breaks."""
    return f"sequence {sequence} must fit its {row} pages of {page_size} tokens = {row * page_size}"


def _check_mapped(table: Tensor, sequence: int, first: int, stop: int, pages: int) -> None:
    """Pages [first, stop) of a sequence's row exist."""
    live = table[sequence, first:stop]
    wrong = ((live < 0) | (live >= pages)).nonzero().flatten().tolist()
    if wrong:
        place = first + wrong[0]
        rule = f"sequence {sequence} reads page {place} of its row, whose id must be in [0, {pages})"
        raise InvalidArgument("block_table", rule, f"block_table[{sequence}, {place}] = {int(live[wrong[0]])}")


def _check_gathered(arguments: Arguments) -> None:
    """The values of `gather_kv`: every row has a token, its row of the block table has room, its page exists."""
    lengths = _lengths("cu_seqlens_k", arguments["cu_seqlens_k"], arguments["k"].shape[0], "k", padded=True)
    pages, page_size = arguments["k_cache"].shape[:2]
    table = arguments["block_table"].cpu()
    for sequence, length in enumerate(lengths):
        if length > table.shape[1] * page_size:
            rule = _room(sequence, table.shape[1], page_size)
            raise InvalidArgument("cu_seqlens_k", rule, f"{length} tokens")
        _check_mapped(table, sequence, 0, -(-length // page_size), pages)


def _check_positions(rows: int, past: list[int], new: list[int]) -> None:
    """Every new token has a row of cos and sin."""
    for sequence, (before, fresh) in enumerate(zip(past, new, strict=True)):
        if fresh and before + fresh > rows:
            last = before + fresh - 1
            rule = f"must have a row for each position, the last of sequence {sequence} being {last}"
            raise InvalidArgument("cos", rule, f"{rows} rows")


def _check_owners(table: list[list[int]], page_size: int, past: list[int], new: list[int]) -> None:
    """No two new tokens share a slot where block_table says where they go; the pages are known to exist."""
    owner: dict[tuple[int, int], str] = {}
    for sequence, (before, fresh) in enumerate(zip(past, new, strict=True)):
        for position in range(before, before + fresh):
            place = position // page_size
            page = table[sequence][place]
            token = f"position {position} of sequence {sequence}"
            other = owner.setdefault((page, position % page_size), token)
            if other != token:
                rule = f"no two new tokens may share a slot, as {other} and {token} do"
                raise InvalidArgument("block_table", rule, f"block_table[{sequence}, {place}] = {page}")


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
