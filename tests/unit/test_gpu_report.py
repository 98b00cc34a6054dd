"""The report of GPU runs: several junit and evidence files become one page and one file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import scripts
from helpers.machine import this_machine
from pa_ops import InvalidArgument, evidence
from pa_ops.evidence import Evidence, Machine

CASE = '<testcase classname="tests.gpu.{file}" name="{name}" time="1.5">{inside}</testcase>'
BAD = '<failure message="no&#10;more">trace</failure>'


@pytest.fixture
def script() -> ModuleType:
    return scripts.script("gpu_report")


def run(script: ModuleType, tmp_path: Path, *cases: str, drivers: Sequence[str] = ("580.1", "580.1")) -> int:
    """The script on one junit and one evidence file a case, each of a machine with the driver."""
    names = ("together", "alone")[: max(len(cases), 1)]
    for name, case, driver in zip(names, cases or ("",), drivers, strict=False):
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
        rows = {("pa_x", "sm_90a"): Evidence("a" * 64, 1, 0.5, by=(name,), worst_test=name)}
        evidence.write(tmp_path / f"{name}.json", rows, Machine("H200", driver, "2.11", "3.12"))
    files = [[str(tmp_path / f"{name}.{end}") for name in names] for end in ("xml", "json")]
    more = ["--docs", str(tmp_path / "docs"), "--commit", "c"]
    sys.argv = ["gpu_report", "--junit", *files[0], "--evidence", *files[1], *more]
    status: int = script.main()
    return status


def test_G4_two_runs_are_one_report(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    first = CASE.format(file="test_a", name="one", inside="")
    second = CASE.format(file="test_a", name="two", inside=BAD)
    assert run(script, tmp_path, first, second) == 0
    page = (tmp_path / "docs" / "gpu-report.md").read_text()
    assert "| card | H200 |" in page and "| driver | 580.1 |" in page
    assert "| `tests/gpu/test_a.py` | 1 | 1 | 0 | 3.0 |" in page
    assert "| tests/gpu/test_a.py::two | no |" in page
    assert "| `pa_x` | sm_90a | 2 | 5.00e-01 | 2 | `aaaaaaaaaaaa` |" in page
    (row,) = evidence.load(tmp_path / "docs" / "gpu-evidence.json").values()
    assert (row.commit, row.card, row.tests, row.by) == ("c", "H200", 2, ("alone", "together"))


def test_G4_no_test_is_no_report(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit, match="no test ran"):
        run(script, tmp_path)
    assert not (tmp_path / "docs").exists()


def test_G4_the_page_tells_which_compilers_made_what_ran(script: ModuleType) -> None:
    older, newer = {"cuda": "cu12", "nvrtc": "12.9"}, {"cuda": "cu13", "nvrtc": "13.0"}
    targets = (("sm_80", older), ("sm_90a", newer), ("sm_75", older))
    rows = {("pa_x", target): Evidence("a" * 64, 1, 0.5, tools=tools) for target, tools in targets}
    page = script.markdown(script.Tests(), rows, Machine("H200", "580.1", "2.11", "3.12"), "abc")
    assert "| compilers of sm_75, sm_80 | cuda cu12, nvrtc 12.9 |" in page
    assert "| compilers of sm_90a | cuda cu13, nvrtc 13.0 |" in page


def test_G4_runs_of_two_machines_are_no_report(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    cases = [CASE.format(file="test_a", name=name, inside="") for name in ("one", "two")]
    with pytest.raises(SystemExit, match=r"one machine, not .*'5[89]0\.[12]'.*'5[89]0\.[12]'"):
        run(script, tmp_path, *cases, drivers=("580.1", "590.2"))
    evidence.write(tmp_path / "together.json", {})
    with pytest.raises(InvalidArgument, match=r"together\.json machine: must tell where the tests ran"):
        script.machine_of([tmp_path / "together.json"])


@pytest.mark.parametrize(
    ("body", "driver"), [("echo 590.44.01; echo 590.44.01", "590.44.01"), ("exit 9", "of CUDA 13000")]
)
def test_G4_the_driver_is_noted_where_tests_run(
    body: str, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    noted = this_machine()
    assert (noted.card, noted.driver, noted.torch) == ("NVIDIA H200", driver, torch.__version__)
