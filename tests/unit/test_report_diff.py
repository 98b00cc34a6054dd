"""What got worse between two coverage reports, and the exit status that CI gates on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pa_ops import cli, report, report_diff
from pa_ops.coverage import Cell, Coverage, Fit, State
from pa_ops.errors import InvalidArgument
from pa_ops.report_diff import Kind
from pa_ops.survey import Reach

NAMES = tuple(f"pa_attn_flash_sm80_bf16_kvbf16_d{dim}v{dim}_gather_causal_m128n64s1w4" for dim in (64, 128, 256))
FIRST, SECOND, NEW = (Cell(name, "sm_80", State.TESTED, reach=Reach.AUTO, tests=3, fit=Fit.HERE) for name in NAMES)
OLD = Coverage((FIRST, SECOND), ())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.json"
    path.write_text(report.to_json(OLD))
    return path


def findings(old: Path, *cells: Cell) -> list[tuple[Kind, str]]:
    return [(found.kind, found.name) for found in report_diff.found(report_diff.read(old), Coverage(cells, ()))]


def test_G4_a_report_is_no_worse_than_itself(old: Path) -> None:
    assert findings(old, FIRST, SECOND) == []
    assert findings(old, FIRST, SECOND, NEW) == []
    assert findings(old, FIRST, replace(SECOND, state=State.BENCHMARKED)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"state": State.COMPILED},
        {"state": State.STALE},
        {"reach": Reach.NAMED},
        {"fit": Fit.STALE},
        {"fit": Fit.SOURCES},
    ],
)
def test_G4_a_cell_that_fell_is_coverage_lost(change: dict[str, object], old: Path) -> None:
    assert findings(old, FIRST, replace(SECOND, **change)) == [(Kind.LOST, SECOND.name)]  # type: ignore[arg-type]


def test_G4_a_cell_that_is_gone_is_coverage_lost(old: Path) -> None:
    assert findings(old, FIRST) == [(Kind.LOST, SECOND.name)]
    refused = replace(SECOND, state=State.REFUSED, reason="too large", reach=Reach.NONE, tests=0, fit=Fit.NONE)
    assert set(findings(old, FIRST, refused)) == {(Kind.LOST, SECOND.name)}
    old.write_text(report.to_json(Coverage((FIRST, refused), ())))
    assert findings(old, FIRST) == []


def test_G4_a_new_kernel_that_nothing_tested_is_a_claim(old: Path) -> None:
    untested = replace(NEW, state=State.COMPILED, tests=0, fit=Fit.NONE)
    assert findings(old, FIRST, SECOND, untested) == [(Kind.UNTESTED, NEW.name)]
    assert findings(old, FIRST, SECOND, replace(untested, reach=Reach.NAMED)) == []
    assert findings(old, FIRST, SECOND, untested, replace(NEW, target="sm_90a")) == [], (
        "tested as another target's code"
    )


def test_G4_a_report_of_no_tests_is_no_report(old: Path) -> None:
    cells = [replace(cell, tests=0) for cell in (FIRST, SECOND)]
    assert findings(old, *cells) == [(Kind.NO_TESTS, "")]


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="diff: must be a file"):
        report_diff.read(tmp_path / "none.json")
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(InvalidArgument, match=r"other\.json: must be what pa-ops report --json writes"):
        report_diff.read(path)


@pytest.mark.parametrize(("now", "status"), [(OLD, 0), (Coverage((FIRST,), ()), 1)])
def test_G4_the_command_s_exit_status_says_so(
    now: Coverage, status: int, old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "coverage_of", lambda docs: now)
    assert cli.main(["report", "--diff", str(old)]) == status
    said = capsys.readouterr().out
    assert (f"coverage lost: {SECOND.name} sm_80: was tested, is gone" in said) == bool(status)
