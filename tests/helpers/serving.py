"""Turns lengths into calls of the serving operator, every cached byte that must not be read NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.problems import Shape, empty_pool, prefix_sums, randn

CPU = torch.device("cpu")
SMALL = Shape(8, kv_heads=2, group=2, page_size=4)
Arguments = dict[str, Any]


def lengths_override(given: Sequence[int] | Tensor, sequences: int, longest: int) -> list[int]:
    """`given`, verbatim, as the lengths of `sequences` sequences in [0, longest]; ValueError where it is not that."""
    values = torch.as_tensor(given)
    if values.shape != (sequences,):
        raise ValueError(f"lengths must have shape [{sequences}], got {list(values.shape)}")
    lengths: list[int] = values.tolist()
    for sequence, length in enumerate(lengths):
        if not 0 <= length <= longest:
            raise ValueError(f"lengths must be in [0, {longest}], got {length} for sequence {sequence}")
    return lengths


def angles(rows: int, rotary_dim: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, rotary_dim / 2] fp32 of the usual frequencies."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    turns = torch.arange(rows, device=device)[:, None] * frequencies
    return turns.cos(), turns.sin()


def serving(
    new: Sequence[int],
    past: Sequence[int],
    shape: Shape = SMALL,
    device: torch.device = CPU,
    *,
    packed: bool = False,
    rotary_dim: int = 0,
    spare: int = 0,
    seed: int = 0,
    **options: Any,
) -> Arguments:
    """The arguments of `paged_attention_` by name: `new` tokens on top of `past` cached ones, pages shuffled.

    NaN: `spare` rows past the tokens, slots that hold no cached token, pages that nothing maps; table entries past a
    sequence's last page are -1.
    """
    past = lengths_override(past, len(new), 2**24)
    generator = torch.Generator(device).manual_seed(seed)
    size = shape.page_size
    counts = [-(-(before + fresh) // size) for before, fresh in zip(past, new, strict=True)]
    columns, pages = max(counts, default=0) + 1, sum(counts) + 2
    free = random.Random(seed).sample(range(pages), pages)
    table = [[free.pop() for _ in range(count)] + [-1] * (columns - count) for count in counts]
    held = [row[i // size] * size + i % size for row, before in zip(table, past, strict=True) for i in range(before)]
    k_cache, v_cache = empty_pool(shape, pages, device)
    at = torch.tensor(held, dtype=torch.int64, device=device)
    for cache in (k_cache, v_cache):
        cache[at // size, at % size] = randn(generator, shape.dtype, len(held), shape.kv_heads, shape.head_dim)
    tokens, kv_width = sum(new), shape.kv_heads * shape.head_dim
    rows = randn(generator, shape.dtype, tokens + spare, shape.heads * shape.head_dim + 2 * kv_width)
    rows[tokens:] = torch.nan
    query, key, value = rows.split((shape.heads * shape.head_dim, kv_width, kv_width), 1)
    longest = max((before + fresh for before, fresh in zip(past, new, strict=True)), default=0)
    cos, sin = angles(longest + 1, rotary_dim, device) if rotary_dim else (None, None)
    return {
        "query": rows if packed else query,
        "key": None if packed else key,
        "value": None if packed else value,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cu_seqlens_q": prefix_sums(new, device),
        "past_lens": torch.tensor(past, dtype=torch.int32, device=device),
        "block_table": torch.tensor(table, dtype=torch.int32, device=device).reshape(len(new), columns),
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "cos": cos,
        "sin": sin,
        **options,
    }


def twin(arguments: Arguments) -> Arguments:
    """The same call on caches of its own."""
    return {**arguments, **{name: arguments[name].clone() for name in ("k_cache", "v_cache")}}


def image(tensor: Tensor) -> Tensor:
    """A copy of a tensor's bytes in the order of its elements: NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8).clone()


def images(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The bytes of both caches, [pages, page_size, Hkv, bytes of a head]."""
    return image(arguments["k_cache"]), image(arguments["v_cache"])


def places(arguments: Arguments) -> list[list[tuple[int, int]]]:
    """(page, offset) of each new token of each sequence, one value at a time."""
    size = arguments["k_cache"].shape[1]
    ends, past, table = (arguments[name].tolist() for name in ("cu_seqlens_q", "past_lens", "block_table"))
    return [
        [(table[b][p // size], p % size) for p in range(before, before + ends[b + 1] - ends[b])]
        for b, before in enumerate(past)
    ]


def slot_mapping(arguments: Arguments) -> Tensor:
    """[T] int64: the slots that the block table says."""
    size = arguments["k_cache"].shape[1]
    flat = [page * size + offset for row in places(arguments) for page, offset in row]
    return torch.tensor(flat, dtype=torch.int64, device=arguments["query"].device)
