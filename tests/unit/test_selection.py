"""Selection: total, explained, from one table of gates, for any SM with no GPU present."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import pytest
from core_rows import ROOT, declared_rows, loaded_by
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.families import device_rejections
from pa_ops.gates import GATES, attention_families
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import Policy, explain_text, select_entry, verdicts
from pa_ops.spec import Family, KernelOp, Layout
from pa_ops.unsupported import unsupported

ROWS = declared_rows()
H200 = Capability.of_sm(90)


def paged(**changes: Any) -> Problem:
    return Problem(**{"op": "paged_attention", "dtype": "bf16", "head_dim": 128, **changes})


def prefill(**changes: Any) -> Problem:
    """More query rows than `decode` is made for."""
    return paged(**{"tokens": 512, **changes})


def refusal(problem: Problem, sm: int, rows: tuple[Entry, ...] = ROWS, policy: Policy | None = None) -> str:
    with pytest.raises(NoInstance) as caught:
        select_entry(rows, problem, Capability.of_sm(sm), policy or Policy())
    return str(caught.value)


@pytest.mark.parametrize("sm", [53, 60, 61, 62, 70, 72, 75])
def test_B2_bf16_before_sm80_names_dtype_required_and_actual_sm(sm: int) -> None:
    text = refusal(paged(), sm)
    assert "sm >= 80 for bf16" in text
    assert f"got sm {sm}\n" in text


@pytest.mark.parametrize("sm", [50, 52])
def test_B2_fp16_before_sm53_names_dtype_required_and_actual_sm(sm: int) -> None:
    text = refusal(paged(dtype="fp16"), sm)
    assert "sm >= 53 for fp16 (half2)" in text
    assert f"got sm {sm}\n" in text


@pytest.mark.parametrize("sm", [80, 86, 87, 89, 90, 100, 103, 120, 121])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("op", ["paged_attention", "varlen_attention"])
def test_B3_flash_from_sm80_on(sm: int, dtype: str, op: str) -> None:
    chosen = select_entry(ROWS, Problem(op=op, dtype=dtype, head_dim=128, tokens=512), Capability.of_sm(sm))
    assert chosen.family.startswith("flash")
    assert chosen.instance == chosen.entry.name


def test_B5_rows_without_a_family_still_answer_or_say_what_to_build() -> None:
    helpers = tuple(row for row in ROWS if row.spec.op is not KernelOp.ATTN)
    append = Problem(op="append_kv", dtype="bf16", head_dim=128)
    assert select_entry(helpers, append, H200).family is Family.APPEND
    text = refusal(paged(), 90, helpers)
    assert "rows: none is built" in text
    assert "pa-ops build --arch sm_90a --filter 'pa_attn_flash_sm80_bf16_kvbf16_*_gather_causal_*'" in text
    _, _, families = text.partition("flash_sm80:\n")
    assert families and refusal(paged(), 90, ()).partition("flash_sm80:\n")[2] == families


@pytest.mark.parametrize("tokens", [1, 512])
def test_B5_without_a_family_the_next_one_serves_or_the_error_has_every_gate(tokens: int) -> None:
    newer = ("flash_sm80", "flash_sm90", "decode")
    problem = paged(dtype="fp16", tokens=tokens)
    mea = tuple(row for row in ROWS if row.spec.family not in newer)
    assert select_entry(mea, problem, H200).family is (Family.MEA_DECODE if tokens == 1 else Family.MEA)
    without = tuple(row for row in ROWS if row.spec.family not in (Family.MEA, Family.MEA_DECODE))
    assert select_entry(without, problem, H200).family in newer
    text = refusal(problem, 75, without)
    for family in attention_families():
        assert f"\n{family}:\n" in text
    assert "device: needs sm >= 80 for fp16" in text and "got sm 75" in text and "PA_OPS_BACKEND" in text
    assert "pa-ops build --arch sm_75 --filter 'pa_attn_mea_fp16_" in text


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_B5_the_build_commands_name_rows_that_would_serve(mask: str) -> None:
    problem = paged(causal=mask == "causal", window=mask == "window")
    patterns = re.findall("--filter '(.*?)'", refusal(problem, 90, ()))
    served = []
    for pattern in patterns:
        matching = [row for row in ROWS if fnmatchcase(row.name, pattern)]
        served.append(select_entry(matching, problem, H200).family)
        assert all(problem.mask in GATES[row.spec.family].masks[row.spec.mask] for row in matching)
        assert all(row.spec.layout is Layout.GATHER for row in matching)
    assert served == list(attention_families())


def test_B6_the_error_lists_gates_values_overrides_and_leaves_out_useless_commands() -> None:
    text = refusal(paged(dtype="fp32", head_dim=260, num_heads=8, num_kv_heads=2), 75)
    assert "NO  dtype: needs bf16 or fp16, got fp32" in text
    assert "device: needs sm >= 80 for fp16" in text
    assert "NO  head size: needs a multiple of 8 up to 256, got 260" in text
    assert "got sm 75" in text
    for family in attention_families():
        assert f"\n{family}:\n" in text
    for name in ("PA_OPS_BACKEND", "PA_OPS_DISABLE", "backend="):
        assert name in text
    assert "pa-ops build" not in text


def test_B6_an_override_that_leaves_nothing_raises_and_is_named() -> None:
    neither = Policy(disabled=frozenset({"flash", "decode", "mea"}))
    text = refusal(paged(), 90, policy=Policy("lean", "PA_OPS_BACKEND"))
    for family in ("flash_sm80", "flash_sm90", "decode", "mea"):
        assert f"backend: needs lean (PA_OPS_BACKEND), got {family}" in text
    assert "families: flash_sm80, flash_sm90, decode, mea, mea_decode" in text
    assert "pa-ops build" not in text
    text = refusal(paged(), 90, policy=neither)
    assert "PA_OPS_DISABLE=flash" in text and "PA_OPS_DISABLE=decode" in text
    assert "PA_OPS_DISABLE decode,flash,mea" in text
    assert "pa-ops build" not in text
    for overruled in (Policy("lean"), neither):
        assert "pa-ops build" not in refusal(paged(), 90, (), overruled)
    with pytest.raises(InvalidArgument, match=r"^backend: "):
        Policy("")


def test_B6_overrides_reach_families_their_first_words_and_instances() -> None:
    few, many = (select_entry(ROWS, problem, H200) for problem in (paged(), prefill()))
    older = select_entry(ROWS, prefill(), H200, Policy("flash_sm80"))
    assert (few.family, many.family, older.family) == (Family.DECODE, Family.FLASH_SM90, Family.FLASH_SM80)
    words = {"flash_sm90": many, "flash": many, "flash_sm80": older, "decode": few}
    words |= {chosen.instance: chosen for chosen in (few, many, older)}
    for problem in (paged(), prefill()):
        for word, chosen in words.items():
            assert select_entry(ROWS, problem, H200, Policy(word)).entry == chosen.entry
        for chosen in (few, many, older):
            axes = ("family", "dtype", "layout", "mask")
            same = {**{axis: getattr(chosen.entry.spec, axis) for axis in axes}, "head_dim": 256}
            larger = {row.name for row in ROWS if all(getattr(row.spec, axis) == same[axis] for axis in same)}
            assert larger
            for name in larger:
                assert select_entry(ROWS, problem, H200, Policy(name)).instance == name
        cases = (({"flas", "decode"}, many), ({"flash", "mea"}, few), ({"flash_sm90", "decode"}, older))
        for words_, chosen in cases:
            assert select_entry(ROWS, problem, H200, Policy(disabled=frozenset(words_))).entry == chosen.entry
    append = Problem(op="append_kv", dtype="bf16", head_dim=128)
    strict = Policy("flash", disabled=frozenset({"append", "flash"}))
    assert select_entry(ROWS, append, H200, strict).family is Family.APPEND


def serves(row: Entry, problem: Problem, capability: Capability) -> bool:
    """What the rows promise, written a second time from the vocabulary page."""
    spec = row.spec
    attends = problem.op in ("paged_attention", "varlen_attention")
    if not attends or spec.op != "attn":
        return False
    fits = problem.head_dim <= spec.head_dim and problem.head_dim_v <= spec.head_dim_v
    pages = (problem.op == "paged_attention") == (spec.layout == "gather")
    boxes = spec.family != "flash_sm90" or (problem.page_size or 0) % 8 == 0
    asked = "window" if problem.window else "causal" if problem.causal else "full"
    masked = asked == spec.mask or (
        spec.family in ("decode", "mea_decode") and (asked, spec.mask) == ("full", "causal")
    )
    even = problem.head_dim % 8 == 0 and problem.head_dim_v % 8 == 0
    whole = even and (problem.head_dim == problem.head_dim_v or spec.family in ("mea", "flash_sm90"))
    same = problem.dtype == spec.dtype and problem.kv_dtype == spec.kv_dtype
    loads = row.target in capability.targets and row.smem_bytes <= capability.smem_optin_bytes
    return fits and pages and boxes and masked and whole and same and loads and problem.aligned


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Problems that rows serve, with up to two facts spoilt."""
    op = draw(st.sampled_from(("paged_attention", "varlen_attention")))
    head_dim = 8 * draw(st.integers(1, 32))
    group, kv_heads = draw(st.integers(1, 32)), draw(st.integers(1, 8))
    facts: dict[str, Any] = {"dtype": draw(st.sampled_from(("fp16", "bf16"))), "head_dim": head_dim}
    if draw(st.booleans()):
        facts["head_dim_v"] = 8 * draw(st.integers(1, 32))
    spoilt: dict[str, st.SearchStrategy[Any]] = {
        "dtype": st.just("fp32"),
        "kv_dtype": st.sampled_from(("fp16", "bf16", "e4m3fn")),
        "head_dim": st.integers(1, 600),
        "head_dim_v": st.integers(1, 600),
        "aligned": st.just(False),
    }
    for fact in draw(st.lists(st.sampled_from(sorted(spoilt)), max_size=2, unique=True)):
        facts[fact] = draw(spoilt[fact])
    return Problem(
        op=op,
        **facts,
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        causal=draw(st.booleans()),
        window=draw(st.booleans()),
        softcap=draw(st.booleans()),
        sinks=draw(st.booleans()),
        page_size=draw(st.integers(1, 512) | st.sampled_from((8, 16, 24))) if op == "paged_attention" else None,
        batch=draw(st.integers(0, 5000)),
        tokens=draw(st.integers(0, 100_000)),
        max_q=draw(st.none() | st.integers(0, 100_000)),
        max_k=draw(st.none() | st.integers(0, 1 << 20)),
    )


