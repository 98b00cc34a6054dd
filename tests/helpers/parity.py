"""Turns a call into a verdict: its results against the fp32 reference, and evidence of which kernel gave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pa_ops
from helpers.problems import Call
from pa_ops import reference, registry

TOLERANCE = {torch.float16: (5e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
"""dtype -> (absolute, relative): |got - want| <= absolute + relative * |want|."""


@dataclass
class Row:
    """What was seen of one instance: comparisons that held, the largest absolute error of an output."""

    digest: str
    tests: int = 0
    worst_error: float = 0.0
    tools: dict[str, str] = field(default_factory=dict)


@dataclass
class Evidence:
    """Rows by instance name, for the coverage report."""

    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, calls: Sequence[Any], error: float) -> None:
        """Counts one comparison that held for every kernel among the recorded `calls`."""
        here = registry.for_device(0)
        entries = {entry.name: entry for entry in here.entries}
        for name in {call.instance for call in calls}:
            row = self.rows.setdefault(name, Row(entries[name].digest, tools=here.tools(entries[name])))
            if row.digest == entries[name].digest:  # else code of the same name for another target
                row.tests += 1
                row.worst_error = max(row.worst_error, error)

    def write(self, path: Path) -> None:
        """JSON by instance name."""
        rows = {name: asdict(row) for name, row in sorted(self.rows.items())}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def error_of(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> float:
    """The largest absolute error; raises AssertionError where an element is NaN or out of tolerance for `dtype`."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    if not got.numel():
        return 0.0
    absolute, relative = TOLERANCE[dtype]
    got, want = got.float(), want.float()
    same = got == want  # equal infinities too
    error = torch.where(same, 0.0, (got - want).abs())
    bad = ~(same | (error <= absolute + relative * want.abs()))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off, first at {at}: "
            f"{got[at].item()} for {want[at].item()}; largest error {error.nan_to_num(nan=torch.inf).max().item():.3g}"
        )
    return float(error.max())


def expected(call: Call) -> tuple[Tensor, Tensor]:
    """fp32 out and lse of the reference, unrounded."""
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in call.tensors.items()}
    options = {name: value for name, value in call.options.items() if name != "backend"}
    return getattr(reference, call.op)(*tensors.values(), **options)  # type: ignore[no-any-return]


def check_each(call: Call, backends: Sequence[str], evidence: Evidence, what: object = "") -> None:
    """Checks `call` on each of `backends`, against one run of the reference: that is what takes the time."""
    want = expected(call)
    for backend in backends:
        check(call.with_options(backend=backend), evidence, f"{what}, backend {backend}", want)


def check(
    call: Call, evidence: Evidence, what: object = "", want: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Runs `call` into poisoned buffers on a kernel, compares with the reference or `want`; its out and lse.

    Fails where a row past cu_seqlens_q[-1] was written, where the reference family answered, or on any difference.
    """
    out, lse = call.poisoned_results()
    with pa_ops.trace.recording() as calls:
        call.run_into(out, lse)
    assert calls and all(made.family != "reference" for made in calls), f"{what}: no kernel ran: {calls}"
    want_out, want_lse = want or expected(call)
    dtype, rows = out.dtype, call.rows
    names = ", ".join(made.instance for made in calls)
    where = f"{call.op} {what} on {names}"
    error = error_of(out[:rows], want_out[:rows], dtype, f"out of {where}")
    error_of(lse[:, :rows], want_lse[:, :rows], dtype, f"lse of {where}")
    assert out[rows:].isnan().all() and lse[:, rows:].isnan().all(), f"{where} wrote past cu_seqlens_q[-1]"
    evidence.add(calls, error)
    return out[:rows], lse[:, :rows]
