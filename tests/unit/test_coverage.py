"""The coverage report: every state a kernel can be in, reachability, and holes that cannot hide."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from core_rows import declared_pairs, declared_rows

from pa_ops.coverage import Coverage, Fit, Inputs, State, Why, cover
from pa_ops.errors import InvalidArgument
from pa_ops.evidence import Evidence, Timed
from pa_ops.gates import attention_families
from pa_ops.generator import matrix
from pa_ops.generator.tiles import FLASH_SM90_SPLIT_TILES
from pa_ops.heuristics import MANY_TOKENS
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import Family, InstanceSpec, Layout, Mask, Op, Tile
from pa_ops.survey import HEAD_DIMS, MANY_SEQUENCES, SOME_SEQUENCES, Reach, Size, _asked, domain, questions, survey

SMALL = [row for row in declared_rows() if row.target == "sm_90a"][:4]
PAIRS = [(row.spec, row.target) for row in SMALL]
DIGESTS = {row.name: f"{i:064x}" for i, row in enumerate(SMALL)}


@dataclass(frozen=True)
class Refusal:
    spec: InstanceSpec
    target: str
    reason: str
    rule: str = "shared-memory"


def built(*rows: Entry) -> Manifest:
    entries = tuple(replace(row, digest=DIGESTS[row.name], registers=168, object_bytes=70_000) for row in rows)
    return Manifest("sm_90a", {}, "libpa_ops.so", "0" * 64, entries)


def state_of(coverage: Coverage, row: Entry) -> tuple[State, str]:
    return next((cell.state, cell.reason) for cell in coverage.cells if cell.name == row.name)


def fit_of(coverage: Coverage, row: Entry) -> Fit:
    return next(cell.fit for cell in coverage.cells if cell.name == row.name)


@pytest.fixture
def states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No survey, which costs half a second and says nothing of a kernel's state."""
    monkeypatch.setattr("pa_ops.coverage.survey", lambda entries: ({}, ()))


def test_G4_no_undeclared_hole_and_no_unreachable_row() -> None:
    refused = matrix.refusals()
    coverage = cover(Inputs(declared_pairs(), refused))
    assert [f"{hole.problem} on sm {hole.sm}" for hole in coverage.holes] == []
    assert [(cell.name, cell.target) for cell in coverage.unreachable] == []
    assert len(coverage.cells) == len(declared_pairs()) + len(refused)
    assert coverage.count(State.REFUSED) == len(refused) > 0
    assert all(cell.reason for cell in coverage.cells if cell.state is State.REFUSED)


def test_G4_a_missing_row_is_a_hole() -> None:
    rows = [row for row in declared_rows() if row.target == "sm_90a"]
    without_window = [row for row in rows if row.spec.mask is not Mask.WINDOW]
    assert survey(rows, [90])[1] == ()
    holes = survey(without_window, [90])[1]
    assert holes and len({hole.problem.facts for hole in holes}) == len(holes)
    assert {hole.problem.mask for hole in holes} == {Mask.WINDOW}
    assert "pa-ops build" in holes[0].reason


@pytest.mark.parametrize("family", attention_families())
def test_G4_a_row_that_nothing_selects_is_unreachable(family: Family) -> None:
    row = next(r for r in declared_rows() if (r.spec.family, r.target) == (family, "sm_90a"))
    stages = f"s{row.spec.tile.stages}w"
    twin = replace(row, name=row.name.replace(stages, "s9w"), symbol="", smem_bytes=row.smem_bytes + 1)
    reached, _ = survey([*declared_rows(), twin], [90])
    assert (row.name, "sm_90a") in reached
    assert (twin.name, "sm_90a") not in reached


def test_G4_ptx_behind_native_code_is_shadowed_and_not_unreachable() -> None:
    native = [(spec, target) for spec, target in declared_pairs() if spec.family is Family.MEA]
    ptx = [(spec, "compute_75") for spec, target in native if target == "sm_75"]
    everywhere = cover(Inputs([*native, *ptx]))
    shadowed = everywhere.reached(Reach.SHADOWED)
    assert {(cell.name, cell.target) for cell in shadowed} == {(spec.name, target) for spec, target in ptx}
    assert everywhere.unreachable == ()
    newer = [(spec, target) for spec, target in native if target in ("sm_53", "sm_60", "sm_70", "sm_80")]
    without = cover(Inputs([*newer, *ptx]))
    assert without.reached(Reach.SHADOWED) == (), "a device without native code runs it"
    assert {cell.name for cell in without.reached(Reach.AUTO) if cell.target == "compute_75"}