SMS = st.one_of(st.sampled_from(sorted(MODELS)), st.integers(50, 140))
SUBSETS = st.one_of(st.just(ROWS), st.lists(st.sampled_from(ROWS), max_size=40, unique=True))


@settings(deadline=None, max_examples=80)
@given(problems(), SMS, SUBSETS, st.randoms(use_true_random=False))
def test_B7_selected_exactly_when_some_row_is_eligible(problem: Problem, sm: int, rows: Any, shuffle: Any) -> None:
    capability = Capability.of_sm(sm)
    able = {(row.name, row.target) for row in rows if serves(row, problem, capability)}
    told = verdicts(rows, problem, capability)
    assert able == {(each.entry.name, each.entry.target) for each in told if each.eligible}
    if not able:
        with pytest.raises(NoInstance):
            select_entry(rows, problem, capability)
        return
    chosen = select_entry(rows, problem, capability)
    assert (chosen.entry.name, chosen.entry.target) in able
    mixed = list(rows)
    shuffle.shuffle(mixed)
    assert select_entry(mixed, problem, capability) == chosen


@settings(deadline=None, max_examples=60)
@given(problems(), SMS, st.integers(0, 5000), st.integers(0, 100_000))
def test_B7_sizes_never_make_a_row_eligible(problem: Problem, sm: int, batch: int, tokens: int) -> None:
    capability = Capability.of_sm(sm)
    resized = replace(problem, batch=batch, tokens=tokens, max_q=None, max_k=None)
    assert verdicts(ROWS, problem, capability) == verdicts(ROWS, resized, capability)


