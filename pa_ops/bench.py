"""Turns named cases into timed calls on the GPU, each checked against the fp32 reference, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from pa_ops import bench_mea, bench_padded, bench_serving, evidence, functions, reference, registry, trace
from pa_ops.bench_rows import error_cell
from pa_ops.bench_timers import Timer, looping, one_by_one
from pa_ops.errors import InvalidArgument
from pa_ops.evidence import Key, Timed

CHECKED_QUERIES = 64  # the last query rows of each sequence; their scores over 64 Ki keys still fit beside a cache
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp16": 5e-3, "bf16": 2e-2}
Call = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape: sequences, new tokens and keys of each, sliding window (0: none), heads, head size, page size."""

    name: str
    num_seqs: int
    new: int
    ctx: int
    window: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bf16"

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        first = self.ctx - self.new + 1
        seen = range(first, self.ctx + 1)
        return self.num_seqs * sum(min(keys, self.window) if self.window else keys for keys in seen)

    @property
    def flops(self) -> int:
        """Floating-point operations of both products."""
        return 4 * self.pairs * self.heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that some query sees."""
        keys = min(self.ctx, self.window + self.new - 1) if self.window else self.ctx
        return 2 * 2 * self.num_seqs * keys * self.kv_heads * self.head_dim

    def __str__(self) -> str:
        window = f" window {self.window}" if self.window else ""
        sizes = f"{self.num_seqs} x {self.new} of {self.ctx}{window}"
        return f"{sizes}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.dtype}"


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("prefill", num_seqs=4, new=4096, ctx=4096),
        Case("chunk", num_seqs=4, new=512, ctx=8192),
        Case("decode", num_seqs=32, new=1, ctx=8192),
        Case("swa", num_seqs=8, new=1, ctx=9216, window=8192),
    )
}

TABLES: dict[str, Callable[[Console, torch.device, Path | None], int]] = {
    "serving": bench_serving.run,
    "padded": bench_padded.run,
    "mea": bench_mea.run,
}
"""Cases that are a table of their own."""


@dataclass(frozen=True)
class Row:
    """One timed call: median time in microseconds, what that means, largest error, the kernel that ran, peers."""

    case: str
    shape: str
    instance: str
    digest: str
    microseconds: float
    tflops: float
    gigabytes_per_second: float
    worst_error: float
    right: bool
    target: str = ""
    peers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: q [T, Hq, D], caches [pages, page, Hkv, D] with shuffled pages, lengths, block table."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_table: Tensor


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """Random tensors of a case, the same for every run."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = DTYPES[case.dtype]
    pages = -(-case.ctx // case.page_size)
    total = pages * case.num_seqs

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    cache = (total, case.page_size, case.kv_heads, case.head_dim)
    table = torch.randperm(total, generator=generator, device=device).to(torch.int32)
    return Inputs(
        normal(case.num_seqs * case.new, case.heads, case.head_dim),
        normal(*cache),
        normal(*cache),
        torch.arange(case.num_seqs + 1, dtype=torch.int32, device=device) * case.new,
        torch.full((case.num_seqs,), case.ctx, dtype=torch.int32, device=device),
        table.view(case.num_seqs, pages),
    )


def call_of(case: Case, inputs: Inputs) -> Call:
    """The operator's call for a case."""

    def call() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = functions.paged_attention(
            *vars(inputs).values(), sliding_window=case.window, max_seqlen_q=case.new, max_seqlen_k=case.ctx
        )
        return result

    return call


def peers_of(case: Case, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Peers' calls by name, [B, H, new, D]: PyTorch's own attention, on dense copies of the same keys and values."""
    if case.window:
        return {}

    def dense(cache: Tensor) -> Tensor:
        rows = cache[inputs.block_table.long()].flatten(1, 2)[:, : case.ctx]
        return rows.transpose(1, 2).contiguous()

    q = inputs.q.view(case.num_seqs, case.new, case.heads, case.head_dim).transpose(1, 2).contiguous()
    k, v = dense(inputs.k_cache), dense(inputs.v_cache)
    if case.new in (1, case.ctx):  # no mask, or the square one: what its fused kernels take as a flag
        return {"SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=case.new > 1, enable_gqa=True)}
    group = case.heads // case.kv_heads
    k, v = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    bias = causal_lower_right(case.new, case.ctx)
    return {"SDPA": lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias)}


def error_of(case: Case, inputs: Inputs, out: Tensor) -> float:
    """The largest error of `out` against the reference, over the last query rows of every sequence."""
    rows = min(case.new, CHECKED_QUERIES)
    worst = 0.0
    for sequence in range(case.num_seqs):
        end = (sequence + 1) * case.new
        part = slice(end - rows, end)
        want, _ = reference.paged_attention(
            inputs.q[part],
            inputs.k_cache,
            inputs.v_cache,
            torch.tensor([0, rows], dtype=torch.int32, device=out.device),
            inputs.seqlens_k[sequence : sequence + 1],
            inputs.block_table[sequence : sequence + 1],
            sliding_window=case.window,
        )
        worst = max(worst, float((out[part].float() - want.float()).abs().max()))
    return worst


def measure(case: Case, device: torch.device, timer: Timer = one_by_one) -> Row:
    """Run, check and time one case on whatever kernel selection gives it."""
    inputs = inputs_of(case, device)
    call = call_of(case, inputs)
    with trace.recording() as decisions:
        out, _ = call()
    worst = error_of(case, inputs, out)
    microseconds = timer(call)
    seconds = microseconds * 1e-6
    built = {entry.name: entry for entry in registry.for_device(0).entries} if out.is_cuda else {}
    instance = decisions[-1].instance
    entry = built.get(instance)
    return Row(
        case=case.name,
        shape=str(case),
        instance=instance,
        digest=entry.digest if entry is not None else "",
        microseconds=microseconds,
        tflops=case.flops / seconds * 1e-12,
        gigabytes_per_second=case.kv_bytes / seconds * 1e-9,
        worst_error=worst,
        right=worst <= TOLERANCE[case.dtype],
        target=entry.target if entry is not None else "",
        peers={name: timer(peer) for name, peer in peers_of(case, inputs).items()},
    )


def cases_of(
    name: str, *, ctx: int | None = None, window: int | None = None, num_seqs: int | None = None, dtype: str = "bf16"
) -> list[Case]:
    """The cases that the command line means; raises InvalidArgument naming the option."""
    if name != "all" and name not in CASES:
        raise InvalidArgument("case", f"must be one of {', '.join((*CASES, *TABLES))}, all", repr(name))
    if dtype not in DTYPES:
        raise InvalidArgument("dtype", f"must be one of {', '.join(DTYPES)}", repr(dtype))
    given = {"ctx": ctx, "window": window, "num_seqs": num_seqs}
    least = {"ctx": 1, "window": 0, "num_seqs": 1}
    for option, value in given.items():
        if value is not None and value < least[option]:
            raise InvalidArgument(option, f"must be an integer >= {least[option]}", value)
    changes = {option: value for option, value in given.items() if value is not None}
    chosen = []
    for case in CASES.values() if name == "all" else [CASES[name]]:
        changed = replace(case, dtype=dtype, **changes)  # type: ignore[arg-type]
        chosen.append(replace(changed, new=min(changed.new, changed.ctx)))
    return chosen


def run(
    console: Console,
    *,
    case: str,
    ctx: int | None,
    window: int | None,
    num_seqs: int | None,
    dtype: str,
    loop: float | None,
    output: Path | None,
) -> int:
    """Time the cases, print them, write `output`; 1 where a result is wrong. Raises InvalidArgument without a GPU.

    loop: seconds of each, back to back; else one call at a time.
    """
    timer = one_by_one if loop is None else looping(loop)
    if loop is not None and case in TABLES:
        raise InvalidArgument("loop", f"must be for one of {', '.join(CASES)}, all", f"case {case!r}")
    cases = [] if case in TABLES else cases_of(case, ctx=ctx, window=window, num_seqs=num_seqs, dtype=dtype)
    if not torch.cuda.is_available():
        raise InvalidArgument("device", "bench times kernels on an NVIDIA GPU that torch can use", "no such GPU here")
    device = torch.device("cuda", 0)
    if case in TABLES:
        return TABLES[case](console, device, output)
    rows = [measure(chosen, device, timer) for chosen in cases]
    table = Table("case", "shape", "us", "TFLOP/s", "KV GB/s", "worst error", "best peer / ours", "instance")
    for row in rows:
        rates = (f"{row.microseconds:.1f}", f"{row.tflops:.1f}", f"{row.gigabytes_per_second:.0f}")
        peer = f"{min(row.peers.values()) / row.microseconds:.2f}" if row.peers else ""
        table.add_row(row.case, row.shape, *rates, error_cell(row), peer, row.instance)
    console.print(table)
    if output is not None:
        evidence.write_timed(output, timed(rows))
    return 0 if all(row.right for row in rows) else 1


def timed(rows: list[Row]) -> Iterator[tuple[Key, Timed]]:
    """The rows as the coverage report reads them."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for row in rows:
        rates = row.microseconds, row.tflops, row.gigabytes_per_second
        yield (row.instance, row.target), Timed(row.digest, row.case, row.shape, *rates, card=card, peers=row.peers)
