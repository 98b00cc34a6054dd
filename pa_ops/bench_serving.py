"""Turns the serving operator's cases into times beside two other ways to size its launches, as a table.

The cases are those of onnxruntime's pull request 28409, on the inputs of its PagedAttention measurements: 32 query and
8 KV heads of 128, fp16, pages of 256. It discusses two ways to size launches when only the device knows the lengths,
and both are run here with this project's kernels. `heuristic`: no sequence has more than T - (B - 1) new tokens, so a
grid has that many rows for each of B sequences; blocks without work leave at once. `host copy`: the lengths are
copied to the host, which waits for them, and the grids are exact. Neither had a kernel for few query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pa_ops import reference
from pa_ops.bench_rows import error_cell, publish
from pa_ops.bench_timers import back_to_back
from pa_ops.calls import TENSORS, program_of
from pa_ops.checks import validate
from pa_ops.plan import attention_tiles, ceil_div
from pa_ops.program import Grid, GridRule
from pa_ops.registry import for_device
from pa_ops.schema import signature
from pa_ops.scratch import workspace
from pa_ops.selection import AUTO
from pa_ops.spec import Family, InstanceSpec
from pa_ops.steps import MAKERS, Step

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 256
CACHED = 1024
MAX_GRID = 2**31 - 1
TOLERANCE = 5e-3
OP = "paged_attention_"


@dataclass(frozen=True)
class ServingCase:
    """New tokens of each sequence, tokens already cached of each, and whether Q and K are rotated."""

    name: str
    lengths: tuple[int, ...]
    past: int = 0
    rotary: bool = True

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return sum(self.lengths)

    @property
    def short(self) -> bool:
        """Whether no sequence has more new tokens than a decode step with speculation."""
        return max(self.lengths) <= 16

    @property
    def longest_by_heuristic(self) -> int:
        """What remains for one sequence when every other has a token."""
        return max(self.tokens - (len(self.lengths) - 1), 1)


def _prefill(batch: int, rotary: bool) -> ServingCase:
    return ServingCase(f"prefill {batch} x 1024{'' if rotary else ', no rotary'}", (1024,) * batch, rotary=rotary)


CASES: tuple[ServingCase, ...] = (
    *(_prefill(batch, rotary) for rotary in (True, False) for batch in (1, 4, 16, 64)),
    *(ServingCase(f"decode {batch}", (1,) * batch, CACHED) for batch in (1, 4, 16, 64)),
    ServingCase("mixed 1 x 1024 + 63 x 1", (1024, *(1,) * 63), CACHED),
    ServingCase("zero mix 10 + 3 x 0", (10, *(0,) * 3)),
    ServingCase("zero mix 10 + 63 x 0", (10, *(0,) * 63)),
)


@dataclass(frozen=True)
class ServingRow:
    """Times in microseconds of back-to-back calls: ours, attention alone, the two emulations, ours with the families
    of older SMs forced (None for long sequences); the largest error.
    """

    case: str
    ours: float
    attention: float
    heuristic: float
    host_copy: float
    mea: float | None
    worst_error: float

    @property
    def right(self) -> bool:
        """Whether output and caches are those of the reference."""
        return self.worst_error <= TOLERANCE


@dataclass(frozen=True)
class Inputs:
    """A call's tensors in order, and its options."""

    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any]

    def clone(self) -> Inputs:
        """The same with caches of their own."""
        fresh = [t.clone() if t is not None and t.dim() == 4 else t for t in self.tensors]
        return Inputs(tuple(fresh), self.options)


