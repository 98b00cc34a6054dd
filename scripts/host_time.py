"""Turns calls on small CUDA tensors into microseconds of host time, as they are and as Python alone serves them.

Usage: python scripts/host_time.py [RUNS]. Times are the best of RUNS batches of 200 calls; the device is waited for
between batches, so that no call waits for a full queue. Columns: torch.ops as it is, in inference mode, the function of
`pa_ops`, the Python implementation by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import pa_ops
from pa_ops import native
from pa_ops.schema import NAMESPACE

CALLS = 200
HALF = torch.float16


def best(call: Callable[[], Any], runs: int) -> float:
    """Microseconds a call."""
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(times)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def cases() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Name -> operator, tensors, options."""
    k_cache, v_cache = torch.zeros(2, 64, 16, 8, 128, dtype=HALF, device="cuda")
    table = torch.zeros(4, 4, dtype=torch.int32, device="cuda")
    ends, lengths = int32(0, 1, 2, 3, 4), int32(8, 8, 8, 8)
    q = torch.zeros(4, 32, 128, dtype=HALF, device="cuda")
    prompt = torch.zeros(60, 32, 128, dtype=HALF, device="cuda")
    rows = torch.zeros(4, 48 * 128, dtype=HALF, device="cuda")
    cos = torch.zeros(64, 64, device="cuda")
    rotary = {"num_heads": 32, "num_kv_heads": 8, "cos": cos, "sin": cos}
    states = (q, torch.zeros(32, 4, device="cuda"))
    paged = (q, k_cache, v_cache, ends, lengths, table)
    return {
        "decode": ("paged_attention", paged, {}),
        "decode, bounds": ("paged_attention", paged, {"max_seqlen_q": 1, "max_seqlen_k": 8}),
        "decode, into buffers": ("paged_attention.out", paged, {"out": torch.empty_like(q)}),
        "prefill": ("paged_attention", (prompt, k_cache, v_cache, int32(0, 60), int32(60), table[:1]), {}),
        "serving, decode": ("paged_attention_", (rows, None, None, k_cache, v_cache, ends, lengths, table), rotary),
        "serving, no rotary": (
            "paged_attention_",
            (rows, None, None, k_cache, v_cache, ends, lengths, table),
            {"num_heads": 32, "num_kv_heads": 8},
        ),
        "append_kv": ("append_kv", (q[:, :8], q[:, :8], k_cache, v_cache, torch.arange(4, device="cuda")), {}),
        "merge_states": ("merge_states", (*states, *states), {}),
    }


def main(runs: int) -> None:
    """Prints a line a case."""
    x = torch.zeros(4, device="cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; us a call, best of {runs} batches")
    print(f"{'torch.add':24}{best(lambda: torch.add(x, x), runs):8.2f}")
    print(f"{'torch.add, in place':24}{best(lambda: x.add_(0), runs):8.2f}")
    print(f"{'torch.empty':24}{best(lambda: torch.empty(4, 32, 128, dtype=HALF, device='cuda'), runs):8.2f}")
    print(f"{'':24}{'call':>8}{'infer':>8}{'pa_ops.':>8}{'python':>8}{'launches':>10}")
    operators: Any = getattr(torch.ops, NAMESPACE)
    for title, (op, tensors, options) in cases().items():
        name, _, overload = op.partition(".")
        public = getattr(getattr(operators, name), overload or "default")
        for _ in range(3):
            public(*tensors, **options)
        with pa_ops.trace.recording() as decisions:
            public(*tensors, **options)
        column = [best(lambda: public(*tensors, **options), runs)]  # noqa: B023
        with torch.inference_mode():
            column.append(best(lambda: public(*tensors, **options), runs))  # noqa: B023
        function = public if overload else getattr(pa_ops, name)
        column.append(best(lambda: function(*tensors, **options), runs))  # noqa: B023
        if native.attached():
            twin = getattr(getattr(operators, f"_{name}"), overload or "default")
            column.append(best(lambda: twin(*tensors, **options), runs))  # noqa: B023
        print(f"{title:24}" + "".join(f"{value:8.2f}" for value in column) + f"{len(decisions):10}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
