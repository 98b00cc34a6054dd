"""Turns the mea families' cases into times beside SDPA's memory-efficient kernel, as a table: what older SMs would run.

fp16, the dtype that every SM has. `compute_75` is the code of SM 7.5, which the driver translates for the card at hand;
the other target is the card's own. Prefill: dense rows, and pages of 16 tokens in random order; SDPA gets dense
tensors, KV heads repeated before the clock runs. Decode: from pages; SDPA's call gathers them and repeats KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pa_ops import functions, homes, trace
from pa_ops.bench_rows import error_cell, publish
from pa_ops.bench_timers import back_to_back
from pa_ops.environment import homed
from pa_ops.errors import InvalidArgument
from pa_ops.manifest import FILE_NAME

TARGETS = ("compute_75", "sm_90a")
PAGE_SIZE = 16
WARM_UP = 2
SECONDS = 0.06  # of a timing, about
TOLERANCE = 5e-3
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class MeaCase:
    """Sequences, new tokens and keys of each, query and KV heads of how many channels, whether masked."""

    name: str
    num_seqs: int
    new: int
    ctx: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def decodes(self) -> bool:
        """Whether its sequences have one new token."""
        return self.new == 1

    @property
    def flops(self) -> int:
        """Floating-point operations of both products; a case that is causal has as many tokens as keys."""
        pairs = self.ctx * (self.ctx + 1) // 2 if self.causal else self.new * self.ctx
        return 4 * self.num_seqs * pairs * self.heads * self.head_dim


def _long(head_dim: int) -> Iterator[MeaCase]:
    for causal in (True, False):
        name = f"D {head_dim}, 16k, {'causal' if causal else 'full'}"
        heads = 2048 // head_dim
        yield MeaCase(name, 1, 16384, 16384, heads, heads, head_dim, causal)


CASES = (
    *(case for head_dim in (64, 128, 256) for case in _long(head_dim)),
    MeaCase("GQA 32/8, D 128, 4 x 4k, causal", 4, 4096, 4096, 32, 8, 128, True),
    MeaCase("GQA 32/8, D 128, 32 x 512, causal", 32, 512, 512, 32, 8, 128, True),
    MeaCase("decode, GQA 32/8, D 128, 1 x 4k", 1, 1, 4096, 32, 8, 128, False),
    MeaCase("decode, GQA 32/8, D 128, 16 x 8k", 16, 1, 8192, 32, 8, 128, False),
    MeaCase("decode, GQA 32/8, D 128, 64 x 4k", 64, 1, 4096, 32, 8, 128, False),
)


@dataclass(frozen=True)
class MeaRow:
    """Times in microseconds: ours by target and layout, SDPA's, of one case; kernels that ran, largest difference."""

    case: str
    target: str
    layout: str
    microseconds: float
    peer: float
    tflops: float
    instance: str
    worst_error: float

    @property
    def ratio(self) -> float:
        """SDPA's time by ours."""
        return self.peer / self.microseconds

    @property
    def right(self) -> bool:
        """Whether the output is SDPA's."""
        return self.worst_error <= TOLERANCE


@dataclass(frozen=True)
class Inputs:
    """q [T, Hq, D], dense k and v [B, S, Hkv, D], the same in shuffled pages, prefix sums, lengths, block table."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    queries: Tensor
    keys: Tensor
    lengths: Tensor
    table: Tensor


def inputs_of(case: MeaCase, device: torch.device) -> Inputs:
    """Random tensors of a case, the same for every run."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float16)

    size = (case.num_seqs, case.ctx, case.kv_heads, case.head_dim)
    q, k, v = normal(case.num_seqs * case.new, case.heads, case.head_dim), normal(*size), normal(*size)
    pages = case.num_seqs * case.ctx // PAGE_SIZE
    order = torch.randperm(pages, generator=generator, device=device)

    def shuffled(dense: Tensor) -> Tensor:
        cache = dense.new_empty(pages, PAGE_SIZE, *dense.shape[2:])
        cache[order] = dense.view_as(cache)
        return cache

    ends = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=device)
    lengths = torch.full((case.num_seqs,), case.ctx, dtype=torch.int32, device=device)
    table = order.to(torch.int32).view(case.num_seqs, -1)
    return Inputs(q, k, v, shuffled(k), shuffled(v), ends * case.new, ends * case.ctx, lengths, table)


