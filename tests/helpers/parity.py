"""Turns a call into a verdict: its results against the fp32 reference, and evidence of which kernel gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pa_ops
from helpers.problems import Call
from pa_ops import reference, registry
from pa_ops.evidence import Evidence as Row
from pa_ops.evidence import Key

TOLERANCE = {torch.float16: (5e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)}
"""dtype -> (absolute, relative): |got - want| <= absolute + relative * |want|."""


@dataclass(frozen=True)
class Evidence:
    """What one test sees of kernels goes into `rows`, which all tests of a process share."""

    test: str  # its node id
    rows: dict[Key, Row] = field(default_factory=dict)

    def add(self, calls: Sequence[Any], error: float) -> None:
        """Counts one comparison that held for every kernel among the recorded `calls`."""
        here = registry.for_device(0)
        entries = {entry.name: entry for entry in here.entries}
        for name in {call.instance for call in calls}:
            entry = entries[name]
            function = self.test.partition("[")[0]
            seen = Row(entry.digest, 1, error, tools=here.tools(entry), by=(function,), worst_test=self.test)
            key = name, entry.target
            self.rows[key] = self.rows[key].joined(seen) if key in self.rows else seen


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


def repeats(run: Callable[[], tuple[Tensor, Tensor]], rows: int, what: object = "") -> None:
    """Checks that a call, run five times more, gives the bits of so many rows that it gave first."""
    out, lse = (first.clone() for first in run())
    for _ in range(5):
        again, again_lse = run()
        assert torch.equal(again[:rows], out[:rows]), what
        assert torch.equal(again_lse[:, :rows], lse[:, :rows]), what


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
