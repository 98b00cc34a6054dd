"""Turns the things that a user does every day into a Markdown table of how long they take here.

Usage: python scripts/everyday.py [RUNS [BUILDS]], 5 and 1 times each by default; BUILDS = 0 leaves the build out. Each
run is a process of its own and everything in it counts, but for the import: there torch is imported first, and the time
is what `import pa_ops` takes beyond that. The build is of one model's kernels for sm_90a, from nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory

IMPORT = "import time, torch; start = time.perf_counter(); import pa_ops; print(time.perf_counter() - start)"
EXPLAIN = "explain paged_attention dtype=bf16 head_dim=128 page_size=16 tokens=64 kv=8192 sm=90"
# Commands, and the most seconds that each may take.
COMMANDS = (("list", 1.0), (EXPLAIN, 1.0), ("report", 1.0))
BUILD = "build --model head_dim=128,dtype=bf16 --arch sm_90a"
IMPORT_LIMIT, BUILD_LIMIT = 0.3, 30.0


def output_of(*words: str, **environment: str) -> str:
    """What Python prints; raises CalledProcessError where it fails."""
    command = (sys.executable, *words)
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout


def import_seconds() -> float:
    """`import pa_ops` in a process that has torch."""
    return float(output_of("-c", IMPORT))


def command_seconds(words: str, **environment: str) -> float:
    """One `pa-ops` command, from the start of its process to its end."""
    start = time.perf_counter()
    output_of("-m", "pa_ops_command", *words.split(), **environment)
    return time.perf_counter() - start


def build_seconds() -> float:
    """The build, into a folder that is then removed."""
    with TemporaryDirectory() as home:
        return command_seconds(BUILD, PA_OPS_HOME=home)


def row(title: str, limit: float, runs: int, measure: Callable[[], float]) -> str:
    """A line of the table: median, fastest and slowest."""
    times = [measure() for _ in range(runs)]
    return f"| {title} | {median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {limit:g} |"


def main(runs: int = 5, builds: int = 1) -> None:
    """Prints the table."""
    cores = len(os.sched_getaffinity(0))
    print(f"Seconds on {cores} cores, Python {sys.version.split()[0]}; {runs} runs, {builds} of the build.\n")
    print("| what | median | fastest | slowest | at most |", "| --- | --- | --- | --- | --- |", sep="\n")
    print(row("`import pa_ops`, beyond torch", IMPORT_LIMIT, runs, import_seconds))
    for words, limit in COMMANDS:
        print(row(f"`pa-ops {words}`", limit, runs, lambda: command_seconds(words)), flush=True)  # noqa: B023
    if builds:
        print(row(f"`pa-ops {BUILD}`", BUILD_LIMIT, builds, build_seconds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
