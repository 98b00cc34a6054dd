"""Turns rows of a benchmark into a table on the console, a JSON file and an exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table


class Row(Protocol):
    """What every case's row tells beside its times: the largest error, and whether that is small enough."""

    @property
    def worst_error(self) -> float: ...

    @property
    def right(self) -> bool: ...


def error_cell(row: Row) -> str:
    """The error of a row, and a word where it is too large."""
    return f"{row.worst_error:.1e}" + ("" if row.right else " WRONG")


def fields_of(row: Any) -> dict[str, Any]:
    """The fields of a row, and its ratio to a peer if it has one."""
    ratio = {"ratio": row.ratio} if hasattr(row, "ratio") else {}
    return {**asdict(row), **ratio}


def publish(console: Console, table: Table, rows: Sequence[Row], output: Path | None) -> int:
    """Print the table, write the rows to `output` if that is given; 1 where a result is wrong, else 0."""
    console.print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps([fields_of(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.right for row in rows) else 1
