"""Turns padded batches with masks into times beside every backend of torch's SDPA that takes them, as a table.

8 sequences of 2048 tokens, 32 heads of 128, bf16, tokens before heads as a projection leaves them (SDPA gets the
transposed views) and heads first. A padding mask is told to pa_ops as such, and as lengths, which is what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pa_ops import functions, reference, trace
from pa_ops.bench_rows import error_cell, publish
from pa_ops.bench_timers import back_to_back
from pa_ops.padding import BNSH, BSNH

BATCH, HEADS, TOKENS, HEAD_DIM = 8, 32, 2048, 128
TOLERANCE = 2e-2
REPEATS = 5, 20  # calls before the clock runs, and while it does
CHECKED_QUERIES = 64  # the first rows of each sequence: fp32 scores of all would be 4 GiB
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
KINDS = ("padding as lengths", "padding as bool", "additive")


@dataclass(frozen=True)
class PaddedRow:
    """Times in microseconds: ours, and each backend of SDPA, None where it refuses; our kernel and largest error."""

    case: str
    layout: str
    ours: float
    peers: dict[str, float | None]
    instance: str
    worst_error: float

    @property
    def right(self) -> bool:
        """Whether the output is the reference's."""
        return self.worst_error <= TOLERANCE

    @property
    def ratio(self) -> float | None:
        """Time of the best backend of SDPA by ours."""
        times = [time for time in self.peers.values() if time is not None]
        return min(times) / self.ours if times else None


def inputs_of(kind: str, layout: str, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Our arguments for a case, and the mask that SDPA gets."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (BATCH, HEADS, TOKENS, HEAD_DIM) if layout == BNSH else (BATCH, TOKENS, HEADS, HEAD_DIM)
    made: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for name in "qkv"
    }
    made |= {"layout": layout, "need_present": False}
    if kind == "additive":
        size = (BATCH, 1, TOKENS, TOKENS)
        mask = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        return {**made, "attn_mask": mask}, mask
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (BATCH,), generator=generator, device=device)
    mask = (torch.arange(TOKENS, device=device) < lengths[:, None])[:, None, None]
    return {**made, **({"nonpad_kv_seqlen": lengths} if "lengths" in kind else {"attn_mask": mask})}, mask


def peer_time(backend: SDPBackend, made: dict[str, Any], mask: Tensor) -> float | None:
    """The time of one backend of SDPA; None where it refuses the mask."""
    q, k, v = (made[name] if made["layout"] == BNSH else made[name].transpose(1, 2) for name in "qkv")
    try:
        with sdpa_kernel(backend):
            return back_to_back(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), *REPEATS
            )
    except RuntimeError:  # how SDPA says that a backend does not take a call
        return None


def error_of(made: dict[str, Any], out: Tensor) -> float:
    """The largest difference from the reference, over the first rows of each sequence."""
    axis = made["layout"].index("s")
    few = {**made, "q": made["q"].narrow(axis, 0, CHECKED_QUERIES)}
    mask = few.get("attn_mask")
    if mask is not None and mask.shape[2] > 1:
        few["attn_mask"] = mask[:, :, :CHECKED_QUERIES]
    want = reference.attention(**few)[0]
    return float((out.narrow(axis, 0, CHECKED_QUERIES).float() - want.float()).abs().max())


def measure(kind: str, layout: str, device: torch.device) -> PaddedRow:
    """Check and time one case."""
    made, mask = inputs_of(kind, layout, device)
    with trace.recording() as decisions:
        out = functions.attention(**made)[0]
    peers = {name: peer_time(backend, made, mask) for name, backend in PEERS.items()}
    ours = back_to_back(lambda: functions.attention(**made), *REPEATS)
    return PaddedRow(kind, layout, ours, peers, decisions[-1].instance, error_of(made, out))


def run(console: Console, device: torch.device, output: Path | None) -> int:
    """Time every case, print the table, write the rows to `output`; 1 where a result is wrong."""
    rows = [measure(kind, layout, device) for kind in KINDS for layout in (BSNH, BNSH)]
    title = f"attention, {BATCH} x {TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, bf16; us a call"
    table = Table("case", "layout", "ours", *PEERS, "best / ours", "worst error", "instance", title=title)
    for row in rows:
        peers = (f"{time:.1f}" if time is not None else "refuses" for time in row.peers.values())
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.case, row.layout, f"{row.ours:.1f}", *peers, ratio, error_cell(row), row.instance)
    return publish(console, table, rows, output)
