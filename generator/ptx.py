"""Turns PTX text into the facts of its kernel: symbol, code target, argument bytes, static shared memory.

Registers and stack frame are 0: the driver's compiler decides them when the text is loaded. Compile workers import this
module, which fills the KernelFacts of cubin.py, so it needs the standard library alone.
"""

from __future__ import annotations

import re
from typing import Any

_TARGET = re.compile(rb"^\.target\s+sm_(\d+)", re.MULTILINE)
_ENTRY = re.compile(rb"\.entry\s+(\w+)\s*\(\s*\.param\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]\s*\)")
_SHARED = re.compile(rb"^\s*\.shared\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", re.MULTILINE)


def is_target(target: str) -> bool:
    """Whether the code of `target` is PTX."""
    return target.startswith("compute_")


def read_facts(text: bytes) -> tuple[dict[str, Any], ...]:
    """The fields of KernelFacts of each kernel of `text`; raises ValueError where it holds none."""
    target, entries = _TARGET.search(text), _ENTRY.findall(text)
    if target is None or not entries:
        raise ValueError("no kernel with one record for its argument found in the PTX")
    return tuple(
        {
            "entry": entry.decode(),
            "target": f"compute_{target[1].decode()}",
            "registers": 0,
            "frame_bytes": 0,
            "static_smem_bytes": sum(map(int, _SHARED.findall(text))),
            "argument_bytes": int(size),
            "image_bytes": len(text),
        }
        for entry, size in entries
    )
