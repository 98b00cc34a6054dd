"""Turns calls on small CUDA tensors into microseconds of host time, as they are and as Python alone serves them.

Usage: python scripts/host_time.py [ROUNDS]. Times are the best and the median of ROUNDS batches of 200 calls. A round
has a batch of each, because a shared host is slower for seconds at a time. The device is waited for between batches, so
no call waits for a full queue. Columns: torch.ops as it is, in inference mode, the function of `pa_ops`, the Python
implementation by itself.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import pa_ops
from pa_ops import native
from pa_ops.schema import NAMESPACE

CALLS = 200
INFER = "infer"
COLUMNS = ("call", INFER, "pa_ops.", "python")
HALF = torch.float16


def batch(call: Callable[[], Any]) -> float:
    """Microseconds a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


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


def columns_of(op: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Column -> the call that it times."""
    name, _, overload = op.partition(".")

    def bound(function: Callable[..., Any]) -> Callable[[], Any]:
        return partial(function, *tensors, **options)

    operators: Any = getattr(torch.ops, NAMESPACE)
    public = getattr(getattr(operators, name), overload or "default")
    columns = {"call": bound(public), INFER: bound(public)}
    public(*tensors, **options)  # the first call gives operators their kernels without Python
    if not overload:
        columns["pa_ops."] = bound(getattr(pa_ops, name))
    if native.attached():
        columns["python"] = bound(getattr(getattr(operators, f"_{name}"), overload or "default"))
    return columns


def launches_of(call: Callable[[], Any]) -> int:
    for _ in range(3):  # the first may build and load
        call()
    with pa_ops.trace.recording() as decisions:
        call()
    return len(decisions)


def main(rounds: int) -> None:
    """Prints a line a case."""
    x = torch.zeros(4, device="cuda")
    lines: dict[str, dict[str, Callable[[], Any]]] = {
        "torch.add": {"call": lambda: torch.add(x, x)},
        "torch.add, in place": {"call": lambda: x.add_(0)},
        "torch.empty": {"call": lambda: torch.empty(4, 32, 128, dtype=HALF, device="cuda")},
    }
    launches = {}
    for title, case in cases().items():
        lines[title] = columns_of(*case)
        launches[title] = launches_of(lines[title]["call"])
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for title, columns in lines.items():
            for column, call in columns.items():
                with torch.inference_mode(column == INFER):
                    times[title, column].append(batch(call))
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; us a call, best / median of {rounds} batches")
    print(f"{'':24}" + "".join(f"{column:>15}" for column in COLUMNS) + f"{'launches':>10}")
    for title in lines:
        shown = (f"{min(t):.2f} / {median(t):.2f}" if (t := times[title, c]) else "" for c in COLUMNS)
        print(f"{title:24}" + "".join(f"{cell:>15}" for cell in shown) + f"{launches.get(title, ''):>10}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