def test_B7_batch_invariant_ranking_ignores_sizes() -> None:
    flash = [row for row in ROWS if row.spec.family is Family.FLASH_SM80]
    finer = [replace(row, name=row.name.replace("m128", "m16"), symbol="") for row in flash]
    one, many = paged(max_q=1), paged(max_q=1 << 14, tokens=1 << 20, batch=64)
    picks = {select_entry((*flash, *finer), problem, H200).entry.spec.tile.m for problem in (one, many)}
    assert picks == {16, 128}
    steady = Policy(batch_invariant=True)
    assert len({select_entry((*flash, *finer), problem, H200, steady).instance for problem in (one, many)}) == 1


def test_B7_batch_invariance_leaves_out_a_family_that_cuts_sequences_by_their_neighbours() -> None:
    steady = Policy(batch_invariant=True)
    older = Capability.of_sm(75)
    step = paged(dtype="fp16", kv_dtype="fp16")
    assert select_entry(ROWS, step, older).family is Family.MEA_DECODE
    assert select_entry(ROWS, step, older, steady).family is Family.MEA
    text = refusal(paged(), 90, tuple(row for row in ROWS if row.spec.family is Family.MEA_DECODE), steady)
    assert "backend: needs a family that batch invariance leaves in, got mea_decode" in text
    assert "PA_OPS_DISABLE unset, batch invariance on" in text
    assert text.count("pa-ops build") == 4
    assert all(f"'pa_attn_{family}_" in text for family in ("decode", "flash_sm80", "flash_sm90", "mea"))


