"""What sizes decide: which family is preferred, and how a paged batch is divided between two."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from core_rows import declared_rows
from hypothesis import given
from hypothesis import strategies as st

from pa_ops.capability import Capability
from pa_ops.gates import attention_families
from pa_ops.generator.matrix import declared
from pa_ops.heuristics import (
    DECODE_ROWS,
    FOR_FEW_ROWS,
    FOR_MANY_ROWS,
    MIXED_TOKENS,
    SPLITTING,
    Division,
    division,
    extremes,
    runs_beside,
)
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import Policy, select_entry
from pa_ops.spec import Family

ROWS = 16  # of a tile
ONE, BOTH, MANY = Division.DECODE, Division.BOTH, Division.PREFILL


def paged(group: int = 4, **sizes: Any) -> Problem:
    heads = {"num_heads": 2 * group, "num_kv_heads": 2}
    return Problem(op="paged_attention", dtype="bf16", head_dim=128, **heads, **sizes)


@pytest.mark.parametrize(
    ("batch", "tokens", "max_q", "group", "wanted"),
    [
        (1, 1, None, 4, ONE),
        (1, 4, None, 4, ONE),  # 4 tokens of 4 heads fill the tile
        (1, 5, None, 4, MANY),
        (1, 5, 4, 4, MANY),  # one sequence has all tokens, whatever bound is given
        (1, 16, None, 1, ONE),
        (1, 1, None, 16, ONE),
        (1, 1, None, 17, MANY),  # the heads of one token do not fit
        (64, 64, 1, 17, MANY),
        (64, 64, None, 4, ONE),
        (64, 64, 4, 4, ONE),
        (64, 65, None, 4, BOTH),
        (64, 256, 4, 4, ONE),  # speculative decoding with a bound, ...
        (64, 256, 5, 4, BOTH),
        (64, 256, None, 4, BOTH),  # ... and without
        (16, 10, None, 4, ONE),  # no more tokens than sequences: some are empty
        (16, 10, 10, 4, ONE),
        (3, 4, None, 4, ONE),  # so few tokens that no sequence has more
        (3, 5, None, 4, BOTH),
        (8, 8 * MIXED_TOKENS, None, 4, BOTH),
        (8, 8 * MIXED_TOKENS + 1, None, 4, MANY),
        (8, 8 * MIXED_TOKENS + 1, 1 << 15, 4, MANY),
        (0, 0, None, 4, ONE),
    ],
)
def test_how_a_batch_is_divided(batch: int, tokens: int, max_q: int | None, group: int, wanted: Division) -> None:
    assert division(paged(group, batch=batch, tokens=tokens, max_q=max_q), ROWS) is wanted


@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000)), min_size=1, max_size=40),
    slack=st.none() | st.integers(0, 100),
    group=st.integers(1, 40),
    rows=st.sampled_from((16, 32)),
)
def test_one_family_alone_is_sure_of_its_work_or_loses_little(
    lengths: list[int], slack: int | None, group: int, rows: int
) -> None:
    batch, tokens, longest = len(lengths), sum(lengths), max(lengths)
    max_q = None if slack is None else longest + slack
    problem = paged(group, batch=batch, tokens=tokens, max_q=max_q)
    found = division(problem, rows)
    if found is Division.DECODE:
        bounded = max_q is not None and max_q * group <= rows
        assert bounded or tokens <= max(rows // group, batch)
        assert longest * group <= rows or tokens <= batch, "or some sequences are empty"
    else:
        assert found is Division.PREFILL or batch > 1
        assert longest == 0 or tokens * group > rows or group > rows
    if found is Division.PREFILL:
        assert group > rows or batch == 1 or tokens > MIXED_TOKENS * batch
    assert group <= rows or found is Division.PREFILL


@given(tokens=st.integers(1, 1 << 20), group=st.integers(1, 16))
def test_prefill_runs_beside_decode_where_the_work_fits_32_bits(tokens: int, group: int) -> None:
    """Each 5 tokens a sequence of their own, of 2.6 million keys: as many as a plan made for `tokens` may meet."""
    blocks = (2 * tokens - 1) // 5 * group
    if runs_beside(paged(group, batch=9, tokens=tokens), Family.FLASH_SM90):
        assert blocks * (2_600_000 // 64) < 2**31
    else:
        assert 2 * tokens * group >= 1 << 18, "16k tokens of 8 heads are no reason"


def test_prefill_whose_blocks_do_not_take_tiles_runs_after_decode() -> None:
    one = paged(batch=9, tokens=100)
    assert [f for f in FOR_MANY_ROWS if runs_beside(one, f)] == [Family.FLASH_SM90]


def test_every_attention_family_has_its_place_in_both_orders() -> None:
    for order in (FOR_FEW_ROWS, FOR_MANY_ROWS):
        assert sorted(order) == sorted(attention_families())
    assert set(attention_families()) > SPLITTING


@pytest.mark.parametrize(
    ("sm", "disabled", "few", "many"),
    [
        (75, "", "mea_decode", "mea"),
        (90, "flash", "decode", "mea"),
        (90, "flash,decode", "mea_decode", "mea"),
        (75, "mea_decode", "mea", "mea"),
    ],
)
def test_the_families_at_both_extremes_of_a_batch(sm: int, disabled: str, few: str, many: str) -> None:
    problem = replace(paged(batch=5, tokens=300), dtype="fp16", kv_dtype="fp16")
    policy = Policy(disabled=frozenset(disabled.split(",")) if disabled else frozenset())
    rows = declared_rows()
    found = [select_entry(rows, extreme, Capability.of_sm(sm), policy).family for extreme in extremes(problem)]
    assert found == [few, many]


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 16])
def test_selection_prefers_the_family_made_for_the_rows_of_the_longest_sequence(group: int, batch: int) -> None:
    few, bound = DECODE_ROWS // group, 1 << 12
    sizes = [
        ({"tokens": few * batch}, "decode"),
        ({"tokens": few * batch + 1}, "flash_sm90"),
        ({"tokens": bound * batch, "max_q": few}, "decode"),
        ({"tokens": batch, "max_q": few + 1}, "flash_sm90"),
    ]
    for size, family in sizes:
        problem = paged(group, batch=batch, **size)
        assert select_entry(declared_rows(), problem, Capability.of_sm(90)).family == family
        older = family.replace("sm90", "sm80")
        assert select_entry(declared_rows(), problem, Capability.of_sm(80)).family == older
        assert select_entry(declared_rows(), replace(problem, page_size=12), Capability.of_sm(90)).family == older


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"tokens": 16384}, 192),
        ({"tokens": 16384, "batch": 3}, 192),
        ({"tokens": 16384, "batch": 4}, 192),
        ({"tokens": 16384, "batch": 8}, 192),
        ({"tokens": 16384, "batch": 17}, 128),
        ({"tokens": 16384, "batch": 32}, 128),
        ({"tokens": 16384, "batch": 32, "max_q": 2047}, 128),
        ({"tokens": 16384, "batch": 32, "max_q": 2048}, 192),
        ({"tokens": 4096, "batch": 32, "max_q": 128, "max_k": 16384}, 128),  # two thirds of the taller one would do
        ({"tokens": 8192, "batch": 1, "max_q": 8192, "max_k": 2047}, 128),
    ],
)
def test_the_taller_tile_is_for_long_sequences(sizes: dict[str, int], rows: int) -> None:
    problem = Problem(op="varlen_attention", dtype="bf16", head_dim=128, num_heads=32, **sizes)
    assert select_entry(declared_rows(), problem, Capability.of_sm(90)).entry.spec.tile.m == rows
    steady = select_entry(declared_rows(), problem, Capability.of_sm(90), Policy(batch_invariant=True))
    assert steady.entry.spec.tile.m == 128


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ({"tokens": 16384}, 2),
        ({"tokens": 16384, "window": True}, 1),
        ({"tokens": 16384, "batch": 2}, 2),
        ({"tokens": 16384, "batch": 4}, 1),  # an eleventh and last tile of 384 rows would be two thirds empty
        ({"tokens": 16384, "batch": 4, "num_kv_heads": 8}, 2),
        ({"tokens": 16384, "batch": 8, "num_kv_heads": 8}, 2),
        ({"tokens": 16384, "batch": 16, "num_kv_heads": 2}, 1),  # decode may have some of them
        ({"tokens": 8192, "max_q": 8192, "max_k": 2047}, 1),
        ({"tokens": 4096, "batch": 4, "max_q": 4096, "num_kv_heads": 8}, 1),
    ],
)
@pytest.mark.parametrize("op", ["varlen_attention", "paged_attention"])
def test_blocks_share_keys_in_long_sequences(op: str, sizes: dict[str, Any], blocks: int) -> None:
    problem = Problem(op=op, dtype="bf16", head_dim=128, num_heads=32, **sizes)
    for entries in (declared_rows(), tuple(reversed(declared_rows()))):
        assert select_entry(entries, problem, Capability.of_sm(90)).entry.spec.tile.cluster == blocks
    steady = select_entry(declared_rows(), problem, Capability.of_sm(90), Policy(batch_invariant=True))
    assert steady.entry.spec.tile.cluster == 1


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ({"tokens": 16384, "causal": False}, 8),
        ({"tokens": 32768, "batch": 2, "causal": False}, 8),
        ({"tokens": 16383, "causal": False}, 2),
        ({"tokens": 4096, "causal": False, "num_kv_heads": 2}, 8),
        ({"tokens": 16384, "causal": True}, 2),
        ({"tokens": 16384, "batch": 16, "causal": False}, 1),
    ],
)
@pytest.mark.parametrize("op", ["varlen_attention", "paged_attention"])
def test_eight_blocks_share_keys_at_256_where_all_see_the_same(op: str, sizes: dict[str, Any], blocks: int) -> None:
    problem = Problem(op=op, dtype="bf16", head_dim=256, num_heads=8, **sizes)
    for entries in (declared_rows(), tuple(reversed(declared_rows()))):
        assert select_entry(entries, problem, Capability.of_sm(90)).entry.spec.tile.cluster == blocks


def test_none_shares_keys_beside_decode() -> None:
    """There blocks start one by one, when decode's leave their SMs: a cluster would wait for two beside each other."""
    for tokens, batch, max_q in product((64, 1 << 10, 1 << 12, 1 << 16), (1, 2, 16, 64), (None, 4096)):
        sizes = {"tokens": tokens, "batch": batch, "max_q": max_q}
        problem = Problem(op="paged_attention", dtype="bf16", head_dim=128, num_heads=32, num_kv_heads=8, **sizes)
        if division(problem, DECODE_ROWS) is Division.BOTH:
            many = select_entry(declared_rows(), problem, Capability.of_sm(90), Policy("flash_sm90"))
            assert many.entry.spec.tile.cluster == 1, sizes