def calls_of(case: MeaCase, inputs: Inputs) -> dict[str, Call]:
    """Our calls by layout of K and V; each family is the best of its name."""

    def paged() -> Tensor:
        tensors = inputs.q, inputs.k_cache, inputs.v_cache, inputs.queries, inputs.lengths, inputs.table
        return functions.paged_attention(
            *tensors, causal=case.causal, max_seqlen_q=case.new, max_seqlen_k=case.ctx, backend="mea"
        )[0]

    def dense() -> Tensor:
        k, v = inputs.k.flatten(0, 1), inputs.v.flatten(0, 1)
        return functions.varlen_attention(
            inputs.q, k, v, inputs.queries, inputs.keys, causal=case.causal, backend="mea"
        )[0]

    return {"paged": paged} if case.decodes else {"dense": dense, "paged": paged}


def peer_of(case: MeaCase, inputs: Inputs) -> Call:
    """SDPA's memory-efficient kernel on the same numbers; its output is [T, Hq, D] as ours."""
    q = inputs.q.view(case.num_seqs, case.new, case.heads, case.head_dim).transpose(1, 2).contiguous()

    def heads_first(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).repeat_interleave(case.heads // case.kv_heads, 1).contiguous()

    def gathered(cache: Tensor) -> Tensor:
        return heads_first(cache[inputs.table].flatten(1, 2))

    k, v = heads_first(inputs.k), heads_first(inputs.v)

    def call() -> Tensor:
        keys, values = (gathered(inputs.k_cache), gathered(inputs.v_cache)) if case.decodes else (k, v)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            out = scaled_dot_product_attention(q, keys, values, is_causal=case.causal)
        return out.transpose(1, 2).flatten(0, 1)

    return call


@contextmanager
def only(target: str) -> Iterator[None]:
    """Inside, what is built for `target` is all that there is. Raises InvalidArgument where nothing is."""
    built = homes.home() / target
    if not (built / FILE_NAME).is_file():
        raise InvalidArgument(
            "case", f"mea needs pa-ops build --arch {','.join(TARGETS)}", f"no {target} in {built.parent}"
        )
    with TemporaryDirectory() as home, homed(home):
        (Path(home) / target).symlink_to(built.absolute())
        yield


def timed(call: Call) -> float:
    """Microseconds of a call, over as many as fill SECONDS."""
    once = back_to_back(call, WARM_UP, 1)
    return back_to_back(call, 0, max(3, min(200, int(SECONDS * 1e6 / once))))


def measure(case: MeaCase, device: torch.device) -> Iterator[MeaRow]:
    """Check and time one case, on every target and layout."""
    inputs = inputs_of(case, device)
    peer = peer_of(case, inputs)
    want, peer_time = peer(), timed(peer)
    for target in TARGETS:
        with only(target):
            for layout, call in calls_of(case, inputs).items():
                with trace.recording() as decisions:
                    out = call()
                error = float((out.float() - want.float()).abs().max())
                time = timed(call)
                tflops = case.flops / time * 1e-6
                yield MeaRow(case.name, target, layout, time, peer_time, tflops, decisions[-1].instance, error)


def run(console: Console, device: torch.device, output: Path | None) -> int:
    """Time every case, print the table, write the rows to `output`; 1 where a result is wrong."""
    rows = [row for case in CASES for row in measure(case, device)]
    title = "mea and mea_decode, fp16, beside SDPA's memory-efficient kernel; us a call"
    table = Table(
        "case", "SDPA", "target", "layout", "ours", "TFLOP/s", "ratio", "worst difference", "instance", title=title
    )
    for row in rows:
        times = (f"{row.peer:.1f}", row.target, row.layout, f"{row.microseconds:.1f}", f"{row.tflops:.1f}")
        table.add_row(row.case, *times, f"{row.ratio:.2f}", error_cell(row), row.instance)
    return publish(console, table, rows, output)
