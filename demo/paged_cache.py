"""Turns a growing batch of sequences into pages, block tables and slots: the bookkeeping of a small serving engine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """One forward pass over the new tokens of every sequence, packed without padding (T tokens, B sequences)."""

    positions: torch.Tensor  # [1, T] int64, position of each new token in its sequence
    cu_seqlens_q: torch.Tensor  # [B+1] int32
    seqlens_k: torch.Tensor  # [B] int32, new tokens included
    block_table: torch.Tensor  # [B, pages] int32
    slot_mapping: torch.Tensor  # [T] int64
    last_tokens: torch.Tensor  # [B] int64, index of each sequence's newest token


class PagedCache:
    """KV pages for all layers, [pages, page_size, kv_heads, head_dim] each, handed out one page at a time."""

    def __init__(
        self,
        *,
        layers: int,
        sequences: int,
        max_tokens: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        per_sequence = -(-max_tokens // page_size)
        shape = (sequences * per_sequence, page_size, kv_heads, head_dim)
        # NaN, not zeros: a kernel that reads a slot nobody wrote shows at once.
        self.layers = [
            tuple(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in "kv") for _ in range(layers)
        ]
        self.page_size = page_size
        self.device = device
        self.lengths = [0] * sequences
        self.tables: list[list[int]] = [[] for _ in range(sequences)]
        self._columns = per_sequence
        self._free = list(range(shape[0]))
        random.Random(0).shuffle(self._free)

    def extend(self, new_tokens: Sequence[int]) -> Step:
        """Makes room for `new_tokens[b]` tokens of each sequence b and says where they go."""
        positions: list[int] = []
        slots: list[int] = []
        ends = [0]
        for sequence, new in enumerate(new_tokens):
            table = self.tables[sequence]
            for position in range(self.lengths[sequence], self.lengths[sequence] + new):
                page, offset = divmod(position, self.page_size)
                if page == len(table):
                    table.append(self._free.pop())
                positions.append(position)
                slots.append(table[page] * self.page_size + offset)
            self.lengths[sequence] += new
            ends.append(ends[-1] + new)
        rows = [table + [-1] * (self._columns - len(table)) for table in self.tables]
        return Step(
            positions=torch.tensor([positions], device=self.device),
            cu_seqlens_q=torch.tensor(ends, dtype=torch.int32, device=self.device),
            seqlens_k=torch.tensor(self.lengths, dtype=torch.int32, device=self.device),
            block_table=torch.tensor(rows, dtype=torch.int32, device=self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
            last_tokens=torch.tensor(ends[1:], device=self.device) - 1,
        )
