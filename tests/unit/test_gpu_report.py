"""The report of GPU runs: several junit and evidence files become one page and one file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from core_rows import ROOT

from pa_ops import evidence
from pa_ops.evidence import Evidence

CASE = '<testcase classname="tests.gpu.{file}" name="{name}" time="1.5">{inside}</testcase>'
BAD = '<failure message="no&#10;more">trace</failure>'


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "scripts" / "gpu_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "this_machine", lambda: module.Machine("H200", "580", "2.11", "3.12"))
    return module


def run(script: ModuleType, tmp_path: Path, *cases: str) -> int:
    """The script on one junit and one evidence file a case."""
    names = ("together", "alone")[: max(len(cases), 1)]
    for name, case in zip(names, cases or ("",), strict=True):
        (tmp_path / f"{name}.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
        rows = {("pa_x", "sm_90a"): Evidence("a" * 64, 1, 0.5, by=(name,), worst_test=name)}
        evidence.write(tmp_path / f"{name}.json", rows)
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
