"""Turns two coverage reports, an older one as JSON and today's, into what got worse, which a CI run can fail on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_ops.coverage import Cell, Coverage, Fit, State
from pa_ops.errors import InvalidArgument
from pa_ops.spec import Word
from pa_ops.survey import Reach

ORDER = {
    "state": (*map(str, (State.REFUSED, State.DECLARED, State.GENERATED, State.STALE, State.COMPILED, State.TESTED)),
              str(State.BENCHMARKED)),
    "reach": tuple(map(str, (Reach.NONE, Reach.SHADOWED, Reach.NAMED, Reach.AUTO))),
    "fit": tuple(map(str, (Fit.NONE, Fit.STALE, Fit.SOURCES, Fit.HERE))),
}  # fmt: skip
"""What of a cell may not get worse, each from the worst on."""


class Kind(Word):
    """What is wrong."""

    LOST = "coverage lost"
    UNTESTED = "claim without a test"
    NO_TESTS = "zero tests executed"


@dataclass(frozen=True)
class Finding:
    """One thing that is worse, and of which kernel."""

    kind: Kind
    name: str = ""
    target: str = ""
    what: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (f"{self.kind}", f"{self.name} {self.target}".strip(), self.what) if part)


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The cells of a report's JSON by name and target; raises InvalidArgument where the file is none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return {(cell["name"], cell["target"]): cell for cell in cells}
    except OSError as error:
        raise InvalidArgument("diff", "must be a file that pa-ops report --json wrote", str(error)) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidArgument(str(path), "must be what pa-ops report --json writes", repr(error)) from None


def found(old: dict[tuple[str, str], dict[str, Any]], coverage: Coverage) -> tuple[Finding, ...]:
    """What of `coverage` is worse than in `old`: cells that fell, new ones that nothing tested, no test at all."""
    cells = {(cell.name, cell.target): cell for cell in coverage.cells}
    tested = {cell.name for cell in coverage.cells if cell.tests}
    gone = [Finding(Kind.LOST, *key, f"was {old[key]['state']}, is gone") for key in sorted(old.keys() - cells.keys())
            if old[key]["state"] != State.REFUSED]  # fmt: skip
    fallen = [finding for key in sorted(old.keys() & cells.keys()) for finding in _fallen(old[key], cells[key])]
    refused = {key for key, cell in old.items() if cell["state"] == State.REFUSED}
    new = [cells[key] for key in sorted(cells) if key not in old or key in refused]
    untested = [
        Finding(Kind.UNTESTED, cell.name, cell.target, "selection picks it, and no test has run it")
        for cell in new
        if cell.state is not State.REFUSED and cell.reach is Reach.AUTO and cell.name not in tested
    ]
    nothing = () if tested else (Finding(Kind.NO_TESTS, what="no kernel has evidence of a test"),)
    return (*gone, *fallen, *untested, *nothing)


def _fallen(old: dict[str, Any], cell: Cell) -> Iterator[Finding]:
    for field, order in ORDER.items():
        before, now = old.get(field), str(getattr(cell, field))
        if before in order and order.index(now) < order.index(before):
            what = f"{field} was {before}, is {now}" + (f" ({cell.reason})" if field == "state" and cell.reason else "")
            yield Finding(Kind.LOST, cell.name, cell.target, what)


def text(findings: Sequence[Finding], old: Path) -> str:
    """One line a finding, and how many there are."""
    head = f"{len(findings)} things are worse than in {old}" if findings else f"nothing is worse than in {old}"
    return "\n".join([head, *(f"  {finding}" for finding in findings)]) + "\n"
