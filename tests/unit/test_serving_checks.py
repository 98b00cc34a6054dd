"""The serving operator's errors: each rule names the argument, says what to fix, and leaves the caches as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.problems import Shape
from helpers.serving import Arguments, angles, images, serving, slot_mapping
from pa_ops import InvalidArgument

Change = Callable[[Arguments], Arguments]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def valid(**options: Any) -> Arguments:
    """Three sequences of 3, 0 and 2 new tokens on 3, 2 and 0: Hq = 4, Hkv = 2, D = 8, four tokens a page."""
    return serving([3, 0, 2], [3, 2, 0], rotary_dim=6, **options)


def rotary(cos: Tensor, sin: Tensor) -> Change:
    return lambda _: {"cos": cos, "sin": sin}


def sets(argument: str, value: Any) -> Change:
    return lambda _: {argument: value}


def makes(argument: str, of: Callable[[Tensor], Tensor]) -> Change:
    return lambda a: {argument: of(a[argument])}


def packed(query: Tensor) -> Change:
    return lambda _: {"query": query, "key": None, "value": None}


def sparse(t: Tensor) -> Tensor:
    """The same elements, every second one of a wider tensor."""
    return t.repeat_interleave(2, -1)[..., ::2]


# argument at fault, what changes, words that the error must say
ROWS: list[tuple[str, Change, str]] = [
    # ranks
    ("query", sets("query", half(5, 4, 8)), "2 dimensions [T, width] / [5, 4, 8]"),
    ("key", sets("key", half(5, 2, 8)), "2 dimensions [T, Hkv*D] / [5, 2, 8]"),
    ("value", sets("value", half(80)), "2 dimensions [T, Hkv*D] / [80]"),
    ("query", packed(half(5, 8, 8)), "2 dimensions / [5, 8, 8]"),
    # pairs
    ("value", sets("value", None), "key and value come together / neither for packed QKV / key of shape [5, 16]"),
    ("key", sets("key", None), "key and value come together / value of shape [5, 16]"),
    # rows
    ("key", sets("key", half(4, 16)), "T = 5 / dimension 0 / query / [4, 16]"),
    ("key", sets("key", half(6, 16)), "T = 5 / dimension 0 / [6, 16]"),
    ("value", sets("value", half(4, 16)), "T = 5 / dimension 0 / query / [4, 16]"),
    # widths: exact products
    ("query", sets("query", half(5, 40)), "[T, Hq*D] / Hq*D = 32 / dimension 1 / Hq = 4 / D = 8 / [5, 40]"),
    ("query", sets("query", half(5, 64)), "Hq*D = 32 / key and value are given / [5, 64]"),
    ("query", packed(half(5, 32)), "(Hq+2*Hkv)*D = 64 / packed QKV / [5, 32]"),
    ("key", sets("key", half(5, 24)), "[T, Hkv*D] / Hkv*D = 16 / dimension 1 / num_kv_heads and k_cache / [5, 24]"),
    ("value", sets("value", half(5, 32)), "Hkv*D = 16 / dimension 1 / [5, 32]"),
    # caches
    ("k_cache", sets("k_cache", half(9, 8, 8)), "4 dimensions [pages, page_size, Hkv, D] / [9, 8, 8]"),
    ("v_cache", sets("v_cache", half(9, 4, 16)), "4 dimensions [pages, page_size, Hkv, D] / [9, 4, 16]"),
    ("k_cache", sets("k_cache", half(6, 0, 2, 8)), "page_size / >= 1 / [6, 0, 2, 8]"),
    ("v_cache", sets("v_cache", half(8, 4, 2, 8)), "pages = 6 / dimension 0 / k_cache / [8, 4, 2, 8]"),
    ("v_cache", sets("v_cache", half(6, 3, 2, 8)), "page_size = 4 / dimension 1 / k_cache / [6, 3, 2, 8]"),
    ("v_cache", sets("v_cache", half(6, 4, 1, 8)), "Hkv = 2 / dimension 2 / num_kv_heads / [6, 4, 1, 8]"),
    ("v_cache", sets("v_cache", half(6, 4, 2, 16)), "D = 8 / dimension 3 / k_cache / [6, 4, 2, 16]"),
    ("k_cache", sets("k_cache", half(6, 4, 4, 8)), "Hkv = 2 / dimension 2 / num_kv_heads / [6, 4, 4, 8]"),
    ("k_cache", makes("k_cache", torch.Tensor.bfloat16), "float16 (as query) / float8_e4m3fn / int8 / bfloat16"),
    ("v_cache", makes("v_cache", torch.Tensor.char), "float16 (as k_cache) / int8"),
    ("k_cache", makes("k_cache", sparse), "last dimension must be dense / strides"),
    ("k_cache", sets("k_cache", half(1, 4, 2, 8).expand(6, 4, 2, 8)), "is written / stride 0"),
    ("v_cache", sets("v_cache", half(6, 1, 2, 8).expand(6, 4, 2, 8)), "is written / stride 0"),
    # lengths and pages
    ("cu_seqlens_q", makes("cu_seqlens_q", lambda t: t[None]), "1 dimensions [B+1] / [1, 4]"),
    ("cu_seqlens_q", sets("cu_seqlens_q", int32().reshape(0)), "[B+1] / >= 1 / [0]"),
    ("cu_seqlens_q", makes("cu_seqlens_q", torch.Tensor.long), "int32 / int64"),
    ("past_lens", makes("past_lens", lambda t: t[:, None]), "1 dimensions [B] / [3, 1]"),
    ("past_lens", makes("past_lens", torch.Tensor.long), "int32 / int64"),
    ("block_table", makes("block_table", torch.Tensor.flatten), "2 dimensions [B, max_pages] / [9]"),
    ("block_table", makes("block_table", lambda t: t[:2]), "B = 3 / dimension 0 / cu_seqlens_q / [2, 3]"),
    ("block_table", makes("block_table", torch.Tensor.long), "int32 / int64"),
    # rotary
    ("sin", sets("sin", None), "cos and sin come together / cos of shape [7, 3]"),
    ("cos", sets("cos", None), "cos and sin come together / sin of shape [7, 3]"),
    ("cos", rotary(*angles(7, 10)), "rotary_dim / at most k_cache's D = 8 / rotary_dim = 10 / [7, 5]"),
    ("cos", rotary(*angles(7, 0)), "rotary_dim/2 >= 1 / [7, 0]"),
    ("cos", rotary(*angles(0, 6)), "max_position >= 1 / [0, 3]"),
    ("sin", sets("sin", torch.zeros(7, 4)), "rotary_dim/2 = 3 / dimension 1 / cos / [7, 4]"),
    ("sin", sets("sin", torch.zeros(6, 3)), "max_position = 7 / dimension 0 / cos / [6, 3]"),
    ("cos", sets("cos", torch.zeros(7, 3, 1)), "2 dimensions [max_position, rotary_dim/2] / [7, 3, 1]"),
    ("cos", rotary(*torch.zeros(2, 7, 3).bfloat16()), "float32, float16 (as query) / bfloat16"),
    ("sin", makes("sin", torch.Tensor.half), "float32 (as cos) / float16"),
    ("sin", makes("sin", sparse), "last dimension must be dense"),
    # heads
    ("num_heads", sets("num_heads", 0), ">= 1 / got 0"),
    ("num_heads", sets("num_heads", -4), ">= 1 / -4"),
    ("num_kv_heads", sets("num_kv_heads", 0), ">= 1 / got 0"),
    ("num_heads", sets("num_heads", 3), "multiple of num_kv_heads = 2 / got 3"),
    # tokens and options
    ("query", makes("query", torch.Tensor.float), "float16, bfloat16 / float32"),
    ("query", makes("query", sparse), "last dimension must be dense"),
    ("query", sets("query", half(5, 32).requires_grad_()), "must not require grad / inference only"),
    ("key", makes("key", torch.Tensor.bfloat16), "float16 (as query) / bfloat16"),
    ("value", makes("value", torch.Tensor.float), "float16 (as query) / float32"),
    ("slot_mapping", sets("slot_mapping", torch.zeros(4).long()), "T = 5 / dimension 0 / query / [4]"),
    ("slot_mapping", sets("slot_mapping", torch.zeros(5).int()), "int64 / int32"),
    ("sinks", sets("sinks", torch.zeros(2)), "Hq = 4 / num_heads / [2]"),
    ("k_scale", sets("k_scale", torch.ones(4)), "Hkv = 2 or 1 / num_kv_heads / [4]"),
    ("v_scale", sets("v_scale", torch.ones(1).double()), "float32 / float64"),
    ("softmax_scale", sets("softmax_scale", 0.0), "finite and > 0 / 0.0"),
    ("softcap", sets("softcap", -1.0), ">= 0 / -1.0"),
    ("sliding_window", sets("sliding_window", 2**31), "32 bits / 2147483648"),
    ("max_seqlen_q", sets("max_seqlen_q", -1), ">= 0 / -1"),
    ("max_seqlen_k", sets("max_seqlen_k", -1), ">= 0 / -1"),
    # buffers of the caller
    ("out", sets("out", half(5, 4, 8)), "2 dimensions [T, Hq*D] / [5, 4, 8]"),
    ("out", sets("out", half(5, 64)), "Hq*D = 32 / dimension 1 / num_heads and k_cache / [5, 64]"),
    ("out", sets("out", half(4, 32)), "T = 5 / dimension 0 / [4, 32]"),
    ("out", sets("out", half(5, 32).float()), "float16 (as query) / float32"),
    ("out", sets("out", half(1, 32).expand(5, 32)), "is written / stride 0"),
    ("lse", lambda _: {"out": half(5, 32), "lse": torch.zeros(5, 4)}, "[Hq, T] / Hq = 4 / [5, 4]"),
]


def run(arguments: Arguments) -> Any:
    operator = torch.ops.pa_ops.paged_attention_
    return (operator.out if "out" in arguments else operator)(**arguments)


def on_meta(arguments: Arguments) -> Arguments:
    """The same shapes, strides and dtypes without memory."""

    def bare(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)

    return {name: bare(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def refused(arguments: Arguments, argument: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        run(arguments)
    assert caught.value.argument == argument, caught.value
    for word in words.split(" / "):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[2].split(' / ')[0]}".replace(" ", "_"))
@pytest.mark.parametrize("place", [dict, on_meta], ids=["cpu", "meta"])
def test_B29_each_rule_names_argument_rule_and_value_and_nothing_is_written(
    row: tuple[str, Change, str], place: Callable[[Arguments], Arguments]
) -> None:
    argument, change, words = row
    arguments = valid()
    before = images(arguments)
    refused(place({**arguments, **change(arguments)}), argument, words)
    assert all(map(torch.equal, images(arguments), before))


@pytest.mark.parametrize("lengths", [(3, 2), (3, 2, 0, 0), (3,), ()], ids=len)
def test_B29_past_lens_of_any_wrong_length_is_refused(lengths: tuple[int, ...]) -> None:
    refused(
        {**valid(), "past_lens": int32(*lengths).reshape(len(lengths))}, "past_lens", "[B] with B = 3 / dimension 0"
    )


@pytest.mark.parametrize("width", [33, 39, 31, 36, 0])
def test_B29_a_width_with_a_remainder_is_not_rounded(width: int) -> None:
    refused({**valid(), "query": half(5, width)}, "query", f"Hq*D = 32 / [5, {width}]")
    refused(valid() | packed(half(5, width + 32))({}), "query", f"(Hq+2*Hkv)*D = 64 / [5, {width + 32}]")


def test_B29_head_counts_past_32_and_64_bits_of_width_do_not_wrap() -> None:
    for kv_heads in (2**30, 2**31, 2**62):
        refused({**valid(), "num_heads": kv_heads, "num_kv_heads": kv_heads}, "k_cache", f"Hkv = {kv_heads} / [6, 4, 2")
    for heads in (2**32, 2**62):
        refused({**valid(), "num_heads": heads}, "query", f"Hq*D = {heads * 8} / [5, 32]")


def test_B29_what_older_rules_refused_for_no_reason_is_legal() -> None:
    for shape in (Shape(24, 2, 2, page_size=3), Shape(10, 1, 3, page_size=1), Shape(40, 2, 1, page_size=300)):
        for rotary_dim in (0, 2, 10):  # D % 16, rotary_dim % 16 and page sizes are no matter of this operator
            arguments = serving([3, 1], [2, 0], shape, rotary_dim=rotary_dim)
            assert run(arguments).isfinite().all()
    many = [1] * 300  # more sequences than a block has threads
    assert run(serving(many, many)).isfinite().all()
    assert run(valid() | {"sinks": half(4), "sliding_window": -1}).isfinite().all()
    assert run(valid() | dict(zip(("cos", "sin"), (t.half() for t in angles(7, 6)), strict=True))).isfinite().all()


def test_B28_no_second_set_of_caches_to_write_to() -> None:
    arguments = valid()
    with pytest.raises(RuntimeError, match="k_cache_out"):
        run({**arguments, "k_cache_out": arguments["k_cache"].clone()})


@pytest.mark.parametrize("spare", [0, 3])
def test_an_empty_batch_is_legal(spare: int) -> None:
    arguments = serving([], [], rotary_dim=8, spare=spare)
    before = images(arguments)
    assert run(arguments).shape == (spare, 32)
    out = torch.full((spare, 32), 7.0).half()
    run({**arguments, "out": out})
    assert (out == 7).all() and all(map(torch.equal, images(arguments), before))


def block_table(*entries: int) -> Change:
    return sets("block_table", int32(*entries).reshape(3, 3))


def with_slots(**change: int) -> Change:
    """The slots of the block table, but for those named t<token>."""

    def slots(arguments: Arguments) -> Arguments:
        mapping = slot_mapping(arguments)
        for token, slot in change.items():
            mapping[int(token[1:])] = slot
        return {"slot_mapping": mapping}

    return slots


# as ROWS: values that only the device knows
LIES: list[tuple[str, Change, str]] = [
    ("cu_seqlens_q", sets("cu_seqlens_q", int32(1, 3, 3, 5)), "start at 0 / [0] = 1"),
    ("cu_seqlens_q", sets("cu_seqlens_q", int32(0, -3, 3, 5)), "not decrease / sequence 0 / [0, -3]"),
    ("cu_seqlens_q", sets("cu_seqlens_q", int32(0, 4, 3, 5)), "not decrease / sequence 1 / [4, 3]"),
    ("cu_seqlens_q", sets("cu_seqlens_q", int32(0, 3, 3, 4)), "5 rows of query / = 4 / sequence 2"),
    ("cu_seqlens_q", sets("cu_seqlens_q", int32(0, 3, 3, 9)), "5 rows of query / = 9"),
    ("past_lens", sets("past_lens", int32(3, -1, 0)), ">= 0 / sequence 1 / past_lens[1] = -1"),
    ("past_lens", sets("past_lens", int32(10, 2, 0)), "sequence 0 / 3 pages of 4 tokens = 12 / 10, with 3 new = 13"),
    ("past_lens", sets("past_lens", int32(2**31 - 1, 2, 0)), "sequence 0 / with 3 new = 2147483650"),
    ("block_table", block_table(0, 7, 1, 2, -1, -1, 4, -1, -1), "sequence 0 / page 1 / [0, 6) / [0, 1] = 7"),
    ("block_table", block_table(0, 1, -1, 2, -1, -1, -1, -1, -1), "sequence 2 / page 0 / [2, 0] = -1"),
    ("block_table", block_table(-1, 1, -1, 2, -1, -1, 4, -1, -1), "sequence 0 / page 0 / [0, 0] = -1"),
    (
        "block_table",
        block_table(0, 4, -1, 2, -1, -1, 4, -1, -1),
        "share a slot / position 4 of sequence 0 and position 0 of sequence 2 / block_table[2, 0] = 4",
    ),
    ("cos", rotary(*angles(5, 6)), "a row for each position / last of sequence 0 being 5 / 5 rows"),
    ("slot_mapping", with_slots(t3=24), "[0, 24) / token 3 / slot_mapping[3] = 24"),
    ("slot_mapping", with_slots(t1=-2), "-1 (do not store) / token 1 / -2"),
    ("slot_mapping", with_slots(t4=19), "share a slot / 0 and 4 / slot_mapping[4] = 19"),
    ("max_seqlen_q", sets("max_seqlen_q", 2), "3 new tokens of sequence 0 / got 2"),
    ("max_seqlen_k", sets("max_seqlen_k", 5), "6 visible tokens of sequence 0 / got 5"),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie[0]}-{lie[2].split(' / ')[0]}".replace(" ", "_"))
def test_B24_a_lie_is_an_error_in_checked_mode_and_harmless_outside(
    lie: tuple[str, Change, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argument, change, words = lie
    arguments = valid()
    arguments |= change(arguments)
    arguments |= {name: arguments[name].nan_to_num() for name in ("k_cache", "v_cache")}
    before = images(arguments)
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    refused(arguments, argument, words)
    assert all(map(torch.equal, images(arguments), before))
    monkeypatch.setenv("PA_OPS_CHECKED", "0")
    assert run(arguments).isfinite().all()


def test_honest_calls_pass_in_checked_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    arguments = valid()
    for change in (
        {"max_seqlen_q": 3, "max_seqlen_k": 6},
        {"slot_mapping": slot_mapping(arguments)},
        {"slot_mapping": torch.full((5,), -1)},
        rotary(*angles(6, 8))(arguments),
        {"past_lens": int32(3, 12, 0)},  # no new token: its pages are not read
    ):
        run({**valid(), **change})
    behind = serving([2], [14], sliding_window=3)
    behind["block_table"][0, :3] = -1  # tokens 0 to 11; the first query sees 12, 13 and itself
    assert run(behind).isfinite().all()
    behind["block_table"][0, 3] = -1
    refused(behind, "block_table", "reads page 3")


def test_padded_rows_are_legal_with_buffers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    arguments = valid(spare=3)
    out = torch.full((8, 32), 7.0).half()
    slots = torch.cat((slot_mapping(arguments), torch.tensor([0, 0, -9])))  # rows past the end hold anything
    run({**arguments, "slot_mapping": slots, "out": out})
    assert (out[5:] == 7).all() and out[:5].isfinite().all()
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_q: counts tokens .* the 8 rows of query"):
        pa_ops.paged_attention_(**arguments)


def test_D9_a_page_count_is_no_token_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PA_OPS_CHECKED", "1")
    refused({**valid(), "cu_seqlens_q": int32(0, 2, 2, 3)}, "cu_seqlens_q", "counts tokens (not pages) / 5 rows / = 3")
