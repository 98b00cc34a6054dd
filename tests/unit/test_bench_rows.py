"""The end that all benchmarks have in common: cells, files and exit statuses, from rows made by hand."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from pa_ops.bench_rows import error_cell, publish


@dataclass(frozen=True)
class Plain:
    """A row without a peer."""

    case: str
    worst_error: float

    @property
    def right(self) -> bool:
        """Right up to 0.005."""
        return self.worst_error <= 5e-3


@dataclass(frozen=True)
class Beside(Plain):
    """A row with one."""

    peer: float = 3.0

    @property
    def ratio(self) -> float:
        """To a time of 2."""
        return self.peer / 2


def test_a_wrong_row_says_so() -> None:
    assert (error_cell(Plain("a", 1e-3)), error_cell(Plain("b", 1.0))) == ("1.0e-03", "1.0e+00 WRONG")


@pytest.mark.parametrize(("rows", "status"), [([Plain("a", 0.0)], 0), ([Plain("a", 0.0), Plain("b", 1.0)], 1)])
def test_one_wrong_row_fails_the_run(rows: list[Plain], status: int, tmp_path: Path) -> None:
    printed = io.StringIO()
    output = tmp_path / "new" / "rows.json"
    assert publish(Console(file=printed, width=80), Table("case of the run", title="times"), rows, output) == status
    assert "times" in printed.getvalue()
    assert [row["case"] for row in json.loads(output.read_text())] == [row.case for row in rows]


def test_a_ratio_is_written_where_there_is_a_peer_and_nothing_where_no_file_is_asked_for(tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    assert publish(quiet, Table("case"), [Beside("a", 0.0)], None) == 0 and not list(tmp_path.iterdir())
    publish(quiet, Table("case"), [Beside("a", 0.0)], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"case": "a", "worst_error": 0.0, "peer": 3.0, "ratio": 1.5}
    ]
