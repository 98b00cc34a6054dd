"""Turns lengths and shapes into attention problems whose every byte that must not be read is NaN or a bad page."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 1025)
PAIRS = tuple((new, kv) for new in LENGTHS for kv in LENGTHS)
SPARE_ROWS = 3  # query rows past cu_seqlens_q[-1]


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a problem; `group` query heads read one KV head."""

    head_dim: int = 64
    kv_heads: int = 2
    group: int = 4
    dtype: torch.dtype = torch.float16
    page_size: int = 16
    pool: str = "separate"
    head_dim_v: int = 0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def value_dim(self) -> int:
        """The head size of V: that of K unless `head_dim_v` is another."""
        return self.head_dim_v or self.head_dim


@dataclass
class Call:
    """One call of `torch.ops.pa_ops.<op>`: tensors by argument name in order, options, and the rows that are real."""

    op: str
    tensors: dict[str, Tensor]
    rows: int
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Call:
        """The same tensors with other options."""
        return Call(self.op, self.tensors, self.rows, {**self.options, **options})

    def run(self, **more: Any) -> tuple[Tensor, Tensor]:
        """out [T, Hq, D] and lse [Hq, T] of the operator."""
        result: tuple[Tensor, Tensor] = getattr(torch.ops.pa_ops, self.op)(
            *self.tensors.values(), **self.options, **more
        )
        return result

    def run_into(self, out: Tensor, lse: Tensor) -> None:
        """The operator's `.out` overload."""
        overload = getattr(torch.ops.pa_ops, self.op).out
        overload(*self.tensors.values(), **self.options, out=out, lse=lse)

    def poisoned_results(self) -> tuple[Tensor, Tensor]:
        """NaN-filled out and lse for `run_into`."""
        q = self.tensors["q"]
        value = next(tensor for name, tensor in self.tensors.items() if name in ("v", "v_cache"))
        out = q.new_full((*q.shape[:2], value.shape[-1]), torch.nan)
        return out, q.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float32)


def prefix_sums(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[B+1] int32 that starts at 0."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32).to(device)


def randn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32).to(dtype)


def query(generator: torch.Generator, shape: Shape, rows: int) -> Tensor:
    """[rows + SPARE_ROWS, Hq, D], the spare rows NaN."""
    q = randn(generator, shape.dtype, rows + SPARE_ROWS, shape.heads, shape.head_dim)
    q[rows:] = torch.nan
    return q


def sinks(shape: Shape, device: torch.device) -> Tensor:
    """[Hq] fp32 from -2 to 6."""
    return torch.linspace(-2, 6, shape.heads, device=device)


