"""The path of a CUDA call with everything real but the GPU: CPU tensors, a product on disk, and a kernel that notes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pa_ops
from helpers.cuda_calls import batch, call, int32
from helpers.launches import SM90, Launches, write_product
from pa_ops import Capability, InvalidArgument, NoInstance, cuda, heuristics, registry, trace
from pa_ops.arguments import CHUNK_KEYS, CONSTANT_BASE, MAP_ALIGNMENT, MAP_BYTES, RECORDS, STATES_A_BLOCK, UNCUT
from pa_ops.checks import INT32_MAX
from pa_ops.generator import tiles
from pa_ops.launch import CUT_BESIDE, CUT_ROUNDS, factor_of
from pa_ops.launch_rows import FILLING_BLOCKS
from pa_ops.portions import whole
from pa_ops.scratch import MAX_POST_WORDS, MAX_STATE_WORDS, blocks_of, tickets_at
from pa_ops.spec import Family, InstanceSpec


def paged(new: int = 3, dim: int = 64, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """One sequence: with up to 4 new tokens its 4 query heads a KV head fill no tile of 16 rows, which is decode's."""
    return batch(new, dim=dim, dtype=dtype)


@pytest.mark.parametrize(
    ("new", "backend", "family", "grid"),
    [
        (3, "auto", "decode", (2 * SM90.num_sms, 1)),
        (40, "auto", "flash_sm90", (SM90.num_sms, 1)),
        (40, "flash_sm80", "flash_sm80", (8, 1)),  # of a tile each, all in turn
    ],
)
def test_one_call_is_one_launch_and_one_record(
    launches: Launches, new: int, backend: str, family: str, grid: tuple[int, int]
) -> None:
    with trace.recording() as decisions:
        out, lse = call("paged_attention", *paged(new), backend=backend)
    assert out.shape == (new, 8, 64) and out.dtype == torch.float16
    assert lse.shape == (8, new) and lse.dtype == torch.float32
    [made] = launches
    assert made.symbol.startswith(f"pa_attn_{family}_fp16_kvfp16_d64v64_gather_causal_m")
    assert (made.fields["out"], made.fields["lse"]) == (out.data_ptr(), lse.data_ptr())
    assert ((made.x, made.y), made.fields["tokens"], made.fields["group"]) == (grid, new, 4)
    [decision] = decisions
    assert (decision.op, decision.family, decision.instance) == ("paged_attention", family, made.symbol)
    assert any("row mask" in reason for reason in decision.reasons) and trace.last() == decision


@pytest.mark.parametrize("head_dim", [128, 160, 256, 512])
def test_B17_no_accumulator_leaves_the_registers(launches: Launches, head_dim: int) -> None:
    """A block of mea has no address to put one: its record has nothing beside inputs, outputs and lse."""
    rows = torch.zeros(40, 8, head_dim).half()
    _, _, _, cu_seqlens, lengths, table = batch(40)
    caches = torch.zeros(2, 4, 16, 2, head_dim).half()
    call("paged_attention", rows, *caches, cu_seqlens, lengths, table, backend="mea")
    call("varlen_attention", rows, rows[:, :2], rows[:, :2], cu_seqlens, cu_seqlens, backend="mea")
    start, end = launches.workspace.data_ptr(), launches.workspace.data_ptr() + 4 * launches.workspace.numel()
    for made in launches:
        assert made.family is Family.MEA and {"partials", "counters"}.isdisjoint(made.fields)
        addresses = {made.fields[name] for name in RECORDS[Family.MEA].addresses}
        assert not any(start <= address < end for address in addresses)


