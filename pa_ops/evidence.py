"""Turns what was seen of kernels on a card into a JSON file, and such files into rows by kernel and target."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pa_ops.errors import InvalidArgument

SCHEMA = 2  # schema 1 was an object by instance name and told no target
Key = tuple[str, str]  # instance name, target; "" where a file of schema 1 does not tell it


@dataclass(frozen=True)
class Evidence:
    """What a run on a card showed of one kernel.

    digest: of the code that ran; tests: comparisons that held; worst_error: largest absolute error, seen by the test
    worst_test; by: the test functions that compared; tools: versions of what compiled it, by name.
    """

    digest: str
    tests: int = 0
    worst_error: float | None = None
    commit: str = ""
    card: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)
    by: tuple[str, ...] = ()
    worst_test: str = ""

    def joined(self, other: Evidence) -> Evidence:
        """Both together, whichever came first; raises InvalidArgument where they are of different code."""
        if self.digest != other.digest:
            raise InvalidArgument("evidence", f"must be of one build, {self.digest[:12]}", other.digest[:12])
        shown = [each for each in (self, other) if each.worst_error is not None]
        worst = min(shown, key=lambda each: (-(each.worst_error or 0.0), each.worst_test), default=self)
        by = tuple(sorted({*self.by, *other.by}))
        return replace(worst, tests=self.tests + other.tests, by=by)


@dataclass(frozen=True)
class Machine:
    """Where a run was made: the card, its driver's version, and those of the software."""

    card: str
    driver: str
    torch: str
    python: str


@dataclass(frozen=True)
class Timed:
    """One shape that a kernel was timed on: microseconds a call, what that means, and peers' times of the same run."""

    digest: str
    case: str
    shape: str
    microseconds: float
    tflops: float = 0.0
    gigabytes_per_second: float = 0.0
    card: str = ""
    commit: str = ""
    peers: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours; None where there was no peer."""
        return min(self.peers.values()) / self.microseconds if self.peers else None


def joined(parts: Iterable[Mapping[Key, Evidence]]) -> dict[Key, Evidence]:
    """The evidence of several processes or runs on one build as that of one; their order has no meaning."""
    rows: dict[Key, Evidence] = {}
    for part in parts:
        for key, row in part.items():
            rows[key] = rows[key].joined(row) if key in rows else row
    return rows


def document(rows: Mapping[Key, Evidence], machine: Machine | None = None) -> dict[str, Any]:
    """The rows as a JSON file holds them, by name, then target, and where they were seen if that is told."""
    listed = [{"name": name, "target": target, **asdict(row)} for (name, target), row in sorted(rows.items())]
    told = {} if machine is None else {"machine": asdict(machine)}
    plain = [{**row, "by": list(row["by"]), "tools": dict(row["tools"])} for row in listed]
    return {"schema": SCHEMA, **told, "rows": plain}


def write(path: Path, rows: Mapping[Key, Evidence], machine: Machine | None = None) -> None:
    """Writes the file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(rows, machine), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def machine_of(path: Path) -> Machine:
    """Where the rows of a file were seen; raises InvalidArgument naming the file if that is not told."""
    try:
        return Machine(**json.loads(path.read_text(encoding="utf-8"))["machine"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidArgument(f"{path} machine", "must tell where the tests ran", repr(error)) from None


def write_timed(path: Path, rows: Iterable[tuple[Key, Timed]]) -> None:
    """Writes the file of times; its folder is made."""
    listed = [{"name": name, "target": target, **asdict(row)} for (name, target), row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "rows": listed}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_timed(path: Path) -> dict[Key, tuple[Timed, ...]]:
    """The times of a file that `write_timed` wrote; empty where there is none. Raises InvalidArgument naming it."""
    if not path.exists():
        return {}
    found: dict[Key, tuple[Timed, ...]] = {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            timed = Timed(**{name: row[name] for name in Timed.__dataclass_fields__})
            key = row["name"], row["target"]
            found[key] = (*found.get(key, ()), timed)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidArgument(str(path), "must be what pa-ops bench --json writes", repr(error)) from None
    return found


def load(path: str | Path) -> dict[Key, Evidence]:
    """The rows of a file, of schema 1 too; empty where there is no file.

    Raises InvalidArgument naming the file and the row whose digest, number of tests or tools are none.
    """
    file = Path(path)
    if not file.exists():
        return {}
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")), str(file))
    except json.JSONDecodeError as error:
        raise InvalidArgument(str(file), "must be JSON", str(error)) from None


def parse(found: Any, where: str) -> dict[Key, Evidence]:
    """The rows of a document, of schema 1 too; raises InvalidArgument as `load` does, naming `where`."""
    if not isinstance(found, dict):
        raise InvalidArgument(where, "must be a JSON object", type(found).__name__)
    if "schema" not in found:
        return {(name, ""): _row(f"{where} {name}", row) for name, row in found.items()}
    if found["schema"] != SCHEMA or not isinstance(found.get("rows"), list):
        raise InvalidArgument(f"{where} schema", f"must be {SCHEMA}, with a list of rows", repr(found["schema"]))
    rows = {}
    for number, row in enumerate(found["rows"]):
        if not isinstance(row, dict) or not all(isinstance(row.get(word), str) for word in ("name", "target")):
            raise InvalidArgument(f"{where} rows[{number}]", "must be an object with a name and a target", repr(row))
        rows[row["name"], row["target"]] = _row(f"{where} {row['name']} {row['target']}", row)
    return rows


def _row(where: str, row: Any) -> Evidence:
    if not isinstance(row, dict) or not isinstance(row.get("digest"), str):
        raise InvalidArgument(where, "must be an object with a digest", repr(row))
    tests = row.get("tests", 0)
    if isinstance(tests, bool) or not isinstance(tests, int) or tests < 0:
        raise InvalidArgument(f"{where} tests", "must be an integer >= 0", repr(tests))
    tools = row.get("tools", {})
    if not isinstance(tools, dict) or not all(isinstance(version, str) for version in tools.values()):
        raise InvalidArgument(f"{where} tools", "must be versions by name", repr(tools))
    known = {key: value for key, value in row.items() if key in Evidence.__dataclass_fields__}
    return Evidence(**{**known, "by": tuple(row.get("by", ()))})
