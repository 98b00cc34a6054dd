"""Turns the table of times that `pa-ops bench --record` took on a card into what selection ranks by on that card.

A time is of one instance's code for one target on one shape of its class, at its own head size: what it costs to serve
a smaller one too, which it pads. Another card, and a choice with code that has no time, go by the model of
`pa_ops.heuristics`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pa_ops.errors import InvalidArgument
from pa_ops.spec import Word

SCHEMA = 2
FILE = Path(__file__).with_name("timings.json")


class ShapeClass(Word):
    """What of a problem's sizes decides which kernel is the fastest."""

    FEW = "few"  # query rows that one tile of a splitting family holds
    MANY = "many"


@dataclass(frozen=True)
class Timing:
    """How long one call took: median of `calls`, in microseconds, of the code for `target` of `digest`, on `shape`."""

    instance: str
    target: str
    shape_class: ShapeClass
    microseconds: float
    digest: str
    shape: str
    calls: int

    @property
    def key(self) -> Key:
        """What it is looked up by."""
        return self.instance, self.target, self.shape_class


Key = tuple[str, str, ShapeClass]
Table = Mapping[Key, Timing]
NONE: Table = {}


def dumps(cards: Mapping[str, Table]) -> str:
    """The text of the file: rows by card, instance and class."""
    rows = [
        {"card": card, **asdict(timing), "shape_class": str(timing.shape_class)}
        for card, table in sorted(cards.items())
        for _, timing in sorted(table.items())
    ]
    lines = ",\n".join(f"  {json.dumps(row, sort_keys=True)}" for row in rows)
    return f'{{"schema": {SCHEMA}, "rows": [\n{lines}\n]}}\n'


def load(path: Path) -> dict[str, Table]:
    """The tables of a file by card; empty where there is none. Raises InvalidArgument naming the file and the row."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidArgument(str(path), "must be JSON", str(error)) from None
    rows = document.get("rows") if isinstance(document, dict) and document.get("schema") == SCHEMA else None
    if not isinstance(rows, list):
        raise InvalidArgument(str(path), f"must be an object of schema {SCHEMA} with rows", type(document).__name__)
    cards: dict[str, dict[Key, Timing]] = {}
    for number, row in enumerate(rows):
        card, timing = _row(f"{path} rows[{number}]", row)
        cards.setdefault(card, {})[timing.key] = timing
    return dict(cards)


def _row(where: str, row: Any) -> tuple[str, Timing]:
    try:
        card, rest = row["card"], {name: row[name] for name in Timing.__dataclass_fields__}
        timing = Timing(**{**rest, "shape_class": ShapeClass(rest["shape_class"])})
        valid = timing.microseconds > 0 and timing.calls > 0
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise InvalidArgument(where, f"must have a card and {', '.join(Timing.__dataclass_fields__)}", repr(row))
    return card, timing


@lru_cache(maxsize=8)
def of_card(card: str, path: Path = FILE) -> Table:
    """The times taken on a card of this name; none of a device that is known by its SM number alone."""
    return load(path).get(card, NONE) if card else NONE