@pytest.mark.parametrize(
    ("options", "many", "few"),
    [
        ({}, "gather_causal", ("gather_causal", 1)),
        ({"causal": False}, "gather_full", ("gather_causal", 0)),
        ({"sliding_window": 9, "causal": False}, "gather_window", ("gather_window", 1)),
    ],
)
def test_the_mask_decides_the_instance(
    launches: Launches, options: dict[str, Any], many: str, few: tuple[str, int]
) -> None:
    for new in (40, 3):
        call("paged_attention", *paged(new), **options)
    assert launches.families == ["flash_sm90", "decode"]
    words, causal = few
    assert many in launches[0].symbol and words in launches[1].symbol
    assert launches[1].fields["causal"] == causal, "a causal row of few queries serves full by a flag"


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 104, 136, 200, 256])
def test_head_sizes_go_to_the_smallest_instance_that_holds_them(launches: Launches, dim: int) -> None:
    asked = {"flash_sm90": (40, "auto"), "flash_sm80": (40, "flash_sm80"), "decode": (3, "auto")}
    for new, backend in asked.values():
        call("paged_attention", *paged(new, dim=dim, dtype=torch.bfloat16), backend=backend)
    tables = (tiles.FLASH_SM90_TILES, tiles.FLASH_SM80_TILES, tiles.DECODE_TILES)
    for made, family, table in zip(launches, asked, tables, strict=True):
        held = min(size for size in table if size >= dim)
        assert made.family == family and f"_bf16_kvbf16_d{held}v{held}_" in made.symbol
        assert made.fields["head_dim_v" if made.maps else "head_dim"] == dim


