"""The script `run` where its work is another program's: sanitizer samples, by a stand-in for compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = """#!/bin/sh
case "$*" in *older*) echo a hazard; exit 99 ;; esac
echo "0 errors of $2"
"""


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`./run` by this Python, with the stand-in before all else on PATH."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER, encoding="utf-8")
    tool.chmod(0o755)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "VENV": "none", "WORKERS": "3"}
    return subprocess.run([ROOT / "run", *words], env=environment, capture_output=True, text=True)


def test_every_sanitizer_sample_runs_and_one_that_fails_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "race", "-q")
    lines = done.stdout.splitlines()
    assert done.returncode == 99 and len(lines) >= 10
    assert [line.rsplit("::", 1)[1] for line in lines if "exit 0: 0 errors of racecheck" not in line] == [
        "test_sanitizer_sample_of_older_code, exit 99: a hazard"
    ]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("-k", "gather or parts"), 0, "test_sanitizer_sample_of_parts, exit 0: 0 errors of memcheck"),
        (("tests/unit/test_run_no_such_file.py",), 1, "no tests collected"),
    ],
)
def test_words_choose_among_the_samples(tmp_path: Path, words: tuple[str, ...], code: int, told: str) -> None:
    done = run(tmp_path, "memory", *words)
    assert done.returncode == code and told in done.stdout + done.stderr
    assert done.stdout.count("\n") == (2 if code == 0 else 0)