@pytest.mark.parametrize(
    ("tokens", "group", "rows"), [(512, 1, 128), (512, 2, 192), (512, 4, 192), (512, 3, 128), (10, 4, 128)]
)
@pytest.mark.parametrize("window", [False, True])
def test_the_taller_tile_is_for_heads_side_by_side(tokens: int, group: int, rows: int, window: bool) -> None:
    heads: dict[str, Any] = {"num_heads": 24, "num_kv_heads": 24 // group, "window": window}
    problem = Problem(op="varlen_attention", dtype="bf16", head_dim=128, tokens=32 * tokens, batch=32, **heads)
    assert select_entry(declared_rows(), problem, Capability.of_sm(90)).entry.spec.tile.m == rows


def test_the_keys_of_a_cache_are_likely_more_than_new_tokens() -> None:
    sizes = {"tokens": 8192, "batch": 8}
    found = {
        op: select_entry(
            declared_rows(),
            Problem(op=op, dtype="bf16", head_dim=128, num_heads=32, **sizes),
            Capability.of_sm(90),
            Policy(backend="flash_sm90"),
        ).entry.spec.tile.m
        for op in ("varlen_attention", "paged_attention")
    }
    assert found == {"varlen_attention": 128, "paged_attention": 192}


@pytest.mark.parametrize("tokens", [1, 16, 500])
@pytest.mark.parametrize("family", ["mea", "mea_decode"])
def test_code_of_the_device_s_own_target_comes_before_ptx(family: str, tokens: int) -> None:
    """Whatever tile the older target was given: a smaller one is not better here for having fewer rows to pad."""
    older = [Entry.declared(spec, "compute_75") for spec in declared("full", ("compute_75",))]
    for head_dim in (64, 128, 256, 512):
        paged = Problem(op="paged_attention", dtype="fp16", head_dim=head_dim, page_size=16, tokens=tokens)
        if family == "mea_decode" and head_dim > 256:
            continue
        for rows in ([*older, *declared_rows()], [*declared_rows(), *older]):
            chosen = select_entry(rows, paged, Capability.of_sm(90), Policy(backend=family))
            assert chosen.entry.target == "sm_90a", (head_dim, chosen.instance)