def test_a_plan_is_made_once_for_a_decode_loop(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    validate = cuda.validate

    def counting(op: str, arguments: dict[str, Any]) -> dict[str, int]:
        made.append(op)
        return validate(op, arguments)

    monkeypatch.setattr(cuda, "validate", counting)
    for length in range(1000, 1020):
        call("paged_attention", *batch(*[1] * (4 + length % 3)), max_seqlen_q=1, max_seqlen_k=length)
    assert len(launches) == 20 and made == ["paged_attention"], "lengths and tokens within a power of two are one kind"
    call("paged_attention", *batch(1, 1, 1, 1), max_seqlen_q=1, max_seqlen_k=1024)
    call("paged_attention", *batch(1, 1, 1, 1))
    call("paged_attention", *batch(1, 1, 1, 1, dim=72), max_seqlen_q=1, max_seqlen_k=1000)
    assert launches.families == ["decode"] * 23 and len(made) == 4


def test_a_hit_is_checked_as_a_miss_is(launches: Launches) -> None:
    """Whatever a check may refuse is part of the key."""
    good = paged()
    call("paged_attention", *good, softcap=1.0)
    names = ("q", "k_cache", "v_cache", "cu_seqlens_q", "seqlens_k", "block_table")
    for place, name in enumerate(names):
        bad = list(good)
        bad[place] = bad[place].double()
        with pytest.raises(InvalidArgument, match=f"^{name}: dtype"):
            call("paged_attention", *bad, softcap=1.0)
        bad[place] = good[place].unsqueeze(0)
        with pytest.raises(InvalidArgument, match=f"^{name}: must have"):
            call("paged_attention", *bad, softcap=1.0)
        bad[place] = good[place].to("meta")
        with pytest.raises(InvalidArgument, match="device"):
            call("paged_attention", *bad, softcap=1.0)
    for options in ({"softcap": -1.0}, {"max_seqlen_k": -1}, {"softmax_scale": 0.0}, {"sinks": torch.zeros(2)}):
        with pytest.raises(InvalidArgument):
            call("paged_attention", *good, **options)
    good[0].requires_grad_()
    with pytest.raises(InvalidArgument, match=r"^q: must not require grad"):
        call("paged_attention", *good, softcap=1.0)
    assert len(launches) == 1


def test_the_out_variant_writes_into_the_callers_buffers(launches: Launches) -> None:
    out, lse = torch.zeros(3, 8, 64).half(), torch.zeros(8, 3)
    assert call("paged_attention.out", *paged(), out=out, lse=lse) is None
    call("paged_attention.out", *paged(), out=out)
    with_lse, without = (made.fields for made in launches)
    assert with_lse["out"] == without["out"] == out.data_ptr()
    assert with_lse["lse"] == lse.data_ptr() and without["lse"] == 0


def test_varlen_append_and_merge_reach_their_kernels(launches: Launches) -> None:
    q, k, v = torch.zeros(3, 8, 64).half(), torch.zeros(9, 2, 64).half(), torch.zeros(9, 2, 64).half()
    call("varlen_attention", q, k, v, int32(0, 3), int32(0, 9))
    call("varlen_attention.out", q, k, v, int32(0, 3), int32(0, 9), out=torch.zeros_like(q), causal=False)
    k_cache, v_cache = torch.zeros(2, 4, 16, 2, 64).half()
    call("append_kv", k, v, k_cache, v_cache, torch.arange(9))
    call("merge_states", q, torch.zeros(8, 3), q, torch.zeros(8, 3))
    call("gather_kv", k_cache, v_cache, int32(3, 1).reshape(1, 2), int32(0, 9), k, v)
    symbols = [made.symbol for made in launches]
    assert "dense_causal" in symbols[0] and "dense_full" in symbols[1]
    assert symbols[2].startswith("pa_append_kv_append_fp16") and symbols[3].startswith("pa_merge_states_merge_fp16")
    gather = launches[4]
    assert gather.symbol.startswith("pa_gather_kv_gather_fp16") and (gather.x, gather.y) == (9, 1)
    assert gather.fields["k"] == k.data_ptr() and gather.fields["k_page_stride"] == 16 * 2 * 64 * 2
    assert [gather.fields[name] for name in ("tokens", "sequences", "max_pages", "num_pages")] == [9, 1, 2, 4]


def test_B20_the_grid_of_a_helper_is_capped_and_its_blocks_stride(launches: Launches) -> None:
    """Every token of 2^17 is some block's: a block takes every 65535th (templates/device/gather.cuh, append.cuh)."""
    rows = torch.zeros(1, 1, 8).half().expand(1 << 17, 1, 8).contiguous()
    k_cache, v_cache = torch.zeros(2, 1, 16, 1, 8).half()
    call("append_kv", rows, rows, k_cache, v_cache, torch.zeros(1 << 17, dtype=torch.int64))
    call("gather_kv", k_cache, v_cache, int32(0).reshape(1, 1), int32(0, 16), rows, rows.clone())
    assert [(made.x, made.y, made.fields["tokens"]) for made in launches] == [(65535, 1, 1 << 17)] * 2


def serving_call(*news: int, rotary: bool, packed: bool = True, **options: Any) -> tuple[dict[str, Any], Tensor]:
    """One call of the serving operator: new tokens after 17, 8 / 2 heads of 64; its arguments and its output."""
    _, k_cache, v_cache, cu_seqlens, lengths, table = batch(*news)
    rows = torch.zeros(sum(news), 12 * 64).half()
    query, key, value = (rows, None, None) if packed else rows.split((8 * 64, 2 * 64, 2 * 64), 1)
    if rotary:
        options.update(cos=torch.zeros(32, 16), sin=torch.zeros(32, 16))
    tensors = (query, key, value, k_cache, v_cache, cu_seqlens, torch.full_like(lengths, 17), table)
    out = call("paged_attention_", *tensors, num_heads=8, num_kv_heads=2, **options)
    names = ("query", "key", "value", "k_cache", "v_cache", "cu_seqlens_q", "past_lens", "block_table")
    return dict(zip(names, tensors, strict=True)), out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize(
    ("new", "backend", "family"),
    [(3, "auto", "decode"), (40, "auto", "flash_sm90"), (40, "flash_sm80", "flash_sm80")],
)
def test_A12_a_serving_call_is_two_launches_on_one_set_of_buffers(
    launches: Launches, rotary: bool, packed: bool, new: int, backend: str, family: str
) -> None:
    tensors, out = serving_call(new, rotary=rotary, packed=packed, backend=backend)
    stored, attended = launches
    assert attended.family == family
    append, attend = stored.fields, attended.fields
    start = tensors["query"].data_ptr()
    assert append["key"] == start + 8 * 64 * 2 and append["value"] == start + 10 * 64 * 2 and stored.x == new
    assert append["query"] == (start if rotary else 0) and append["query_out"] == (out.data_ptr() if rotary else 0)
    read = (out.data_ptr(), 8 * 64 * 2) if rotary else (start, 12 * 64 * 2)
    assert attended.queries == read and attend["out"] == out.data_ptr()
    assert attend["kv_lengths"] == append["past_lens"] == tensors["past_lens"].data_ptr()
    assert attend["past_lengths"] == 1 and attend["lse"] == 0 and append["rotary_dim"] == (32 if rotary else 0)
    assert "gather_causal" in attended.symbol and append["aligned"] == 1


@pytest.mark.parametrize("news", [[1024] * 64, [1024] + [1] * 63, [10] + [0] * 15, [1] * 300])
def test_A11_blocks_that_rotate_follow_the_tokens(launches: Launches, news: list[int]) -> None:
    """Not sequences times the longest that the total would allow: 64 * 65473 for the first batch."""
    serving_call(*news, rotary=True)
    tokens, append = sum(news), launches[0]
    assert append.x == min(tokens, 65535)
    assert append.x * append.y <= max(tokens, FILLING_BLOCKS)


def test_X3_slots_replace_the_block_table(launches: Launches) -> None:
    slots = torch.arange(3)
    serving_call(3, rotary=False, slot_mapping=slots)
    assert launches[0].fields["slots"] == slots.data_ptr()


def test_a_decode_step_is_append_and_decode(launches: Launches) -> None:
    serving_call(1, 1, 1, 1, 1, rotary=True)
    assert launches.families == ["append", "decode"]
    made, start = launches[1], launches.workspace.data_ptr()
    blocks, fields = blocks_of(SM90.num_sms), made.fields
    states = STATES_A_BLOCK * blocks * MAX_STATE_WORDS
    assert (made.x, made.y) == (blocks, 1)
    assert (fields["partials"], fields["kv_heads"], fields["causal"]) == (start, 2, 1)
    posts = blocks * MAX_POST_WORDS
    assert fields["posts"] == start + states * 4, "states come first"
    assert fields["counters"] == fields["posts"] + posts * 4
    factors = fields["page_factor"], fields["group_factor"]
    assert factors == (factor_of(made.fields["page_size"]), factor_of(made.fields["group"]))
    assert fields["counters"] + 4 * blocks == fields["tickets"] == start + tickets_at(SM90.num_sms)
    assert made.serves(1) and made.serves(INT32_MAX), "decode alone takes whatever comes"


@pytest.mark.parametrize(("news", "family"), [((1, 1), "flash_sm90"), ((1, 1, 40, 1), "flash_sm80")])
def test_families_that_do_not_split_share_nothing_out(
    news: tuple[int, ...], family: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As times of a card may rank them: the best for few query rows and for many are two, and neither is decode."""
    for name, first in (("FOR_FEW_ROWS", Family.FLASH_SM90), ("FOR_MANY_ROWS", Family.FLASH_SM80)):
        monkeypatch.setattr(heuristics, name, tuple(dict.fromkeys((first, *getattr(heuristics, name)))))
    serving_call(*news, rotary=True)
    assert launches.families == ["append", family]


@pytest.mark.parametrize("family", ["flash_sm80", "flash_sm90"])
def test_a_mixed_batch_is_append_and_two_launches_that_share_it(
    launches: Launches, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PA_OPS_DISABLE", "flash_sm90" if family == "flash_sm80" else "flash_sm80")
    serving_call(1, 1, 40, 1, rotary=True)
    assert launches.families == ["append", "decode", family]
    _, few, many = (made.fields for made in launches)
    assert few["skip_above"] == many["skip_up_to"] == 16 // 4
    shared = many.keys() & few.keys()
    maps = launches[2].maps
    differ = {"tickets"} if maps else set()  # they run at the same time
    assert {name for name in shared if many[name] != few[name]} == differ, "all else is one call's"
    own = {"box_rows", "boxes", "beside", "pack_bits", "part_counters", "cut_rounds", "head_dim_v"} if maps else set()
    own |= whole(1).fields().keys() if maps else {"section_bits"}
    assert many.keys() - shared == {"heads", "skip_up_to"} | own
    assert few["most_given"] == (SM90.num_sms // 4 if maps else 0) and many.get("beside", 0) == bool(maps)
    assert few["chunk_bits"] == UNCUT, "decode leaves no state where parts of tiles may"
    for letter, found in zip("qkv", maps.values(), strict=False):
        steps = ("head", "token", "page") if letter == "q" else ("token", "head", "page")
        strides = [few.get(f"{letter}_{step}_stride", 16) for step in steps]
        assert found.address == few[letter] and [*found.strides] == strides, "and so are rows in memory"


def test_X12_the_last_tiles_are_cut_but_under_batch_invariance(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside decode only where there are few, and nothing of a sequence where its bits must be its own."""
    monkeypatch.setenv("PA_OPS_DISABLE", "flash_sm80")
    call("paged_attention", *batch(40), backend="flash_sm90")
    call("paged_attention", *batch(1, 1, 40, 1))
    with pa_ops.batch_invariant():
        call("paged_attention", *batch(40), backend="flash_sm90")
        call("paged_attention", *batch(1, 1, 40, 1))
    found = [made.fields["cut_rounds"] for made in launches if made.maps]
    assert found == [CUT_ROUNDS, CUT_BESIDE, 0, 0] and CUT_ROUNDS > CUT_BESIDE > 0


@pytest.mark.parametrize("news", [(1, 1, 1, 1), (1, 1, 40, 1), (40,), (3,)])
@pytest.mark.parametrize("backend", ["flash_sm80", "flash_sm90", "flash", "decode"])
def test_a_forced_family_takes_every_sequence_in_one_launch(
    launches: Launches, news: tuple[int, ...], backend: str
) -> None:
    call("paged_attention", *batch(*news), backend=backend)
    [made] = launches
    assert made.family.startswith(backend) and all(map(made.serves, (1, *news, INT32_MAX)))


@pytest.mark.parametrize("bound", [None, 3, 40, 5000])
@pytest.mark.parametrize("news", [(1, 1, 1, 1), (1, 1, 40, 1), (40,), (4,), (5,), (1,), (0, 0, 2), (4000, 3000)])
def test_X12_under_batch_invariance_a_sequence_has_the_kernel_of_its_own_rows(
    launches: Launches, news: tuple[int, ...], bound: int | None
) -> None:
    """Four heads a group: up to four new tokens are decode's, in whatever batch, also in one that meets its plan."""
    with pa_ops.batch_invariant():
        call("paged_attention", *batch(*news), max_seqlen_q=None if bound is None else max(bound, *news, 0))
    made = {launch.family: launch for launch in launches}
    assert set(made) <= {"decode", "flash_sm90"}
    kind = [
        new for new in range(1, 2 * sum(news)) if bound is None or new.bit_length() <= max(bound, *news).bit_length()
    ]
    for new in kind:
        assert [family for family, launch in made.items() if launch.serves(new)] == [
            "decode" if new <= 4 else "flash_sm90"
        ]


@pytest.mark.parametrize("news", [(1, 1, 1, 1), (1, 1, 40, 1), (40,)])
@pytest.mark.parametrize("backend", ["flash_sm80", "decode"])
def test_batch_invariance_leaves_a_forced_family_alone(launches: Launches, news: tuple[int, ...], backend: str) -> None:
    with pa_ops.batch_invariant():
        call("paged_attention", *batch(*news), backend=backend)
    assert launches.families == [backend]
    assert all(launches[0].serves(new) for new in (1, *news, INT32_MAX))


def test_X12_chunks_are_cut_where_batch_invariance_asks(launches: Launches) -> None:
    call("paged_attention", *batch(1, 1))
    with pa_ops.batch_invariant():
        call("paged_attention", *batch(1, 1), max_seqlen_q=1)
    plain, steady = (made.fields["chunk_bits"] for made in launches)
    tile = InstanceSpec.parse(launches[1].symbol).tile
    assert plain == UNCUT and tile.n << steady == CHUNK_KEYS


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    news=st.lists(st.one_of(st.just(1), st.integers(0, 9), st.integers(10, 200)), min_size=1, max_size=12),
    later=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    group=st.sampled_from((1, 2, 3, 5, 8, 16, 17, 40)),
    bound=st.sampled_from((None, 0, 3, 1000)),
    backend=st.sampled_from(("auto", "flash", "flash_sm80", "decode")),
    steady=st.booleans(),
)
def test_every_sequence_is_served_by_exactly_one_launch(
    launches: Launches,
    news: list[int],
    later: list[int],
    group: int,
    bound: int | None,
    backend: str,
    steady: bool,
) -> None:
    """Also those of a later batch that hits the plan of an earlier one."""
    for lengths in (news, later):
        launches.clear()
        slack = None if bound is None else max(lengths) + bound
        with pa_ops.batch_invariant(steady):
            call("paged_attention", *batch(*lengths, heads=2 * group), max_seqlen_q=slack, backend=backend)
        assert len(launches) <= (2 if backend == "auto" else 1)
        assert all(sum(made.serves(new) for made in launches) == 1 for new in lengths if new)


def test_records_have_no_padding_and_pack_what_they_unpack() -> None:
    for family, record in RECORDS.items():
        values = {name: number for number, (name, _) in enumerate(record.fields)}
        data = record.pack(values)
        assert len(data) == record.size and record.unpack(data) == values, family
        assert list(record.offsets) == [*values, *record.maps]
        end = record.offsets[[*values][-1]] + 4
        padding = -(CONSTANT_BASE + end) % MAP_ALIGNMENT if record.maps else 0
        places = [end + padding + number * MAP_BYTES for number in range(len(record.maps) + 1)]
        assert [record.offsets[name] for name in record.maps] == places[:-1] and record.size == places[-1]
        assert not any(data[end:]), "the host writes the maps"
        with pytest.raises(ValueError, match="surplus"):
            record.pack({**values, "surplus": 1})
        with pytest.raises(ValueError, match=record.addresses[0]):
            record.pack({name: value for name, value in values.items() if name != record.addresses[0]})


@pytest.mark.parametrize("sequences", [0, 1])
def test_B23_nothing_is_launched_for_nothing(launches: Launches, sequences: int) -> None:
    q, k_cache, v_cache, *_ = paged(0)
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
    lengths, table = torch.full((sequences,), 20).int(), torch.zeros(sequences, 2).int()
    with trace.recording() as decisions:
        out, lse = call("paged_attention", q, k_cache, v_cache, cu_seqlens, lengths, table)
        call("varlen_attention", q, k_cache[0], v_cache[0], cu_seqlens, cu_seqlens)
        call("append_kv", q[:, :2], q[:, :2], k_cache, v_cache, torch.zeros(0, dtype=torch.int64))
        call("merge_states", q, lse, q, lse)
    assert out.shape == (0, 8, 64) and lse.shape == (8, 0) and not launches and not decisions


def test_what_no_kernel_serves_is_refused_and_never_dropped(launches: Launches) -> None:
    q, k_cache, v_cache, *where = paged()
    refused: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((q, k_cache, v_cache, *where), {"k_scale": torch.ones(1)}, "k_scale"),
        ((q, *(c.to(torch.float8_e4m3fn) for c in (k_cache, v_cache)), *where), {}, "e4m3fn"),
        ((q[:, :, :20], k_cache[..., :20], v_cache[..., :20], *where), {}, "multiple of 8"),
        (paged(dim=520), {}, "up to 512, got 520"),
        ((q, k_cache, v_cache[..., :32], *where), {"backend": "flash_sm80"}, "64 (K) and 32 (V)"),
        ((torch.zeros(3 * 8 * 64 + 1).half()[1:].view(3, 8, 64), k_cache, v_cache, *where), {}, "16 bytes"),
        ((q, torch.zeros(4, 16, 2, 65).half()[..., :64], v_cache, *where), {}, "16 bytes"),
    ]
    for tensors, options, words in refused:
        with pytest.raises(NoInstance) as caught:
            call("paged_attention", *tensors, **options)
        assert words in str(caught.value)
    with pytest.raises(NoInstance, match="v_scale"):
        call("append_kv", k_cache[0], v_cache[0], k_cache, v_cache, torch.arange(16), v_scale=torch.ones(1))
    assert not launches


