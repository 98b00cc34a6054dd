"""README's generated tables are those of today's kernels and of the recorded benchmark."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from core_rows import ROOT

from helpers import scripts
from pa_ops.evidence import Timed, write_timed


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return scripts.script("readme_tables")


def test_the_tables_are_current(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.renewed(text) == text, "run scripts/readme_tables.py"


def test_a_recorded_case_is_a_row(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BENCH", tmp_path / "bench.json")
    assert tables.table(tables.performance()).startswith("None is recorded yet")
    timed = Timed("a" * 64, "decode", "32 x 1 of 8192", 200.4, 10.6, 4010.0, "H200", peers={"SDPA": 400.8, "x": 500.0})
    write_timed(tables.BENCH, [(("pa_x", "sm_90a"), timed)])
    lines = tables.table(tables.performance()).splitlines()
    assert lines[2:] == ["| decode | 32 x 1 of 8192 | 200 | 11 | 4010 | 2.00 (SDPA) | H200 |"]


def test_a_readme_without_its_marks_is_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="<!-- support -->"):
        tables.renewed("# no marks\n")