def inputs_of(case: ServingCase, device: torch.device) -> Inputs:
    """Random packed QKV, caches with shuffled pages, lengths, block table, cos and sin."""
    random = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=torch.float16)

    batch, pages = len(case.lengths), ceil_div(case.past + max(case.lengths), PAGE_SIZE)
    table = torch.randperm(batch * pages, generator=random, device=device).to(torch.int32).view(batch, pages)
    ends = torch.tensor((0, *case.lengths), device=device).cumsum(0, dtype=torch.int32)
    options: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    if case.rotary:
        angles = torch.rand(case.past + max(case.lengths), HEAD_DIM // 2, generator=random, device=device) * 6.28
        options.update(cos=angles.cos().half(), sin=angles.sin().half())
    cache = (batch * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    past = torch.full((batch,), case.past, dtype=torch.int32, device=device)
    packed = normal(case.tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    return Inputs((packed, None, None, normal(*cache), normal(*cache), ends, past, table), options)


@dataclass(frozen=True)
class Prepared:
    """A call's arguments by name, its steps, and the function that runs programs."""

    arguments: dict[str, Any]
    steps: tuple[Step, ...]
    run: Callable[..., int]

    def call(self, steps: Sequence[Step]) -> Callable[[], int]:
        """A call that makes the launches `steps`."""
        program = program_of(OP, self.arguments, steps)
        given = tuple(self.arguments.get(name) for name in TENSORS[OP])
        return lambda: self.run(program.address, *given)


def prepare(inputs: Inputs, out: Tensor, backend: str) -> Prepared:
    """What the operator would do for a call, taken apart."""
    own = {"out": out, "lse": None, "workspace": workspace(out.device.index), "backend": backend}
    arguments = {**signature(OP).bind(inputs.tensors, inputs.options), **own}
    registry = for_device(out.device.index)
    steps = tuple(MAKERS[OP](OP, arguments, validate(OP, arguments), registry))
    return Prepared(arguments, steps, registry.caller())


def resized(steps: Sequence[Step], append_blocks: int, tiles: Callable[[int], int]) -> tuple[Step, ...]:
    """The same launches with other grids; `tiles` tells the row blocks for a tile's rows."""
    append, attend = steps
    rows = InstanceSpec.parse(attend.decision.instance).tile.m
    grids = (append_blocks, 1), (tiles(rows), HEADS)
    return tuple(
        step._replace(launch=replace(step.launch, grid=Grid(GridRule.FIXED, min(x, MAX_GRID), y)))
        for step, (x, y) in zip((append, attend), grids, strict=True)
    )


def heuristic_call(case: ServingCase, made: Prepared) -> Callable[[], int]:
    """Grids of B times the heuristic's length: a block a token and head for rotation, row tiles for attention."""
    batch, longest = len(case.lengths), case.longest_by_heuristic
    heads = HEADS + KV_HEADS if case.rotary else 1
    return made.call(resized(made.steps, batch * longest * heads, lambda rows: batch * ceil_div(longest, rows)))


def host_copy_call(made: Prepared) -> Callable[[], int]:
    """Exact grids from lengths that the host waits for."""
    ends = made.arguments["cu_seqlens_q"]

    def call() -> int:
        lengths = ends.cpu().diff()
        longest, tokens = int(lengths.max()), int(lengths.sum())
        exact = resized(made.steps, tokens, lambda rows: attention_tiles(tokens, len(lengths), rows, longest))
        return made.call(exact)()

    return call


def error_of(inputs: Inputs) -> float:
    """The largest difference of output and caches from the reference's."""
    got, want = inputs.clone(), inputs.clone()
    out = torch.ops.pa_ops.paged_attention_(*got.tensors, **got.options)
    expected = reference.paged_attention_(*want.tensors, **want.options)  # type: ignore[arg-type]
    pairs = [(out, expected), *((got.tensors[i], want.tensors[i]) for i in (3, 4))]
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs if a is not None and b is not None)


def measure(case: ServingCase, device: torch.device) -> ServingRow:
    """Check and time one case."""
    inputs = inputs_of(case, device)
    worst = error_of(inputs)
    out = torch.empty(case.tokens, HEADS * HEAD_DIM, dtype=torch.float16, device=device)
    made, emulated = prepare(inputs, out, AUTO), prepare(inputs, out, Family.FLASH_SM80)

    def operator(**forced: str) -> Callable[[], object]:
        return lambda: torch.ops.pa_ops.paged_attention_(*inputs.tensors, **inputs.options, **forced)

    return ServingRow(
        case.name,
        back_to_back(operator()),
        back_to_back(made.call(made.steps[1:])),
        back_to_back(heuristic_call(case, emulated)),
        back_to_back(host_copy_call(emulated)),
        back_to_back(operator(backend=Family.MEA)) if case.short else None,
        worst,
    )


def run(console: Console, device: torch.device, output: Path | None) -> int:
    """Time every case, print the table, write the rows to `output`; 1 where a result is wrong."""
    rows = [measure(case, device) for case in track(CASES, "cases", console=console, transient=True)]
    title = f"paged_attention_, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, fp16, pages of {PAGE_SIZE}; us a call"
    table = Table("case", "ours", "attention alone", "heuristic", "host copy", "mea", "worst error", title=title)
    for row in rows:
        times = (row.ours, row.attention, row.heuristic, row.host_copy, row.mea)
        table.add_row(row.case, *("" if time is None else f"{time:.1f}" for time in times), error_cell(row))
    return publish(console, table, rows, output)
