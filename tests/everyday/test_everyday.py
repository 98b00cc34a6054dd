"""How long everyday things take here, by pytest-benchmark: `./run everyday`. What has a limit fails above it.

A command is a process from its start to its end. The import is what a process that has torch adds to itself. A call is
the host's work alone: CPU tensors, a product's kernels, a driver that does nothing; a round is a thousand calls, so
milliseconds are microseconds a call.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from core_rows import ROOT

from helpers import stand_in

pytestmark = pytest.mark.everyday

EXPLAIN = "explain paged_attention dtype=bf16 head_dim=128 page_size=16 tokens=64 kv=8192 sm=90"
MODEL = "build --model head_dim=128,dtype=bf16 --arch sm_90a"
LIMITS = {"list": 1.0, EXPLAIN: 1.0, "report": 1.0}  # seconds
IMPORT_LIMIT, BUILD_LIMIT = 0.3, 30.0
CALLS = 1000
IMPORTER = """
import os, sys, torch
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        import pa_ops
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def helper(*command: str | Path, **environment: str) -> Iterator[Callable[[str], str]]:
    """A process that answers a line with a line."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    into, out = process.stdin, process.stdout
    assert into is not None and out is not None

    def ask(line: str) -> str:
        print(line, file=into, flush=True)
        return out.readline().strip()

    with process:
        yield ask


def run(words: str, **environment: str) -> None:
    """One `pa-ops` command."""
    command = [sys.executable, "-m", "pa_ops_command", *words.split()]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | environment)


def median(benchmark: Any) -> float:
    """Seconds; endless where nothing was timed."""
    return float("inf") if benchmark.stats is None else benchmark.stats.stats.median


def test_import_beyond_torch(benchmark: Any) -> None:
    with helper("-c", IMPORTER) as ask:
        assert benchmark.pedantic(ask, ("",), rounds=10, warmup_rounds=1) == "0"
    assert median(benchmark) <= IMPORT_LIMIT


@pytest.mark.parametrize("words", LIMITS, ids=lambda words: words.split()[0])
def test_command(words: str, benchmark: Any) -> None:
    benchmark.pedantic(run, (words,), rounds=5, warmup_rounds=1)
    assert median(benchmark) <= LIMITS[words]


def test_build_of_one_model(benchmark: Any, tmp_path: Path) -> None:
    benchmark.pedantic(run, (MODEL,), {"PA_OPS_HOME": str(tmp_path)}, rounds=1)
    assert median(benchmark) <= BUILD_LIMIT


@pytest.fixture(scope="module")
def calls(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The helper that makes calls, on a product that outlives the run."""
    assert pytestconfig.cache is not None
    home = str(pytestconfig.cache.mkdir("one-model"))
    run(MODEL, PA_OPS_HOME=home)
    driver = stand_in.compiled(tmp_path_factory.mktemp("quiet"), "-DQUIET")
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT, os.environ.get("PYTHONPATH", ""))))
    script = Path(__file__).with_name("calls_script.py")
    environment = {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": paths, "PA_OPS_NO_JIT": "1"}
    with helper(script, home, str(CALLS), **environment) as ask:
        yield ask


@pytest.mark.parametrize("case", ["decode", "prefill", "into buffers", "serving", "append"])
def test_thousand_calls(case: str, calls: Callable[[str], str], benchmark: Any) -> None:
    assert benchmark.pedantic(calls, (case,), rounds=40, warmup_rounds=2) == "done"
