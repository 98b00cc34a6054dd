"""Recorded times: they order kernels on a card of that name, and decide nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_rows import declared_rows

from pa_ops import bench_record, heuristics, timings
from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import explain_text, select_entry, verdicts
from pa_ops.spec import PLAIN_MASKS, Family, KernelOp, Op
from pa_ops.survey import domain
from pa_ops.timings import ShapeClass, Table, Timing
from pa_ops.unsupported import unsupported

CARD = "Toy 90"
KNOWN = Capability.of_sm(90, card=CARD)
ROWS = tuple(row for row in declared_rows() if row.target == "sm_90a")
PREFILL = Problem(op="paged_attention", dtype="bf16", head_dim=128, page_size=16, tokens=500)


def table(speeds: dict[Family, float], leave_out: str = "") -> Table:
    """Times of every attention row: its family's, and more with its head size."""
    made = [
        Timing(
            row.name, row.target, shape_class, speeds.get(row.spec.family, 900.0) + row.spec.head_dim, "", "a shape", 9
        )
        for row in ROWS
        for shape_class in ShapeClass
        if row.spec.op is KernelOp.ATTN and row.name != leave_out
    ]
    return {each.key: each for each in made}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Table]]:
    """Tables by card, which selection reads in place of the file's."""
    cards: dict[str, Table] = {CARD: table({Family.FLASH_SM80: 100.0, Family.FLASH_SM90: 300.0})}
    monkeypatch.setattr(heuristics, "of_card", lambda card: cards.get(card, timings.NONE))
    yield cards


def test_G8_a_recorded_time_decides_on_its_card_alone(recorded: dict[str, Table]) -> None:
    assert select_entry(ROWS, PREFILL, KNOWN).family is Family.FLASH_SM80
    assert select_entry(ROWS, PREFILL, Capability.of_sm(90)).family is Family.FLASH_SM90
    assert select_entry(ROWS, PREFILL, Capability.of_sm(90, card="Another")).family is Family.FLASH_SM90
    text = explain_text(ROWS, PREFILL, KNOWN)
    assert "on Toy 90, sm 90" in text and "eligible, 228.0 us for a shape <- selected" in text
    assert "eligible, 428.0 us for a shape, ranked behind" in text


def test_G8_times_that_are_nearly_equal_leave_the_choice_to_cost(recorded: dict[str, Table]) -> None:
    recorded[CARD] = table({Family.FLASH_SM80: 100.0, Family.FLASH_SM90: 105.0})
    assert select_entry(ROWS, PREFILL, KNOWN).family is Family.FLASH_SM90
    recorded[CARD] = table({Family.FLASH_SM80: 100.0, Family.FLASH_SM90: 130.0})
    assert select_entry(ROWS, PREFILL, KNOWN).family is Family.FLASH_SM80


def test_G8_a_family_s_head_sizes_are_ranked_by_padding(recorded: dict[str, Table]) -> None:
    """Also where a larger one was the faster on the day."""
    noise = {"_d128v128_": 999.0, "_d256v256_": 1.0}
    recorded[CARD] = {
        key: replace(each, microseconds=next((us for part, us in noise.items() if part in key[0]), each.microseconds))
        for key, each in recorded[CARD].items()
    }
    assert select_entry(ROWS, PREFILL, KNOWN).entry.spec.head_dim == 128


def test_B7_a_kernel_without_a_time_is_not_passed_over(recorded: dict[str, Table]) -> None:
    usual = select_entry(ROWS, PREFILL, Capability.of_sm(90)).entry
    recorded[CARD] = table({Family.FLASH_SM80: 100.0}, leave_out=usual.name)
    assert select_entry(ROWS, PREFILL, KNOWN).entry == usual


