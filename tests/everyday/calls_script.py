"""A helper of test_everyday.py: steady calls on CPU tensors, with a product's kernels and a driver that does nothing.

Usage: calls_script.py HOME CALLS. For every case that it reads, a line each, it makes that many calls and says "done".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from helpers import stand_in

BF16 = torch.bfloat16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cases() -> dict[str, Callable[[], Any]]:
    """Name -> a call."""
    operators: Any = getattr(torch.ops, stand_in.NAMESPACE)
    k_cache, v_cache = torch.zeros(2, 64, 16, 8, 128, dtype=BF16)
    table = torch.zeros(4, 4, dtype=torch.int32)
    ends, lengths = int32(0, 1, 2, 3, 4), int32(8, 8, 8, 8)
    q, prompt = torch.zeros(4, 32, 128, dtype=BF16), torch.zeros(60, 32, 128, dtype=BF16)
    rows, cos = torch.zeros(4, 48 * 128, dtype=BF16), torch.zeros(64, 64)
    decode = q, k_cache, v_cache, ends, lengths, table
    prefill = prompt, k_cache, v_cache, int32(0, 60), int32(60), table[:1]
    serving = rows, None, None, k_cache, v_cache, ends, lengths, table
    rotary = {"num_heads": 32, "num_kv_heads": 8, "cos": cos, "sin": cos}
    keys, slots = q[:, :8], torch.arange(4)
    return {
        "decode": lambda: operators.paged_attention(*decode),
        "prefill": lambda: operators.paged_attention(*prefill),
        "into buffers": lambda: operators.paged_attention.out(*decode, out=q),
        "serving": lambda: operators.paged_attention_(*serving, **rotary),
        "append": lambda: operators.append_kv(keys, keys, k_cache, v_cache, slots),
    }


def main(home: str, calls: int) -> None:
    """Serves until there is nothing more to read."""
    stand_in.serve(home)
    known = cases()
    for call in known.values():
        call()  # by Python, which keeps its program
    for line in sys.stdin:
        call = known[line.strip()]
        for _ in range(calls):
            call()
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
