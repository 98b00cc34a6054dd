"""Turns the attention kernels that are built for a card into the table of times that selection ranks them by there.

Each runs alone, asked for by its name, on one shape of few query rows and one of many: 32/8 heads of its own head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pa_ops import functions, timings
from pa_ops.errors import InvalidArgument
from pa_ops.launch import DTYPES
from pa_ops.manifest import Entry
from pa_ops.registry import capability_of, for_device
from pa_ops.spec import PLAIN_MASKS, InstanceSpec, KernelOp, Layout, Mask
from pa_ops.timings import ShapeClass, Timing

HEADS, KV_HEADS, PAGE_SIZE, WINDOW = 32, 8, 16, 1024
ROUNDS, WARM_UP, CALLS = 2, 2, 9
SECONDS = 0.25  # of a kernel and shape, at most: one that takes 30 ms a call shows its place in fewer
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Sequences, new tokens and keys of each."""

    sequences: int
    new: int
    keys: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.new} of {self.keys}, {HEADS}/{KV_HEADS} heads"


SHAPES = {ShapeClass.FEW: Shape(32, 1, 4096), ShapeClass.MANY: Shape(4, 2048, 2048)}


@lru_cache(maxsize=1)
def _tensors(
    dtype: torch.dtype, head_dims: tuple[int, int], layout: Layout, shape: Shape, device: torch.device
) -> list[Tensor]:
    """The operator's tensors, made once for kernels that come one after the other."""
    generator = torch.Generator(device=device).manual_seed(0)
    count = shape.sequences * shape.keys

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    ends = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device)
    q = normal(shape.sequences * shape.new, HEADS, head_dims[0])
    if layout is Layout.DENSE:
        k, v = (normal(count, KV_HEADS, head_dim) for head_dim in head_dims)
        return [q, k, v, ends * shape.new, ends * shape.keys]
    pages = count // PAGE_SIZE
    k, v = (normal(pages, PAGE_SIZE, KV_HEADS, head_dim) for head_dim in head_dims)
    table = torch.randperm(pages, generator=generator, device=device).to(torch.int32).view(shape.sequences, -1)
    lengths = torch.full((shape.sequences,), shape.keys, dtype=torch.int32, device=device)
    return [q, k, v, ends * shape.new, lengths, table]


def call_of(spec: InstanceSpec, shape: Shape, device: torch.device) -> Call:
    """A call that the kernel of `spec` serves alone."""
    tensors = _tensors(DTYPES[spec.dtype], (spec.head_dim, spec.head_dim_v), spec.layout, shape, device)
    operator: Callable[..., Any] = (
        functions.varlen_attention if spec.layout is Layout.DENSE else functions.paged_attention
    )
    window = WINDOW if spec.mask is Mask.WINDOW else 0
    bounds = {"max_seqlen_q": shape.new, "max_seqlen_k": shape.keys}
    causal = spec.mask is not Mask.FULL
    return lambda: operator(*tensors, causal=causal, sliding_window=window, backend=spec.name, **bounds)


def milliseconds(call: Call) -> list[float]:
    """Times of calls on the GPU, each by itself."""
    times: list[float] = []
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    end = time.monotonic() + SECONDS
    while len(times) < CALLS and (len(times) < 3 or time.monotonic() < end):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(float(first.elapsed_time(last)))
    return times


def record(entries: list[Entry], device: torch.device, clock: Callable[[Call], list[float]]) -> Iterator[Timing]:
    """A time of every attention kernel and shape class: the least of its rounds' medians.

    Kernels of one kind of tensors follow each other, and all come before the next round: a device that was idle takes a
    while to reach its clock, and the first kernels of a single round came out 15 to 70% too slow on an H200. Those of a
    mask tensor have no rival whose time would matter.
    """
    attention = [entry for entry in entries if entry.spec.op is KernelOp.ATTN and entry.spec.mask in PLAIN_MASKS]
    kinds = sorted(attention, key=lambda entry: (entry.spec.dtype, entry.spec.head_dim, entry.spec.layout, entry.name))
    asked = [(shape_class, shape, entry) for shape_class, shape in SHAPES.items() for entry in kinds]
    rounds = [[clock(call_of(entry.spec, shape, device)) for _, shape, entry in asked] for _ in range(ROUNDS)]
    for (shape_class, shape, entry), *times in zip(asked, *rounds, strict=True):
        microseconds = round(1e3 * min(map(median, times)), 2)
        yield Timing(
            entry.name, entry.target, shape_class, microseconds, entry.digest, str(shape), sum(map(len, times))
        )


def run(console: Console, output: Path) -> int:
    """Times the kernels of the GPU that is here into `output`, where other cards keep their rows."""
    if not torch.cuda.is_available():
        raise InvalidArgument("device", "bench times kernels on an NVIDIA GPU that torch can use", "no such GPU here")
    device, card = torch.device("cuda", 0), capability_of(0).card
    began = time.monotonic()
    found = list(record(list(for_device(0).entries), device, milliseconds))
    if not found:
        raise InvalidArgument("product", "must hold attention kernels; run pa-ops build", "none")
    cards = {**timings.load(output), card: {each.key: each for each in found}}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(timings.dumps(cards), encoding="utf-8")
    timings.of_card.cache_clear()
    console.print(f"{len(found)} times of {card} in {time.monotonic() - began:.0f} s -> {output}", soft_wrap=True)
    return 0
