"""Manifests: the text round-trips, is stable, and a broken one is refused with the key that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_rows import declared_rows

from pa_ops.errors import InvalidArgument
from pa_ops.manifest import Entry, Manifest


def manifest() -> Manifest:
    rows = [row for row in declared_rows() if row.target == "sm_90a"][:3]
    built = tuple(replace(row, digest=f"{i:064x}", registers=128, compile_seconds=1.5) for i, row in enumerate(rows))
    return Manifest("sm_90a", {"dsl": "4.8.1"}, "libpa_ops.so", "ab" * 32, built, "cd" * 32)


def test_text_round_trips_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(manifest().dumps(), encoding="utf-8")
    assert Manifest.load(path) == manifest()


def test_G3_text_does_not_depend_on_the_order_of_rows() -> None:
    backwards = replace(manifest(), entries=manifest().entries[::-1])
    assert backwards.dumps() == manifest().dumps()


def test_a_declared_row_is_not_built() -> None:
    row = declared_rows()[0]
    assert not row.built
    assert manifest().entries[0].built
    assert row.smem_bytes == row.spec.smem_bytes


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.pop(key)


def _put(value: object, *path: str | int) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop("library"), "missing library"),
        (_put(1, "extra"), "unknown extra"),
        (_put(1, "schema"), "reads schema 2"),
        (_put(None, "toolchain", "dsl"), "toolchain.dsl"),
        (_put("../other.so", "library"), "beside the manifest"),
        (_put("90a", "target"), "must be sm_"),
        (_put("12", "entries", 1, "registers"), r"entries[1] registers"),
        (_put(True, "entries", 0, "spill_bytes"), r"entries[0] spill_bytes"),
        (_put([1], "entries", 0, "code_targets"), r"entries[0] code_targets"),
        (_put("pa_unknown", "entries", 0, "name"), "instance name"),
        (_put(7, "entries", 0), r"entries[0]"),
    ],
)
def test_a_broken_manifest_says_which_key(change: Callable[[dict[str, Any]], object], text: str) -> None:
    document = json.loads(manifest().dumps())
    change(document)
    with pytest.raises(InvalidArgument) as caught:
        Manifest.loads(json.dumps(document))
    assert text in str(caught.value)


def test_text_that_is_not_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"manifest\.json: must be JSON"):
        Manifest.load(path)


def test_one_row_a_name() -> None:
    row: Entry = manifest().entries[0]
    with pytest.raises(InvalidArgument, match="unique"):
        replace(manifest(), entries=(row, row))