@pytest.mark.parametrize("sm", [86, 90])
def test_X12_under_batch_invariance_few_rows_choose_a_kernel_and_no_other_size_does(sm: int) -> None:
    steady, capability = Policy(batch_invariant=True), Capability.of_sm(sm)
    sizes = [{}, {"batch": 64, "tokens": 64}, {"batch": 3, "max_q": 1, "max_k": 1 << 17}]
    longer = [{"tokens": 40}, {"batch": 64, "tokens": 1 << 20}, {"max_q": 1 << 14, "max_k": 1 << 14}]
    few, many = (
        {select_entry(ROWS, paged(**size), capability, steady).instance for size in cases}  # type: ignore[arg-type]
        for cases in (sizes, longer)
    )
    assert len(few) == len(many) == 1 and "_decode_" in few.pop() and "_flash_" in many.pop()
    ragged = [replace(paged(**size), op="varlen_attention", layout="", page_size=None) for size in (*sizes, *longer)]
    dense = {select_entry(ROWS, problem, capability, steady).instance for problem in ragged}
    assert len(dense) == 1, "nothing divides such a batch"


GATED = {"head_dim", "head_dim_v", "sm", "smem_bytes", "smem_optin_bytes", "page_size", "num_heads", "num_kv_heads"}
TABLES = {"families.py", "gates.py", "unsupported.py", "capability.py"}


def test_B7_no_numeric_gate_outside_the_table() -> None:
    found = []
    for path in sorted((ROOT / "pa_ops").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare) or path.name in TABLES:
                continue
            names = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node)}
            numbers = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) is int}
            if names & GATED and any(number > 1 for number in numbers):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_B8_every_multiple_of_8_has_the_tightest_row(head_dim: int, dtype: str, tokens: int) -> None:
    sizes = {family: sorted({row.spec.head_dim for row in ROWS if row.spec.family is family}) for family in Family}
    for sm in (80, 86, 90, 100, 121):
        problem = paged(head_dim=head_dim, dtype=dtype, tokens=tokens)
        chosen = select_entry(loaded_by(sm), problem, Capability.of_sm(sm))
        assert chosen.entry.spec.head_dim == next(size for size in sizes[chosen.family] if size >= head_dim)


@pytest.mark.parametrize(("sm", "few"), [(80, "flash_sm80"), (90, "decode"), (100, "decode"), (121, "flash_sm80")])
def test_B9_few_rows_of_a_head_size_without_room_for_their_tiles_go_to_flash(sm: int, few: str) -> None:
    for head_dim, family in ((192, "decode"), (200, few), (256, few)):
        assert select_entry(ROWS, paged(head_dim=head_dim), Capability.of_sm(sm)).family == family