def empty_pool(shape: Shape, pages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """NaN-filled K and V caches [pages, page_size, Hkv, D], as views of whatever `shape.pool` says lies beneath."""
    size, heads, dim = shape.page_size, shape.kv_heads, shape.head_dim

    def nan(*sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=shape.dtype, device=device)

    if shape.pool == "separate":
        return nan(pages, size, heads, dim), nan(pages, size, heads, shape.value_dim)
    if shape.pool == "fused":
        fused = nan(pages, 2, size, heads, dim)
        return fused[:, 0], fused[:, 1]
    if shape.pool == "hnd":
        return nan(pages, heads, size, dim).transpose(1, 2), nan(pages, heads, size, dim).transpose(1, 2)
    if shape.pool == "packed":
        packed = nan(pages, heads, size, 2 * dim).transpose(1, 2)
        return packed[..., :dim], packed[..., dim:]
    raise ValueError(f"pool must be separate, fused, hnd or packed, got {shape.pool!r}")


def _first_visible(new: int, kv: int, window: int) -> int:
    """The lowest key that any of the last `new` queries sees."""
    return max(0, kv - new - window + 1) if window > 0 else 0


def paged(
    pairs: Sequence[tuple[int, int]],
    shape: Shape,
    device: torch.device,
    *,
    seed: int = 0,
    sliding_window: int = 0,
    **options: Any,
) -> Call:
    """`paged_attention` over (new, kv) lengths, pages shuffled.

    NaN: slots that no query sees (behind the window, past the length, of sequences without queries) and whole pages
    that nothing maps. Table entries outside the visible range are in turn -1, past the pool, or such a NaN page.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shuffle = random.Random(seed)
    size = shape.page_size
    columns = max((-(-kv // size) for _, kv in pairs), default=0) + 2
    pages = sum(-(-kv // size) for _, kv in pairs) + 2
    free = list(range(pages))
    shuffle.shuffle(free)
    nan_page = free.pop()
    poison = (-1, pages + 7, nan_page, -(2**31), 2**31 - 1)
    table = [[poison[(row + column) % len(poison)] for column in range(columns)] for row in range(len(pairs))]
    slots: list[int] = []
    for row, (new, kv) in enumerate(pairs):
        live = range(_first_visible(new, kv, sliding_window), kv if new else 0)
        for page in sorted({position // size for position in live}):
            table[row][page] = free.pop()
        slots += [table[row][position // size] * size + position % size for position in live]
    k_cache, v_cache = empty_pool(shape, pages, device)
    at = torch.tensor(slots, dtype=torch.int64, device=device)
    for cache in (k_cache, v_cache):
        cache[at // size, at % size] = randn(generator, shape.dtype, len(slots), *cache.shape[2:])
    rows = sum(new for new, _ in pairs)
    tensors = {
        "q": query(generator, shape, rows),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cu_seqlens_q": prefix_sums([new for new, _ in pairs], device),
        "seqlens_k": torch.tensor([kv for _, kv in pairs], dtype=torch.int32, device=device),
        "block_table": torch.tensor(table, dtype=torch.int32, device=device).reshape(len(pairs), columns),
    }
    return Call("paged_attention", tensors, rows, {"sliding_window": sliding_window, **options})


def moved_far(call: Call, pages: int) -> Call:
    """The same paged call in pools of so many pages, its own being the last; what lies before them is NaN."""
    moved = {}
    for name in ("k_cache", "v_cache"):
        cache = call.tensors[name]
        moved[name] = cache.new_full((pages, *cache.shape[1:]), torch.nan)
        moved[name][pages - cache.shape[0] :] = cache
    table, here = call.tensors["block_table"], call.tensors["k_cache"].shape[0]
    live = (table >= 0) & (table < here)
    moved["block_table"] = torch.where(live, table + (pages - here), table).to(torch.int32)
    return Call(call.op, {**call.tensors, **moved}, call.rows, call.options)


def punch_holes(call: Call) -> None:
    """Unmap the first and the third page of sequence 0, the latter by a number past the pool, and all of sequence 2."""
    table = call.tensors["block_table"]
    table[0, 0] = -1
    table[0, 2] = table.max() + 1000
    table[2] = -7


def varlen(
    pairs: Sequence[tuple[int, int]], shape: Shape, device: torch.device, *, seed: int = 0, **options: Any
) -> Call:
    """`varlen_attention` over (new, kv) lengths; keys of sequences without queries and past the end are NaN."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, keys = (sum(pair[side] for pair in pairs) for side in (0, 1))
    sizes = (shape.head_dim, shape.value_dim)
    k, v = (randn(generator, shape.dtype, keys + SPARE_ROWS, shape.kv_heads, size) for size in sizes)
    seen = [bool(new) for new, kv in pairs for _ in range(kv)] + [False] * SPARE_ROWS
    unseen = ~torch.tensor(seen, dtype=torch.bool, device=device)
    k[unseen] = torch.nan
    v[unseen] = torch.nan
    tensors = {
        "q": query(generator, shape, rows),
        "k": k,
        "v": v,
        "cu_seqlens_q": prefix_sums([new for new, _ in pairs], device),
        "cu_seqlens_k": prefix_sums([kv for _, kv in pairs], device),
    }
    return Call("varlen_attention", tensors, rows, options)