def test_B4_overrides_reach_the_selection(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = paged()
    call("paged_attention", *tensors, backend="flash_sm80")
    with pa_ops.backend("flash"):
        call("paged_attention", *tensors)
    monkeypatch.setenv("PA_OPS_BACKEND", "flash_sm80")
    call("paged_attention", *tensors)
    assert len(launches) == 3
    with pytest.raises(NoInstance, match=r"lean \(backend=\)"):
        call("paged_attention", *tensors, backend="lean")
    with pa_ops.backend("lean"), pytest.raises(NoInstance, match=r"pa_ops.backend\(\)"):
        call("paged_attention", *tensors)
    monkeypatch.setenv("PA_OPS_BACKEND", "lean")
    with pytest.raises(NoInstance, match=r"lean \(PA_OPS_BACKEND\)"):
        call("paged_attention", *tensors)
    monkeypatch.delenv("PA_OPS_BACKEND")
    monkeypatch.setenv("PA_OPS_DISABLE", "flash,decode,mea")
    with pytest.raises(NoInstance, match="PA_OPS_DISABLE=flash"):
        call("paged_attention", *tensors)
    assert launches.families == ["flash_sm80", "flash_sm90", "flash_sm80"]
    cases = (
        ("flash", "mea", 40),
        ("flash", "decode", 3),
        ("flash,mea", "decode", 40),
        ("decode", "flash_sm90", 3),
        ("decode,flash_sm90", "flash_sm80", 3),
        ("flash,decode", "mea_decode", 3),
        ("flash,decode", "mea", 40),
    )
    for disabled, left, new in cases:
        monkeypatch.setenv("PA_OPS_DISABLE", disabled)
        call("paged_attention", *paged(new))
        assert launches[-1].family == left and launches[-1].serves(new)
    monkeypatch.delenv("PA_OPS_DISABLE")
    for new, family in ((3, "mea_decode"), (40, "mea")):
        call("paged_attention", *paged(new), backend="mea")
        assert launches[-1].family == family and launches[-1].serves(new)
    with pa_ops.batch_invariant():
        call("paged_attention", *tensors, max_seqlen_q=3)
    assert launches[-1].family == "decode" and len(launches) == 13
    words = "backend: needs a family that batch invariance leaves in, got mea_decode"
    with pa_ops.batch_invariant(), pytest.raises(NoInstance, match=words):
        call("paged_attention", *tensors, backend="mea_decode")


def test_B27_the_reference_runs_on_cuda_tensors_when_asked_by_name(launches: Launches) -> None:
    tensors = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in paged())
    want = pa_ops.reference.paged_attention(*tensors, softcap=2.0)
    with trace.recording() as decisions:
        got = call("paged_attention", *tensors, softcap=2.0, backend="reference")
        out = torch.empty_like(got[0])
        with pa_ops.backend("reference"):
            call("paged_attention.out", *tensors, softcap=2.0, out=out)
    assert all(map(torch.equal, got, want)) and torch.equal(out, want[0])
    assert [d.family for d in decisions] == ["reference"] * 2 and not launches
    assert "reference" not in pa_ops.families()