def test_G8_a_time_of_other_code_decides_nothing(recorded: dict[str, Table]) -> None:
    """Where only code for an older SM is there, whose prefill kernel alone has a name, and a time, of its own."""
    code = {"target": "compute_53", "code_targets": ("compute_53",)}
    older = tuple(replace(row, **code) for row in declared_rows() if row.target == "sm_53")
    problem = replace(PREFILL, dtype="fp16", kv_dtype="fp16")
    usual = select_entry(older, problem, Capability.of_sm(90)).entry
    assert usual.spec.family is Family.MEA and usual.name not in {row.name for row in ROWS}
    own = Timing(usual.name, usual.target, ShapeClass.MANY, 5000.0, "", "a shape", 9)
    recorded[CARD] = {**table({Family.MEA_DECODE: 4000.0}), own.key: own}
    assert select_entry(older, problem, KNOWN).entry == usual


def test_C19_times_change_no_verdict(recorded: dict[str, Table]) -> None:
    """Whatever is served is served with them, whatever is not is not."""
    plain = Capability.of_sm(90)
    for problem in [each for each in domain() if each.op is Op.PAGED_ATTENTION][::7]:
        if unsupported(problem, plain) is not None:
            assert not any(verdict.eligible for verdict in verdicts(ROWS, problem, KNOWN))
            continue
        with_times, without = (select_entry(ROWS, problem, device) for device in (KNOWN, plain))
        assert with_times.reasons == without.reasons


def test_the_file_is_read_back(tmp_path: Path) -> None:
    cards = {"B": table({}), "A": dict(list(table({}).items())[:3])}
    path = tmp_path / "timings.json"
    path.write_text(timings.dumps(cards))
    assert timings.load(path) == cards and timings.load(tmp_path / "none") == {}
    assert timings.of_card("A", path) == cards["A"] and timings.of_card("", path) == timings.NONE


@pytest.mark.parametrize("change", [{"microseconds": -1}, {"shape_class": "some"}, {"calls": "9"}, {"card": None}])
def test_a_broken_row_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    document = json.loads(timings.dumps({"A": table({})}))
    document["rows"][1] = {
        name: value for name, value in {**document["rows"][1], **change}.items() if value is not None
    }
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidArgument, match=r"timings\.json rows\[1\]"):
        timings.load(path)


def test_the_committed_table_is_of_kernels_that_exist() -> None:
    names = {row.name for row in declared_rows()}
    for card, rows in timings.load(timings.FILE).items():
        assert {name for name, _, _ in rows} & names, f"no kernel of {card} is declared any more: record again"


def test_every_kernel_is_recorded_with_tensors_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by its better round: what disturbs one of them does not show."""
    monkeypatch.setattr(bench_record, "SHAPES", {each: bench_record.Shape(2, 1, 32) for each in ShapeClass})
    asked: list[tuple[tuple[torch.Size, ...], dict[str, Any]]] = []

    def operator(*tensors: torch.Tensor, **options: Any) -> None:
        asked.append((tuple(tensor.shape for tensor in tensors), options))

    for name in ("paged_attention", "varlen_attention"):
        monkeypatch.setattr(bench_record.functions, name, operator)

    entries: list[Entry] = list(ROWS)
    attention = {row.name for row in ROWS if row.spec.op is KernelOp.ATTN and row.spec.mask in PLAIN_MASKS}
    every = len(attention) * len(ShapeClass)

    def clock(call: bench_record.Call) -> list[float]:
        call()
        disturbed = len(asked) <= every // 2 or len(asked) > every * 3 // 2
        return [0.030, 0.009] if disturbed else [0.003, 0.001, 0.002]

    found = list(bench_record.record(entries, torch.device("cpu"), clock))
    assert {(each.instance, each.shape_class) for each in found} == {(n, c) for n in attention for c in ShapeClass}
    assert {(each.microseconds, each.calls) for each in found} == {(2.0, 5)}
    for timing, (shapes, options) in zip(found * bench_record.ROUNDS, asked, strict=True):
        assert options["backend"] == timing.instance
        spec = next(row for row in ROWS if row.name == timing.instance).spec
        assert shapes[0][-1] == shapes[1][-1] == spec.head_dim and shapes[2][-1] == spec.head_dim_v
