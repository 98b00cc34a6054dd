"""Turns a piece of GPU work into the runtime calls that it made and the kernels that it launched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def traced(path: Path, work: Callable[[], object]) -> list[dict[str, Any]]:
    """Runtime calls and kernels of `work`, warmed up, between two marks; device work is waited for after the second."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("pa_ops_region"):
            work()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    region = next(e for e in events if e["name"] == "pa_ops_region" and e.get("cat") == "user_annotation")
    begin, end = region["ts"], region["ts"] + region["dur"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    return kernels + [e for e in events if e.get("cat") == "cuda_runtime" and begin <= e["ts"] <= end]