def test_B24_checked_mode_looks_at_values_on_every_call(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k_cache, v_cache, cu_seqlens_q, lengths, table = paged()
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    call("paged_attention", q, k_cache, v_cache, cu_seqlens_q, lengths, table)
    with pytest.raises(InvalidArgument, match="sequence 0"):
        call("paged_attention", q, k_cache, v_cache, cu_seqlens_q, lengths + 13, table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call("paged_attention", q, k_cache, v_cache, cu_seqlens_q, lengths + 13, table)
    assert len(launches) == 2


def test_a_library_that_is_not_the_manifests_is_not_loaded(
    launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    write_product(other, library=b"another library")
    monkeypatch.setenv("PA_OPS_HOME", str(other))
    rule = r"libpa_ops.so: must be the library .*PA_OPS_NO_JIT=1 .*pa-ops build --arch sm_90a; got sha256 \w{64}"
    with pytest.raises(InvalidArgument, match=rule):
        call("paged_attention", *paged())


def test_an_empty_home_says_what_to_build(launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path / "nothing"))
    with pytest.raises(
        NoInstance, match=r"pa-ops build --arch sm_90a --filter 'pa_attn_decode_fp16_\w+,pa_attn_flash_sm90_fp16_"
    ):
        call("paged_attention", *paged())


def test_B26_debug_prints_each_decision(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call("paged_attention", *paged())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PA_OPS_DEBUG", "1")
    call("paged_attention", *batch(1, 1, 40))
    first, second = (line for line in capsys.readouterr().err.splitlines() if " -> " in line)
    assert "paged_attention -> decode (pa_attn_decode_fp16_" in first
    assert "paged_attention -> flash_sm90 (pa_attn_flash_sm90_fp16_" in second


def test_two_targets_merge_and_the_better_one_wins(launches: Launches, tmp_path: Path) -> None:
    write_product(tmp_path, "sm_80")
    merged = registry.Registry(SM90, tmp_path)
    assert {entry.target for entry in merged.entries} == {"sm_90a"}
    older = registry.Registry(Capability.of_sm(86), tmp_path)
    assert {entry.target for entry in older.entries} == {"sm_80"}
    assert registry.Registry(Capability.of_sm(75), tmp_path).entries == ()


def test_select_answers_for_devices_that_are_not_here(
    launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = pa_ops.Problem(op="paged_attention", dtype="bf16", head_dim=128)
    problem = replace(step, tokens=512)
    built = pa_ops.select(problem, device=90)
    assert pa_ops.select(step, device=90).family == pa_ops.select(step, device=86).family == "decode"
    with pa_ops.batch_invariant():
        assert [pa_ops.select(step, device=sm).family for sm in (90, 86)] == ["decode", "decode"]
        assert [pa_ops.select(problem, device=sm).family for sm in (90, 86)] == ["flash_sm90", "flash_sm80"]
    assert built.entry.built and built.entry.target == "sm_90a" and built.family == "flash_sm90"
    declared = pa_ops.select(problem, device=86)
    assert not declared.entry.built and declared.entry.target == "sm_80"
    monkeypatch.setenv("PA_OPS_SM", "121")
    assert pa_ops.select(problem).entry.target == "sm_120f"
    text = pa_ops.explain(problem, device=SM90)
    assert f"selected: {built.instance} [sm_90a]" in text
    assert text.count("[sm_90a]: ") == len(registry.Registry(SM90, tmp_path).entries)  # G8: every row
    monkeypatch.delenv("PA_OPS_SM")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidArgument, match="device: no GPU is here"):
        pa_ops.select(problem)
    with pytest.raises(InvalidArgument, match="device: must be a CUDA device"):
        pa_ops.select(problem, device="cpu")
    with pytest.raises(NoInstance, match="needs sm >= 80 for bf16"):
        pa_ops.explain(problem, device=75) and pa_ops.select(problem, device=75)
