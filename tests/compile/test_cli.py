"""The command line and the report's forms; what needs no compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pa_ops import cli, report
from pa_ops.capability import Capability
from pa_ops.coverage import Coverage, State, cover
from pa_ops.evidence import Evidence
from pa_ops.generator import inventory, matrix, targets
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import InstanceSpec, Mask
from pa_ops.words import question

SERVING, SM90 = (matrix.declared("serving", (target,)) for target in ("sm_80", "sm_90a"))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_G3_list_prints_every_name_once_in_order(capsys: Capture) -> None:
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [spec.name for spec in matrix.declared("full")]


def test_list_filters_and_tells_axes_as_json(capsys: Capture) -> None:
    assert cli.main(["list", "--filter", "*d256*bf16*", "--json"]) == 1
    assert "filter" in capsys.readouterr().err
    assert cli.main(["list", "--filter", "*bf16*d256*", "--arch", "sm_90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [spec.name for spec in SM90 if (spec.head_dim, spec.dtype) == (256, "bf16")]
    assert all(row["head_dim"] == 256 and row["targets"] == ["sm_90a"] and row["built"] == [] for row in rows)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["build", "--filter", "*nothing*"], f"filter: must match one of {len(SERVING)} instances"),
        (["build", "--arch", "sm_52"], "arch: must be one of sm_53"),
        (["build", "--preset", "huge"], "preset: must be one of smoke, serving, full"),
        (["build", "--jobs", "-1"], "jobs: must be an integer >= 0"),
        (["explain", "paged_attention"], "head_dim: must be told"),
        (["explain", "paged_attention", "head_dim=x"], "head_dim: must be an integer"),
        (["explain", "paged_attention", "head_dim=64", "colour=red"], "colour: must be one of dtype"),
        (["explain", "paged_attention", "head_dim=64", "causal=maybe"], "causal: must be yes or no"),
        (["explain", "attend", "head_dim=64"], "op: must be one of"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(command: list[str], words: str, capsys: Capture, empty_home: Path) -> None:
    assert cli.main(command) == 1
    assert words in capsys.readouterr().err
    assert not empty_home.exists()


@pytest.mark.parametrize(("tokens", "family"), [(64, "flash_sm90"), (1, "decode")])
def test_G8_explain_prints_every_row_with_its_reasons(tokens: int, family: str, capsys: Capture) -> None:
    words = ["paged_attention", "dtype=bf16", "head_dim=128", "page_size=16", f"tokens={tokens}", "kv=8192", "sm=90"]
    assert cli.main(["explain", *words]) == 0
    out = capsys.readouterr().out
    assert f"selected: pa_attn_{family}_bf16_kvbf16_d128v128_gather_causal_" in out
    rows = [line for line in out.splitlines() if line.startswith("  pa_")]
    assert len(rows) == len(matrix.declared("full", ("sm_90a",)))
    assert all("selected" in row or "eligible" in row or "needs" in row for row in rows)


def test_explain_reads_every_kind_of_word() -> None:
    words = ["head_dim=64", "heads=32", "kv_heads=8", "window=yes", "kv=100", "sm=sm_86", "backend=flash"]
    asked = question("paged_attention", [*words, "card=NVIDIA A40"])
    problem = asked.problem
    assert (problem.num_heads, problem.num_kv_heads, problem.window, problem.max_k) == (32, 8, True, 100)
    assert (asked.capability, asked.backend) == (Capability.of_sm(86, card="NVIDIA A40"), "flash")


@pytest.fixture(scope="module")
def coverage() -> Coverage:
    """Nothing built but one kernel for sm_90a, tested."""
    spec = matrix.declared("smoke")[4]
    entry = Entry(spec.name, spec.name, "a" * 64, "sm_90a", ("sm_90a",), 32768, 255, 24, 24, 70000, 3.5)
    manifest = Manifest("sm_90a", {"cc": "x"}, "libpa_ops.so", "0" * 64, (entry,))
    inputs = inventory.inputs(Path("/nonexistent"), {(spec.name, "sm_90a"): Evidence("a" * 64, 7, 1e-3)}, {}, {})
    others = {key: value for key, value in inputs.digests.items() if key[0] != spec.name}
    return cover(type(inputs)(**{**vars(inputs), "manifests": (manifest,), "digests": others}))


def test_G4_the_matrix_has_no_hole_and_no_unreachable_row(coverage: Coverage) -> None:
    assert coverage.holes == () and coverage.unreachable == ()
    assert coverage.count(State.TESTED) == 1


def test_G4_report_forms_tell_the_same(coverage: Coverage) -> None:
    document = json.loads(report.to_json(coverage))
    assert len(document["cells"]) == len(coverage.cells)
    tested = [cell for cell in document["cells"] if cell["state"] == "tested"]
    assert [(cell["registers"], cell["spill_bytes"], cell["tests"]) for cell in tested] == [(255, 24, 7)]
    page = report.to_html(coverage)
    start = page.index('id="data">') + len('id="data">')
    inside = json.loads(page[start : page.index("</script>", start)].replace("<\\/", "</"))
    usual = inside.pop("defaults")
    assert {**inside, "cells": [{**usual, **cell} for cell in inside["cells"]]} == document
    assert "http://" not in page and "https://" not in page
    text = report.to_markdown(coverage)
    assert f"| `{tested[0]['name']}` | sm_90a | tested | 255 | 24 |" in text
    assert "0 undeclared holes, 0 unreachable kernels" in text
    assert "quantised caches are served by the reference only" in text
    assert "begin at SM 8.0" in text and "more shared memory than a block may have" in text


def test_G6_the_heat_map_of_every_target_that_ci_compiles_fits_the_demo_s_130_columns(coverage: Coverage) -> None:
    head, rows = report.heat_map(coverage)
    specs = {InstanceSpec.parse(cell.name) for cell in coverage.cells}
    kernels = {(spec.family, spec.head_dim, spec.head_dim_v, spec.layout, spec.mask) for spec in specs}
    assert len({row[:4] for row in rows}) == len(rows) == len(kernels), "two kernels would share a row"
    assert ("flash_sm90", "192/128", "gather", "causal") in {row[:4] for row in rows}
    assert [f"sm_{word}" for word in head[4:]] == list(targets.REPORTED_TARGETS)
    assert {"sm_61", "sm_62", "sm_72", *matrix.DECLARED_TARGETS} == set(targets.REPORTED_TARGETS)
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    assert sum(widths) + 3 * len(widths) + 1 <= 130


def test_report_writes_the_files_that_were_asked_for(tmp_path: Path, capsys: Capture) -> None:
    paths = {form: tmp_path / "out" / f"coverage.{form}" for form in ("html", "json", "markdown")}
    options = [word for form, path in paths.items() for word in (f"--{form}", str(path))]
    assert cli.main(["report", "--check", *options]) == 0
    assert all(path.stat().st_size > 1000 for path in paths.values())
    assert "0 holes, 0 unreachable kernels" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, capsys: Capture) -> None:
    taken = tmp_path / "file"
    taken.touch()
    assert cli.main(["report", "--json", str(taken / "out.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pa-ops: ") and str(taken) in error and error.count("\n") == 1


def test_G4_check_fails_where_selection_finds_a_hole(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def without_causal(preset: str, archs: tuple[str, ...]) -> tuple[InstanceSpec, ...]:
        return tuple(spec for spec in declared(preset, archs) if spec.mask is not Mask.CAUSAL)

    declared = matrix.declared
    monkeypatch.setattr(matrix, "declared", without_causal)
    assert cli.main(["report", "--check"]) == 1
    assert "## Holes" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"schema": 1}', "{", ""])
def test_G1_a_product_of_another_version_is_left_out_of_the_report_with_a_warning(text: str, tmp_path: Path) -> None:
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_80" / "manifest.json").write_text(text)
    with pytest.warns(RuntimeWarning, match=r"sm_80 is not counted: its manifest is damaged or of another version"):
        assert inventory.manifests(tmp_path) == ()