@pytest.mark.parametrize("head_dim", [4, 12, 20, 250])
def test_B8_other_head_sizes_name_the_multiple(head_dim: int) -> None:
    assert f"multiple of 8 up to 256, got {head_dim}" in refusal(paged(head_dim=head_dim), 90)


@pytest.mark.parametrize("head_dim", [264, 512, 520, 1024])
def test_B8_a_head_size_beyond_the_limit_names_it(head_dim: int) -> None:
    """Every family's own limit, of which the largest is 512."""
    named = [Policy(family) for family in attention_families() if GATES[family].head_max < head_dim]
    assert len(named) >= 4
    for policy in (*named, *([Policy()] if head_dim > 512 else [])):
        text = refusal(paged(head_dim=head_dim), 90, policy=policy)
        assert f"NO  head size: needs a multiple of 8 up to 256, got {head_dim}" in text
        assert f"up to 256, got 128 (K) and {head_dim} (V)" in refusal(paged(head_dim_v=head_dim), 90, policy=policy)


@pytest.mark.parametrize("sm", MODELS)
@pytest.mark.parametrize("head_dim", range(264, 513, 8))
def test_B8_B9_head_sizes_up_to_512_are_mea_s_wherever_its_tiles_have_room(sm: int, head_dim: int) -> None:
    capability = Capability.of_sm(sm)
    if sm < 53 or sm // 10 == 11:
        assert refusal(paged(head_dim=head_dim, dtype="fp16"), sm)
        return
    for tokens in (1, 512):
        problem = paged(head_dim=head_dim, dtype="fp16", tokens=tokens)
        entry = select_entry(loaded_by(sm), problem, capability).entry
        assert (entry.spec.family, entry.spec.head_dim) == (Family.MEA, 512)
        assert entry.smem_bytes <= capability.smem_optin_bytes


@pytest.mark.parametrize(
    ("family", "sm"), [("flash_sm90", 90), *product(("flash_sm80", "decode"), (80, 86, 89, 90, 120))]
)
def test_B9_shared_memory_is_a_gate(family: str, sm: int) -> None:
    capability, policy = Capability.of_sm(sm), Policy(family)
    row = select_entry(ROWS, paged(), capability, policy).entry
    just_fits = replace(row, smem_bytes=capability.smem_optin_bytes)
    too_big = replace(row, smem_bytes=capability.smem_optin_bytes + 1)
    assert select_entry([just_fits], paged(), capability).entry == just_fits
    text = refusal(paged(), sm, (too_big,), policy)
    assert f"shared memory: needs {too_big.smem_bytes} B of shared memory a block" in text
    assert f"got {capability.smem_optin_bytes} B" in text
    assert "pa-ops build" not in text


@pytest.mark.parametrize(
    ("page_size", "fits"), [(1, False), (7, False), (8, True), (12, False), (24, True), (256, True)]
)
def test_X1_pages_that_no_box_of_eight_keys_divides_go_to_flash_sm80(page_size: int, fits: bool) -> None:
    chosen = select_entry(ROWS, prefill(page_size=page_size), H200)
    assert chosen.family is (Family.FLASH_SM90 if fits else Family.FLASH_SM80)
    told = [str(reason) for verdict in chosen.reasons for reason in verdict.reasons if reason.gate == "page size"]
    assert set(told) == (set() if fits else {f"page size: needs a multiple of 8, got {page_size}"})
    if not fits:
        text = refusal(prefill(page_size=page_size), 90, policy=Policy("flash_sm90"))
        assert f"NO  page size: needs a multiple of 8, got {page_size}" in text
        assert "pa-ops build" not in text, "no build would help"
    dense = Problem(op="varlen_attention", dtype="bf16", head_dim=128, tokens=512)
    assert select_entry(ROWS, dense, H200).family is Family.FLASH_SM90


