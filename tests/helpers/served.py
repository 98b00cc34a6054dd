"""Turns a call of the serving operator into a verdict: output and caches against the reference, on kernels alone."""

from __future__ import annotations

import torch
from torch import Tensor

import pa_ops
from helpers.chosen import few_and_many, serving_problem
from helpers.parity import Evidence, error_of
from helpers.serving import Arguments, twin
from pa_ops import reference

TENSORS = ("query", "key", "value", "k_cache", "v_cache", "cu_seqlens_q", "past_lens", "block_table")
CACHES = ("k_cache", "v_cache")
MANY = 200  # sequences that the CPU is through with before a GPU has launched what the reference does for each


def serve(arguments: Arguments, **buffers: Tensor | None) -> Tensor:
    """The operator on `arguments` by name; into the caller's buffers where they are given."""
    options = {name: value for name, value in arguments.items() if name not in TENSORS}
    tensors = [arguments[name] for name in TENSORS]
    if not buffers:
        out: Tensor = torch.ops.pa_ops.paged_attention_(*tensors, **options)
        return out
    torch.ops.pa_ops.paged_attention_.out(*tensors, **options, **buffers)
    assert buffers["out"] is not None
    return buffers["out"]


def refer(arguments: Arguments) -> Tensor:
    """The reference on `arguments` by name; `backend` is not its."""
    return reference.paged_attention_(**{name: value for name, value in arguments.items() if name != "backend"})


def apart(arguments: Arguments) -> Arguments:
    """The same call on caches of its own; on the CPU where there are MANY sequences."""
    theirs = twin(arguments)
    if arguments["cu_seqlens_q"].numel() <= MANY:
        return theirs
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in theirs.items()}


def check(arguments: Arguments, evidence: Evidence | None = None, what: object = "") -> Tensor:
    """Serves `arguments` into a poisoned output on kernels, compares output, lse and caches; the rows that are real.

    The caches of `arguments` are those that the kernels write to, as views of whatever lies beneath them.
    Rows past cu_seqlens_q[-1] must stay as they were; so must each cached value that is not a new token's.
    """
    query, theirs = arguments["query"], apart(arguments)
    heads, head_dim = arguments["num_heads"], arguments["k_cache"].shape[3]
    out = query.new_full((query.shape[0], heads * head_dim), torch.nan)
    lse = query.new_full((heads, query.shape[0]), torch.nan, dtype=torch.float32)
    with pa_ops.trace.recording() as calls:
        serve(arguments, out=out, lse=lse)
    few, many = few_and_many(serving_problem(arguments), arguments.get("backend", "auto"))
    families = [made.family for made in calls]
    assert families in ([], *(["append", *some] for some in ([few], [many], [few, many]))), f"{what}: {families}"
    want = refer(theirs).to(out.device)
    rows = int(arguments["cu_seqlens_q"][-1])
    error = error_of(out[:rows], want[:rows].float(), out.dtype, f"out of {what}")
    assert out[rows:].isnan().all() and lse[:, rows:].isnan().all(), f"{what} wrote past cu_seqlens_q[-1]"
    assert not lse[:, :rows].isnan().any(), f"{what} left lse unwritten"
    for name in CACHES:
        same_cache(arguments[name], theirs[name].to(out.device), f"{name} of {what}")
    if evidence is not None and calls:
        evidence.add(calls, error)
    return out[:rows]


def same_cache(got: Tensor, want: Tensor, what: str) -> None:
    """Equal to a rounding, for fp32 sums may be fused or not; NaN stays NaN."""
    step = 2 * torch.finfo(got.dtype).eps
    close = torch.isclose(got.float(), want.float(), rtol=step, atol=step, equal_nan=True)
    assert close.all(), f"{what}: {int((~close).sum())} values differ, first at {(~close).nonzero()[0].tolist()}"
