"""Evidence files: what several processes saw is what one would have seen, and files of schema 1 stay readable."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
from core_rows import ROOT

from pa_ops import evidence
from pa_ops.errors import InvalidArgument
from pa_ops.evidence import Evidence

pytest_plugins = "pytester"
DIGEST = "a" * 64
PARTS = [
    {("pa_x", "sm_90a"): Evidence(DIGEST, 2, 0.25, tools={"nvrtc": "12.9"}, by=("t::b",), worst_test="t::b[1]")},
    {("pa_x", "sm_90a"): Evidence(DIGEST, 1, 0.5, tools={"nvrtc": "12.9"}, by=("t::a",), worst_test="t::a[2]")},
    {
        ("pa_x", "sm_90a"): Evidence(DIGEST, 1, 0.5, tools={"nvrtc": "12.9"}, by=("t::a",), worst_test="t::a[1]"),
        ("pa_x", "compute_75"): Evidence("b" * 64, 1, 0.0),
    },
]
SAMPLE = """
import pytest
from helpers.parity import Row

@pytest.mark.parametrize("number", range(40))
def test_sees(number, evidence):
    key = f"pa_{number % 3}", "sm_90a"
    seen = Row("a" * 64, 1, number % 7 / 8, by=(evidence.test.partition("[")[0],), worst_test=evidence.test)
    evidence.rows[key] = evidence.rows[key].joined(seen) if key in evidence.rows else seen
"""


def test_G4_evidence_joins_to_the_same_rows_in_any_order() -> None:
    (found, *others) = [evidence.joined(order) for order in permutations(PARTS)]
    assert all(other == found for other in others)
    row = found["pa_x", "sm_90a"]
    assert (row.tests, row.worst_error, row.by, row.worst_test) == (4, 0.5, ("t::a", "t::b"), "t::a[1]")
    assert found["pa_x", "compute_75"].digest == "b" * 64, "code of one name for two targets has a row each"


def test_evidence_of_different_builds_does_not_join() -> None:
    with pytest.raises(InvalidArgument, match="one build"):
        evidence.joined([PARTS[0], {("pa_x", "sm_90a"): Evidence("c" * 64)}])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = evidence.joined(PARTS)
    evidence.write(tmp_path / "docs" / "evidence.json", rows)
    assert evidence.load(tmp_path / "docs" / "evidence.json") == rows


def test_evidence_of_schema_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    assert evidence.load(path) == {}
    row = {"digest": "ab", "tests": 3, "worst_error": 0.5, "commit": "c", "card": "H200", "more": [1]}
    path.write_text(json.dumps({"name": row}), encoding="utf-8")
    assert evidence.load(path) == {("name", ""): Evidence("ab", 3, 0.5, "c", "H200")}


BROKEN = (
    "[",
    "[]",
    '{"name": 1}',
    '{"name": {"tests": 1}}',
    '{"name": {"digest": "a", "tests": -1}}',
    '{"schema": 9, "rows": []}',
    '{"schema": 2, "rows": [{"name": "a", "digest": "b"}]}',
)


@pytest.mark.parametrize("text", BROKEN)
def test_broken_evidence_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"evidence\.json"):
        evidence.load(path)


def test_workers_of_pytest_write_the_file_of_a_serial_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(test_sample=SAMPLE)
    for name, options in (("serial", ()), ("parallel", ("-n", "2"))):
        result = pytester.runpytest_inprocess("--evidence", f"{name}.json", *options)
        result.assert_outcomes(passed=40)
    serial, parallel = ((pytester.path / f"{name}.json").read_text() for name in ("serial", "parallel"))
    assert serial == parallel
    rows = json.loads(serial)["rows"]
    assert [(row["name"], row["tests"]) for row in rows] == [("pa_0", 14), ("pa_1", 13), ("pa_2", 13)]
