"""Overrides and imports as a user meets them: blocks that restore, families refused for CPU tensors, a light import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pa_ops
from pa_ops import InvalidArgument, trace


def test_overrides_are_restored_after_an_exception() -> None:
    problem = pa_ops.Problem(op="varlen_attention", dtype="fp16", head_dim=64)
    with pytest.raises(RuntimeError, match="inside"), pa_ops.backend("mea"), pa_ops.batch_invariant():
        raise RuntimeError("inside")
    assert pa_ops.select(problem, device=90).family == "flash_sm90"


@pytest.mark.parametrize("how", ["argument", "block", "environment"])
def test_a_family_is_refused_for_cpu_tensors(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, caches = torch.zeros(3, 4, 8).half(), torch.zeros(2, 4, 16, 2, 8).half()
    cu_seqlens_q, lengths, table = torch.tensor([0, 3]).int(), torch.tensor([20]).int(), torch.tensor([[1, 3]]).int()
    tensors = (q, *caches, cu_seqlens_q, lengths, table)
    with pa_ops.backend("flash_sm80" if how == "block" else "auto"):
        if how == "environment":
            monkeypatch.setenv("PA_OPS_BACKEND", "flash_sm80")
        with pytest.raises(InvalidArgument, match=r"backend: CPU tensors .* 'flash_sm80' \(set by "):
            pa_ops.paged_attention(*tensors, backend="flash_sm80" if how == "argument" else "auto")
    monkeypatch.delenv("PA_OPS_BACKEND", raising=False)
    for name in ("auto", "reference"):
        pa_ops.paged_attention(*tensors, backend=name)
        decision = trace.last()
        assert decision is not None and decision.family == "reference"


def test_B27_families_are_unique_names() -> None:
    assert pa_ops.families() == ("flash_sm80", "flash_sm90", "decode", "mea", "mea_decode")


def test_importing_pa_ops_loads_no_kernel_runtime() -> None:
    code = "import pa_ops, sys; print([m for m in ('tvm_ffi', 'jinja2', 'cutlass', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