@pytest.mark.parametrize("sm", MODELS)
def test_B9_G6_a_row_runs_where_its_code_loads_and_its_block_has_room(sm: int) -> None:
    capability = Capability.of_sm(sm)
    rejected = {row: [reason.gate for reason in device_rejections(row, capability)] for row in ROWS}
    for row, gates in rejected.items():
        assert ("code target" in gates) == set(row.code_targets).isdisjoint(capability.targets)
        assert ("shared memory" in gates) == (row.smem_bytes > capability.smem_optin_bytes)
    loaded = [row for row, gates in rejected.items() if not gates]
    assert bool(loaded) == (sm >= 53 and sm // 10 != 11)


@pytest.mark.parametrize("head_dim", [8, 16, 64])
def test_D3_sizes_cannot_pick_a_kernel_of_the_wrong_layout(head_dim: int) -> None:
    for length in range(1, 65):
        sizes = {"tokens": length, "max_q": length, "max_k": length}
        assert select_entry(ROWS, paged(head_dim=head_dim, **sizes), H200).entry.spec.layout is Layout.GATHER
        dense = Problem(op="varlen_attention", dtype="bf16", head_dim=head_dim, **sizes)
        assert select_entry(ROWS, dense, H200).entry.spec.layout is Layout.DENSE


@pytest.mark.parametrize("sm", [121, 122, 129, 88, 105])
def test_D13_the_newest_and_unknown_sms_of_a_known_major_get_attention(sm: int) -> None:
    for dtype in ("fp16", "bf16"):
        assert select_entry(ROWS, prefill(dtype=dtype), Capability.of_sm(sm)).family is Family.FLASH_SM80
        assert select_entry(ROWS, paged(dtype=dtype), Capability.of_sm(sm)).family is Family.DECODE
    assert "NO  dtype: needs bf16 or fp16, got fp32" in refusal(paged(dtype="fp32"), sm)


def test_D13_an_unknown_major_gets_a_row_that_carries_ptx() -> None:
    row = select_entry(ROWS, paged(), H200).entry
    ahead = Capability.of_sm(140)
    assert "code that sm 140 loads" in refusal(paged(), 140)
    with_ptx = replace(row, code_targets=("sm_90a", "compute_80"))
    assert select_entry([with_ptx], paged(), ahead).entry == with_ptx


def test_native_code_is_preferred() -> None:
    row = select_entry(ROWS, paged(), H200).entry
    generic = replace(row, target="sm_80", code_targets=("sm_80", "compute_80"))
    assert row.target == "sm_90a"
    assert select_entry([generic, row], paged(), H200).entry == row


@pytest.mark.parametrize("head_dim_v", [32, 64, 136])
def test_C10_rows_of_one_head_size_serve_two_only_where_they_say_so(head_dim_v: int) -> None:
    problem = Problem(op="varlen_attention", dtype="fp16", head_dim=128, head_dim_v=head_dim_v)
    assert select_entry(ROWS, problem, H200).family is Family.FLASH_SM90
    assert select_entry(ROWS, problem, H200, Policy("mea")).family is Family.MEA
    text = refusal(problem, 90, policy=Policy("flash_sm80"))
    assert f"NO  equal head sizes: needs one head size for K and V, got 128 (K) and {head_dim_v} (V)" in text


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("op", ["paged_attention", "varlen_attention"])
def test_each_mask_has_its_own_row(op: str, mask: str) -> None:
    options = {"causal": mask == "causal", "window": mask == "window"}
    problem = Problem(op=op, dtype="fp16", head_dim=64, tokens=512, **options)
    spec = select_entry(ROWS, problem, H200).entry.spec
    assert (spec.mask, spec.layout) == (mask, problem.layout)


@pytest.mark.parametrize(("mask", "row"), [("full", "causal"), ("causal", "causal"), ("window", "window")])
def test_a_causal_row_of_few_queries_serves_full_too(mask: str, row: str) -> None:
    problem = paged(causal=mask == "causal", window=mask == "window")
    spec = select_entry(ROWS, problem, H200).entry.spec
    assert (spec.family, spec.mask, spec.layout) == ("decode", row, "gather")


def test_unaligned_tensors_are_refused_by_attention_and_taken_by_helpers() -> None:
    assert "NO  alignment: needs pointers and strides in multiples of 16 bytes" in refusal(paged(aligned=False), 90)
    append = Problem(op="append_kv", dtype="bf16", head_dim=20, aligned=False)
    assert select_entry(ROWS, append, H200).family is Family.APPEND


def test_a_quantised_cache_is_refused_not_dropped() -> None:
    text = refusal(paged(kv_dtype="e4m3fn"), 90)
    assert "NO  cache dtype: needs the query's type bf16, got e4m3fn" in text


def test_G4_helpers_never_answer_attention_and_the_other_way_round() -> None:
    for op, dtype in product(("paged_attention", "varlen_attention", "append_kv", "merge_states"), ("fp16", "bf16")):
        problem = Problem(op=op, dtype=dtype, head_dim=64)
        for verdict in verdicts(ROWS, problem, H200):
            if verdict.entry.spec.op is not problem.kernel_op:
                assert [reason.gate for reason in verdict.reasons] == ["operator"]
    assert {GATES[family].op for family in attention_families()} == {KernelOp.ATTN}


@settings(deadline=None, max_examples=40)
@given(problems(), SMS)
def test_G8_explain_prints_every_row_with_its_reasons(problem: Problem, sm: int) -> None:
    capability = Capability.of_sm(sm)
    text = explain_text(ROWS, problem, capability)
    lines = text.splitlines()
    told = {line.partition("]: ")[0]: line for line in lines if line.startswith("  pa_")}
    for verdict in verdicts(ROWS, problem, capability):
        line = told.pop(f"  {verdict.entry.name} [{verdict.entry.target}")
        assert all(str(reason) in line for reason in verdict.reasons)
        assert ("eligible" in line) == verdict.eligible
    assert not told
    assert sum("<- selected" in line for line in lines) == (1 if "selected: " in text else 0)


def test_G8_the_selection_keeps_the_reasons_that_a_row_has_alone() -> None:
    chosen = select_entry(ROWS, paged(), H200)
    assert len(chosen.reasons) == len(ROWS)
    for verdict in chosen.reasons:
        assert verdicts([verdict.entry], paged(), H200) == (verdict,)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_C18_a_family_without_rows_of_a_mask_does_not_serve_it_and_says_why(mask: str) -> None:
    problem = prefill(causal=mask != "full", window=mask == "window")
    rows = [row for row in ROWS if row.target == "sm_90a"]
    flash = [row for row in rows if row.spec.family.startswith("flash") and row.spec.layout is Layout.GATHER]
    left = [row for row in rows if row not in flash or problem.mask not in GATES[row.spec.family].masks[row.spec.mask]]
    assert select_entry(rows, problem, H200).family.startswith("flash") and len(left) < len(rows)
    chosen = select_entry(left, problem, H200)
    assert chosen.family in (Family.DECODE, Family.MEA, Family.MEA_DECODE)
    refused = [verdict for verdict in chosen.reasons if verdict.entry in flash]
    assert refused and all("row mask" in {reason.gate for reason in verdict.reasons} for verdict in refused)


CELLS = list(product(("fp16", "bf16", "fp32"), (1, 4), ("full", "causal", "window"), (False, True), (False, True)))


@pytest.mark.parametrize("sm", MODELS)
def test_C19_every_cell_has_a_row_or_is_declared_unsupported(sm: int) -> None:
    capability = Capability.of_sm(sm)
    rows = loaded_by(sm)
    for op, (dtype, group, mask, split, extras) in product(("paged_attention", "varlen_attention"), CELLS):
        problem = Problem(
            op=op, dtype=dtype, head_dim=128, head_dim_v=64 if split else 128, num_heads=2 * group, num_kv_heads=2,
            causal=mask != "full", window=mask == "window", softcap=extras, sinks=extras,
            page_size=16 if op == "paged_attention" else None, tokens=500, max_k=1000,
        )  # fmt: skip
        served = any(verdict.eligible for verdict in verdicts(rows, problem, capability))
        assert served == (unsupported(problem, capability) is None), f"{problem} on sm {sm}"


@pytest.mark.parametrize("option", ["softcap", "sinks"])
def test_X7_an_option_that_no_family_honours_raises(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in attention_families():
        monkeypatch.setitem(GATES, family, replace(GATES[family], **{option: False}))
    assert f"NO  {option}: needs off, got on" in refusal(paged(**{option: True}), 90)
    assert select_entry(ROWS, paged(), H200).entry