def test_G4_a_row_of_a_new_head_size_is_met_by_problems_of_it() -> None:
    row = next(row for row in declared_rows() if "_flash_sm80_bf16_kvbf16_d128v128_gather_causal" in row.name)
    head_dims = {row.spec.head_dim for row in declared_rows()}
    other = next(each for each in range(136, 256, 8) if each not in head_dims)
    new = replace(row, name=row.name.replace("d128v128", f"d{other}v{other}"), symbol="")
    reached, holes = survey([*declared_rows(), new], [86])
    assert reached[new.name, new.target] is Reach.AUTO and holes == ()


def test_G4_the_domain_holds_every_option() -> None:
    problems = list(domain())
    assert len(set(problems)) == len(problems)
    for field in ("op", "dtype", "kv_dtype", "mask", "softcap", "sinks", "layout", "page_size", "tokens"):
        assert len({getattr(problem, field) for problem in problems}) > 1, field


@pytest.mark.parametrize(
    ("size", "family", "tall", "clusters"),
    [
        (Size(1, 16), Family.DECODE, set(), {1}),
        (Size(512, 16), Family.FLASH_SM90, set(), {1}),
        (Size(MANY_TOKENS, 16), Family.FLASH_SM90, {Mask.FULL, Mask.CAUSAL}, {1, 2, 8}),
        (Size(MANY_TOKENS, 16, 1, SOME_SEQUENCES), Family.FLASH_SM90, {Mask.FULL, Mask.CAUSAL}, {1, 2}),
        (Size(MANY_TOKENS, 16, 4, MANY_SEQUENCES), Family.FLASH_SM90, {Mask.FULL, Mask.CAUSAL, Mask.WINDOW}, {1}),
        (Size(512, 1), Family.FLASH_SM80, set(), {1}),
    ],
)
def test_G4_each_size_of_the_domain_has_kernels_of_its_own(
    size: Size, family: Family, tall: set[Mask], clusters: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    families = (Family.DECODE, Family.FLASH_SM90, Family.FLASH_SM80)
    rows = [row for row in declared_rows() if row.target == "sm_90a" and row.spec.layout is Layout.GATHER]
    rows = [row for row in rows if row.spec.family in families]
    monkeypatch.setattr("pa_ops.survey.SIZES", {Op.PAGED_ATTENTION: (size,)})
    asked = (each for each in questions(HEAD_DIMS, FLASH_SM90_SPLIT_TILES) if each[0]["op"] is not Op.ATTENTION)
    others = [each for each in asked if family is Family.FLASH_SM90 or each[0]["head_dim"] == each[0]["head_dim_v"]]
    monkeypatch.setattr("pa_ops.survey.questions", lambda head_dims, pairs: others)
    monkeypatch.setattr("pa_ops.survey._asked", _asked.__wrapped__)  # it keeps what it was asked of the whole domain
    reached, _ = survey(rows, [90])
    best = {name for (name, _), how in reached.items() if how is Reach.AUTO}
    tiles: dict[InstanceSpec, list[Tile]] = defaultdict(list)
    for row in rows:
        if row.spec.family is family:
            tiles[replace(row.spec, tile=Tile(0, 0, 0, 0))].append(row.spec.tile)
    fitting = {}
    for spec, several in tiles.items():  # as many blocks as can share keys, then the tile that fits
        most = max(tile.cluster for tile in several if tile.cluster in clusters)
        shared = [tile for tile in several if tile.cluster == most]
        fitting[spec] = (max if spec.mask in tall else min)(shared, key=lambda tile: tile.m)
    assert best == {replace(spec, tile=tile).name for spec, tile in fitting.items()}


def test_G4_a_kernel_that_only_an_override_reaches_is_told_apart() -> None:
    rows = [row for row in declared_rows() if row.target == "sm_90a"]
    reached, _ = survey(rows, [90])
    named = {row.spec for row in rows if reached[row.name, row.target] is Reach.NAMED}
    dense = {row.spec for row in rows if row.spec.layout is Layout.DENSE and row.spec.head_dim <= 256}
    dense = {spec for spec in dense if spec.mask is not Mask.TENSOR and spec.family in (Family.FLASH_SM80, Family.MEA)}
    assert named == dense | {row.spec for row in rows if row.spec.family is Family.MEA_DECODE}
    coverage = cover(Inputs([(row.spec, row.target) for row in rows]))
    assert {InstanceSpec.parse(cell.name) for cell in coverage.reached(Reach.NAMED)} == named


@pytest.mark.usefixtures("states_alone")
def test_a_kernel_rises_through_its_states() -> None:
    row = SMALL[0]
    key, digest = (row.name, row.target), DIGESTS[row.name]
    shown = Evidence(digest, tests=7, worst_error=1e-3, commit="abc", card="H200")
    base = Inputs(PAIRS)
    assert state_of(cover(base), row) == (State.DECLARED, "")
    base = replace(base, sources=frozenset({key}))
    assert state_of(cover(base), row) == (State.GENERATED, "")
    base = replace(base, manifests=(built(row),))
    assert state_of(cover(base), row) == (State.COMPILED, "")
    base = replace(base, tests={(row.name, row.target): shown})
    assert state_of(cover(base), row) == (State.TESTED, "")
    cell = next(cell for cell in cover(base).cells if cell.name == row.name)
    assert (cell.registers, cell.object_bytes, cell.tests, cell.worst_error, cell.card) == (
        168,
        70_000,
        7,
        1e-3,
        "H200",
    )
    assert (cell.fit, cell.why, cell.times) == (Fit.HERE, Why.NOTHING, ())
    timed = Timed(digest, "decode", "32 x 1", 20.0, peers={"SDPA": 50.0, "other": 30.0})
    old = replace(timed, digest="f" * 64)
    base = replace(base, bench={key: (timed, old)}, presets={row.name: ("full",)}, uses={row.name: ("demo",)})
    assert state_of(cover(base), row) == (State.BENCHMARKED, "")
    cell = next(cell for cell in cover(base).cells if cell.name == row.name)
    assert (cell.times, cell.stale_times, cell.requested, cell.used) == ((timed,), 1, ("full",), ("demo",))
    assert timed.ratio == 1.5 and Timed("", "", "", 1.0).ratio is None


@pytest.mark.usefixtures("states_alone")
def test_evidence_counts_for_the_digest_that_it_was_gathered_on() -> None:
    row = SMALL[0]
    key = row.name, row.target
    base = Inputs(PAIRS, manifests=(built(row),))
    old = Evidence("f" * 64, tests=7)
    state, reason = state_of(cover(replace(base, tests={key: old})), row)
    assert state is State.STALE
    assert "ffff" in reason
    assert fit_of(cover(replace(base, tests={key: old})), row) is Fit.STALE
    state, reason = state_of(cover(replace(base, digests={key: "e" * 64})), row)
    assert state is State.STALE
    assert "eeee" in reason
    elsewhere = replace(
        base,
        tests={key: replace(old, tools={"dsl": "5"})},
        current=frozenset({key}),
    )
    assert state_of(cover(elsewhere), row) == (State.COMPILED, "tests ran on these sources as compiled by dsl 5")
    assert fit_of(cover(elsewhere), row) is fit_of(cover(replace(elsewhere, manifests=())), row) is Fit.SOURCES
    edited = replace(elsewhere, digests={key: "e" * 64})
    assert state_of(cover(edited), row)[0] is State.STALE
    failed = Evidence(DIGESTS[row.name], tests=0)
    assert state_of(cover(replace(base, tests={key: failed})), row) == (State.COMPILED, "")
    timed = (Timed("f" * 64, "decode", "", 1.0),)
    passed = Evidence(DIGESTS[row.name], tests=1)
    inputs = replace(base, tests={key: passed}, bench={key: timed})
    assert state_of(cover(inputs), row) == (State.TESTED, "")


@pytest.mark.usefixtures("states_alone")
def test_evidence_of_another_target_leaves_a_kernel_compiled() -> None:
    here = SMALL[0]
    other = replace(here, target="sm_80", code_targets=("sm_80",), digest="d" * 64)
    manifests = (built(here), Manifest("sm_80", {}, "libpa_ops.so", "0" * 64, (other,)))
    for target in ("sm_80", ""):  # schema 1 told no target
        seen = {(here.name, target): Evidence("d" * 64, 3)}
        inputs = Inputs([*PAIRS, (here.spec, "sm_80")], manifests=manifests, tests=seen)
        states = {cell.target: cell.state for cell in cover(inputs).cells if cell.name == here.name}
        assert states == {"sm_80": State.TESTED, "sm_90a": State.COMPILED}


@pytest.mark.usefixtures("states_alone")
def test_refused_and_dropped_kernels_say_why() -> None:
    first, second = SMALL[0], SMALL[1]
    refused = Refusal(first.spec, first.target, "needs tcgen05")
    inputs = Inputs(PAIRS[2:], refused=(refused,), manifests=(built(second),))
    assert state_of(cover(inputs), first) == (State.REFUSED, "needs tcgen05")
    reasons = {"shared-memory": Why.SHARED_MEMORY, "before-sm80": Why.TOOLCHAIN, "other-tile": Why.RULE}
    for rule, why in reasons.items():
        one = cover(Inputs([], refused=(replace(refused, rule=rule),))).cells
        assert [cell.why for cell in one] == [why]
    lacking = {first.target: "NVRTC 13 does not know it"}
    asked, unknown = (cover(Inputs(PAIRS, lacking=each)).cells[0] for each in ({}, lacking))
    assert (asked.why, asked.reason) == (Why.NOT_REQUESTED, "")
    assert (unknown.why, unknown.reason) == (Why.TOOLCHAIN, lacking[first.target])
    assert state_of(cover(inputs), second) == (State.STALE, "built, and no longer declared")
    with pytest.raises(InvalidArgument, match="declared or refused"):
        cover(Inputs(PAIRS, refused=(refused,)))
