"""Everyday commands: what they load, and what a build for one model makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pa_ops import cli, jit
from pa_ops.errors import InvalidArgument, NoInstance

EXPLAIN = "explain paged_attention dtype=bf16 head_dim=128 page_size=16 tokens=64 kv=8192 sm=90"
SCRIPT = """
import sys
import pa_ops_command
sys.argv[1:] = {words!r}
status = pa_ops_command.main()
heavy = sorted({{"torch", "numpy", "tvm_ffi", "cutlass"}} & sys.modules.keys())
assert status == 0 and not heavy, (status, heavy)
"""


@pytest.mark.parametrize("words", ["list", EXPLAIN, "report --json out.json", "build --dry-run --preset smoke"])
def test_G8_everyday_commands_do_without_torch(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path))
    script = SCRIPT.format(words=words.split())
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_unknown_command_is_argparse_s_affair(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "pa_ops_command", "fly"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "invalid choice: 'fly'" in run.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m pa_ops list | head -1"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert run.stdout.count("\n") == 1 and run.stderr == ""


FAMILIES = {  # of a bf16, or before SM 8.0 fp16, model
    "sm_90a": ["decode", "flash_sm90", "flash_sm90", "append"],  # of which one is for long sequences
    "sm_80": ["decode", "flash_sm80", "append"],
    "sm_75": ["mea_decode", "mea", "append"],
}


@pytest.mark.parametrize("target", FAMILIES)
def test_G1_a_model_needs_a_kernel_for_each_kind_of_call(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path))
    words = f"head_dim=128,page_size=16,dtype={'fp16' if target == 'sm_75' else 'bf16'}"
    assert cli.main(["build", "--arch", target, "--model", words, "--dry-run", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    names = jit.model_needs(words.split(","), target)
    assert plan["target"] == target and sorted(plan["compile"]) == sorted(names)
    assert all(f"_{family}_" in name for family, name in zip(FAMILIES[target], names, strict=True))


def test_a_model_that_no_target_serves_says_why() -> None:
    with pytest.raises(NoInstance, match="needs sm >= 80 for bf16"):
        jit.model_needs(["head_dim=128", "dtype=bf16"], "sm_75")
    with pytest.raises(InvalidArgument, match="head_dim"):
        jit.model_needs(["dtype=bf16"], "sm_90a")
