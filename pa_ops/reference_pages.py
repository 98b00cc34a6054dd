"""Turns paged caches into the contiguous rows of each sequence, in plain PyTorch: part of `pa_ops.reference`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


def sequences_of(cu_seqlens: Tensor, total: int) -> Iterator[tuple[int, range]]:
    """(sequence, its rows) for every sequence; prefix sums that lie are cut down to rows that exist."""
    ends = [min(max(end, 0), total) for end in cu_seqlens.tolist()]
    for sequence in range(len(ends) - 1):
        yield sequence, range(ends[sequence], max(ends[sequence : sequence + 2]))


@dataclass(frozen=True)
class Pages:
    """The pages of one sequence's first `count` tokens, and which of them exist."""

    ids: Tensor
    mapped: Tensor
    count: int

    @classmethod
    def of(cls, table: Tensor, length: int, cache: Tensor) -> Pages:
        """Those of `length` tokens, of as many as a row of the block table has room for."""
        pages, page_size = cache.shape[:2]
        ids = table[: max(0, -(-length // page_size))].long()
        return cls(ids, (ids >= 0) & (ids < pages), min(max(length, 0), ids.numel() * page_size))

    def rows(self, cache: Tensor) -> Tensor:
        """The tokens [count, Hkv, D] as they are stored, zeros where there is no page."""
        found = cache.new_zeros(self.ids.numel(), *cache.shape[1:])
        found[self.mapped] = cache[self.ids[self.mapped]]
        return found.flatten(0, 1)[: self.count]


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_k: Tensor, k: Tensor, v: Tensor
) -> None:
    """Copies the tokens of each sequence from its pages into the rows of k and v from cu_seqlens_k[b] on, as they are.

    k [T, Hkv, D], v [T, Hkv, Dv]; a token without a page becomes zeros; rows past cu_seqlens_k[-1] stay as they are.
    """
    for sequence, rows in sequences_of(cu_seqlens_k, k.shape[0]):
        pages = Pages.of(block_table[sequence], len(rows), k_cache)
        for cache, to in ((k_cache, k), (v_cache, v)):
            found = pages.rows(cache)
            to[rows.start : rows.start + len(found)] = found
            to[rows.start + len(found) : rows.stop] = 0
