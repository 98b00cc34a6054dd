"""Every validation row of every operator: one error on CPU and on meta tensors, with the words that say what to fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.serving import serving
from pa_ops import InvalidArgument
from pa_ops.checks import PADDED, RULES, Rule, validate
from pa_ops.schema import SCHEMAS, signature

Arguments = dict[str, Any]
Change = Callable[[Arguments], Any]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def valid(op: str) -> Arguments:
    """A call of two sequences with 3 + 2 new tokens, Hq = 4, Hkv = 2, D = 8, four pages of four tokens; padded, of 3
    each, Dv = 16, 7 + 5 keys."""
    attention = {"q": half(5, 4, 8), "cu_seqlens_q": int32(0, 3, 5)}
    buffers = {"out": half(5, 4, 8), "lse": torch.zeros(4, 5)}
    paged = {
        **attention,
        "k_cache": half(4, 4, 2, 8),
        "v_cache": half(4, 4, 2, 8),
        "seqlens_k": int32(6, 2),
        "block_table": int32(0, 1, 2, 3).reshape(2, 2),
    }
    varlen = {**attention, "k": half(8, 2, 8), "v": half(8, 2, 8), "cu_seqlens_k": int32(0, 6, 8)}
    rotary = serving([3, 2], [3, 0], rotary_dim=8, slot_mapping=torch.tensor([3, 4, -1, 8, 9]))
    cases: dict[str, Arguments] = {
        "paged_attention": paged,
        "paged_attention.out": {**paged, **buffers},
        "paged_attention_": rotary,
        "paged_attention_.out": {**rotary, "out": half(5, 32), "lse": buffers["lse"]},
        "varlen_attention": varlen,
        "varlen_attention.out": {**varlen, **buffers},
        "attention": {
            "q": half(2, 4, 3, 8),
            "k": half(2, 2, 5, 8),
            "v": half(2, 2, 5, 16),
            "past_key": half(2, 2, 7, 8),
            "past_value": half(2, 2, 7, 16),
            "attn_mask": torch.ones(3, 12, dtype=torch.bool),
            "nonpad_kv_seqlen": torch.tensor([12, 0]),
        },
        "append_kv": {
            "key": half(3, 2, 8),
            "value": half(3, 2, 8),
            "k_cache": half(4, 4, 2, 8),
            "v_cache": half(4, 4, 2, 8),
            "slot_mapping": torch.tensor([0, -1, 9]),
        },
        "gather_kv": {
            "k_cache": half(4, 4, 2, 8),
            "v_cache": half(4, 4, 2, 16),
            "block_table": int32(0, 3, 1, 2).reshape(2, 2),
            "cu_seqlens_k": int32(0, 6, 8),
            "k": half(9, 2, 8),
            "v": half(9, 2, 16),
        },
        "merge_states": {
            "out_a": half(5, 4, 8),
            "lse_a": torch.zeros(4, 5),
            "out_b": half(5, 4, 8),
            "lse_b": torch.zeros(4, 5),
        },
    }
    return cases[op]


def rules_of(op: str) -> tuple[Rule, ...]:
    """The tensors of a call as its caller knows them."""
    return PADDED["bnsh"] if op == "attention" else RULES[op]


def call(op: str, arguments: Arguments) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.pa_ops, name), overload or "default")(**arguments)


def on_meta(arguments: Arguments) -> Arguments:
    """The same shapes, strides and dtypes without memory."""

    def twin(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)

    return {name: twin(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def float32(name: str) -> Change:
    return lambda a: a[name].float()


def strided(name: str) -> Change:
    """The same shape, every second element of the last dimension of something wider."""
    return lambda a: a[name].repeat_interleave(2, -1)[..., ::2]


# operator, argument, what it becomes, words that the error must say
ROWS: list[tuple[str, str, Change, str]] = [
    ("paged_attention", "q", lambda _: half(5, 32), "3 dimensions [T, Hq, D] / [5, 32]"),
    ("paged_attention", "q", float32("q"), "dtype / float16, bfloat16 / float32"),
    ("paged_attention", "q", strided("q"), "last dimension must be dense / strides"),
    ("paged_attention", "q", lambda _: half(5, 3, 8), "multiple of / Hkv = 2 / Hq = 3"),
    ("paged_attention", "q", lambda _: half(5, 0, 8), "Hq / >= 1 / [5, 0, 8]"),
    ("paged_attention", "q", lambda _: half(5, 4, 0), "D  / >= 1 / [5, 4, 0]"),
    ("paged_attention", "q", lambda _: half(5, 4, 8).requires_grad_(), "must not require grad / inference only"),
    ("paged_attention", "k_cache", lambda _: half(16, 2, 8), "4 dimensions [pages, page_size, Hkv, D] / [16, 2, 8]"),
    ("paged_attention", "k_cache", lambda _: half(4, 4, 2, 16), "D = 8 / dimension 3 / comes from q / [4, 4, 2, 16]"),
    ("paged_attention", "k_cache", lambda _: half(4, 0, 2, 8), "page_size / >= 1"),
    ("paged_attention", "k_cache", lambda a: a["k_cache"].bfloat16(), "float16 (as q) / float8_e4m3fn / bfloat16"),
    ("paged_attention", "k_cache", strided("k_cache"), "last dimension must be dense"),
    ("paged_attention", "v_cache", lambda _: half(5, 4, 2, 8), "pages = 4 / dimension 0 / k_cache / [5, 4, 2, 8]"),
    ("paged_attention", "v_cache", lambda _: half(4, 8, 2, 8), "page_size = 4 / k_cache / [4, 8, 2, 8]"),
    ("paged_attention", "v_cache", lambda _: half(4, 4, 1, 8), "Hkv = 2 / dimension 2 / k_cache"),
    ("paged_attention", "v_cache", lambda a: a["v_cache"].to(torch.int8), "float16 (as k_cache) / int8"),
    ("paged_attention", "v_cache", strided("v_cache"), "last dimension must be dense"),
    ("paged_attention", "cu_seqlens_q", lambda _: int32().reshape(0), "[B+1] / >= 1 / [0]"),
    ("paged_attention", "cu_seqlens_q", lambda _: torch.tensor([0, 3, 5]), "int32 / int64"),
    ("paged_attention", "cu_seqlens_q", lambda _: int32(0, 0, 3, 3, 5, 5)[::2], "must be dense"),
    ("paged_attention", "cu_seqlens_q", lambda _: int32(0, 3, 5)[None], "1 dimensions [B+1] / [1, 3]"),
    ("paged_attention", "seqlens_k", lambda _: int32(0, 6, 8), "B = 2 / dimension 0 / cu_seqlens_q / [3]"),
    ("paged_attention", "seqlens_k", lambda _: torch.tensor([6, 2]), "int32 / int64"),
    ("paged_attention", "block_table", lambda _: int32(0, 1, 2, 3), "2 dimensions [B, max_pages] / [4]"),
    ("paged_attention", "block_table", lambda _: int32(0, 1).reshape(1, 2), "B = 2 / cu_seqlens_q / [1, 2]"),
    ("paged_attention", "block_table", lambda a: a["block_table"].long(), "int32 / int64"),
    ("paged_attention", "block_table", lambda a: a["block_table"].T, "last dimension must be dense"),
    ("paged_attention", "sinks", lambda _: torch.zeros(2), "Hq = 4 / comes from q / [2]"),
    ("paged_attention", "sinks", lambda _: torch.zeros(4).double(), "float32 / float16 (as q) / float64"),
    ("paged_attention", "sinks", lambda _: torch.zeros(4).requires_grad_(), "must not require grad"),
    ("paged_attention", "k_scale", lambda _: torch.ones(3), "[Hkv|1] / Hkv = 2 or 1 / [3]"),
    ("paged_attention", "k_scale", lambda _: half(1), "float32 / float16"),
    ("paged_attention", "v_scale", lambda _: torch.ones(()), "1 dimensions / Hkv"),
    ("paged_attention", "v_scale", lambda _: torch.ones(1).double(), "float32 / float64"),
    ("paged_attention", "softmax_scale", lambda _: float("nan"), "finite / nan"),
    ("paged_attention", "softmax_scale", lambda _: -1.0, "> 0 / -1.0"),
    ("paged_attention", "softcap", lambda _: -2.0, ">= 0 / 0 = off / -2.0"),
    ("paged_attention", "softcap", lambda _: float("inf"), "finite / inf"),
    ("paged_attention", "sliding_window", lambda _: 2**31, "32 bits / 2147483648"),
    ("paged_attention", "max_seqlen_q", lambda _: -1, ">= 0 / left out / -1"),
    ("paged_attention", "max_seqlen_k", lambda _: -3, ">= 0 / left out / -3"),
    ("paged_attention.out", "out", lambda _: half(4, 4, 8), "T = 5 / dimension 0 / [4, 4, 8]"),
    ("paged_attention.out", "out", lambda _: half(5, 4, 16), "Dv = 8 / v_cache / [5, 4, 16]"),
    ("paged_attention.out", "out", float32("out"), "float16 (as q) / float32"),
    ("paged_attention.out", "out", strided("out"), "last dimension must be dense"),
    ("paged_attention.out", "out", lambda _: half(1, 4, 8).expand(5, 4, 8), "is written / stride 0"),
    ("paged_attention.out", "lse", lambda _: torch.zeros(5, 4), "[Hq, T] / Hq = 4 / [5, 4]"),
    ("paged_attention.out", "lse", lambda _: half(4, 5), "float32 / float16"),
    ("paged_attention.out", "lse", lambda _: torch.zeros(5, 4).T, "last dimension must be dense"),
    ("varlen_attention", "q", lambda _: half(5, 3, 8), "multiple of / k's Hkv = 2 / Hq = 3"),
    ("varlen_attention", "k", lambda _: half(8, 2, 16), "D = 8 / dimension 2 / [8, 2, 16]"),
    ("varlen_attention", "k", lambda _: half(2, 4, 2, 8), "3 dimensions [total_k, Hkv, D]"),
    ("varlen_attention", "k", lambda a: a["k"].bfloat16(), "float16 (as q) / bfloat16"),
    ("varlen_attention", "v", lambda _: half(7, 2, 8), "total_k = 8 / comes from k / [7, 2, 8]"),
    ("varlen_attention", "v", lambda a: a["v"].bfloat16(), "float16 (as k) / bfloat16"),
    ("varlen_attention", "cu_seqlens_k", lambda _: int32(6, 2), "B+1 = 3 / cu_seqlens_q / [2]"),
    ("varlen_attention", "cu_seqlens_k", lambda _: torch.tensor([0, 6, 8]), "int32 / int64"),
    ("varlen_attention.out", "out", lambda _: half(5, 2, 8), "Hq = 4 / [5, 2, 8]"),
    ("attention", "layout", lambda _: "bhsd", "bnsh, bsnh, bnsh/bsnh, bsnh/bnsh / 'bhsd'"),
    ("attention", "q", lambda _: half(2, 4, 8), "4 dimensions [B, Hq, Sq, D] / [2, 4, 8]"),
    ("attention", "q", lambda a: a["q"].double(), "float16, bfloat16, float32 / float64"),
    ("attention", "q", lambda _: half(2, 3, 3, 8), "multiple of / k's Hkv = 2 / Hq = 3"),
    ("attention", "k", lambda _: half(3, 2, 5, 8), "B = 2 / comes from q / [3, 2, 5, 8]"),
    ("attention", "k", lambda _: half(2, 2, 5, 16), "D = 8 / dimension 3 / [2, 2, 5, 16]"),
    ("attention", "k", lambda a: a["k"].bfloat16(), "float16 (as q) / bfloat16"),
    ("attention", "k", strided("k"), "last dimension must be dense"),
    ("attention", "v", lambda _: half(2, 2, 4, 16), "Sk = 5 / comes from k / [2, 2, 4, 16]"),
    ("attention", "v", lambda a: a["v"].requires_grad_(), "must not require grad"),
    ("attention", "past_key", lambda _: half(2, 2, 7, 16), "D = 8 / [2, 2, 7, 16]"),
    ("attention", "past_key", lambda _: None, "come together / past_value alone"),
    ("attention", "past_value", lambda _: half(2, 2, 6, 16), "P = 7 / comes from past_key / [2, 2, 6, 16]"),
    ("attention", "past_value", lambda _: half(2, 2, 7, 8), "Dv = 16 / comes from v"),
    ("attention", "past_value", lambda _: None, "come together / past_key alone"),
    ("attention", "attn_mask", lambda _: torch.ones(2, 12).bool(), "[Sq, total] / Sq = 3, total = 12 / [2, 12]"),
    ("attention", "attn_mask", lambda _: torch.ones(3, 5).bool(), "total counts past and new / [3, 5]"),
    ("attention", "attn_mask", lambda _: torch.ones(2, 3, 12).bool(), "[Hq, Sq, total] / Hq = 4 / [2, 3, 12]"),
    ("attention", "attn_mask", lambda _: torch.ones(4, 4, 3, 12).bool(), "B = 2 / [4, 4, 3, 12]"),
    ("attention", "attn_mask", lambda _: torch.ones(12).bool(), "2, 3 or 4 dimensions / [12]"),
    ("attention", "attn_mask", lambda _: torch.ones(3, 12).int(), "bool, float16, float32 / int32"),
    ("attention", "attn_mask", lambda _: torch.ones(3, 12).requires_grad_(), "must not require grad"),
    ("attention", "nonpad_kv_seqlen", lambda _: int32(3), "B = 2 / [1]"),
    ("attention", "nonpad_kv_seqlen", lambda _: torch.ones(2), "int32, int64 / float32"),
    ("attention", "sinks", lambda _: torch.zeros(2), "Hq = 4 / comes from q / [2]"),
    ("attention", "k_scale", lambda _: torch.ones(3), "Hkv = 2 or 1 / [3]"),
    ("attention", "softmax_scale", lambda _: 0.0, "> 0 / 0.0"),
    ("attention", "softcap", lambda _: -1.0, ">= 0 / -1.0"),
    ("attention", "max_seqlen_k", lambda _: -1, ">= 0 / left out / -1"),
    ("append_kv", "slot_mapping", lambda _: int32(0, -1, 9), "int64 / int32"),
    ("append_kv", "slot_mapping", lambda _: torch.tensor([[0, 1]]), "1 dimensions [T]"),
    ("append_kv", "key", lambda _: half(2, 2, 8), "T >= 3 / slot_mapping / [2, 2, 8]"),
    ("append_kv", "key", float32("key"), "float16, bfloat16 / float32"),
    ("append_kv", "key", strided("key"), "last dimension must be dense"),
    ("append_kv", "value", lambda _: half(3, 1, 8), "Hkv = 2 / comes from key / [3, 1, 8]"),
    ("append_kv", "value", lambda a: a["value"].bfloat16(), "float16 (as key) / bfloat16"),
    ("append_kv", "k_cache", lambda _: half(4, 4, 2, 16), "D = 8 / comes from key"),
    ("append_kv", "k_cache", float32("k_cache"), "float16 (as key) / int8 / float32"),
    ("append_kv", "k_cache", lambda _: half(1, 4, 2, 8).expand(4, 4, 2, 8), "is written / stride 0"),
    ("append_kv", "v_cache", lambda _: half(4, 4, 2, 16), "Dv = 8 / comes from value"),
    ("append_kv", "v_cache", lambda _: half(4, 4, 1, 8).expand(4, 4, 2, 8), "is written / stride 0"),
    ("append_kv", "v_scale", lambda _: torch.ones(4), "Hkv = 2 or 1 / comes from key / [4]"),
    ("gather_kv", "k", lambda _: half(9, 16), "3 dimensions [T, Hkv, D] / [9, 16]"),
    ("gather_kv", "k", float32("k"), "float16, bfloat16 / float32"),
    ("gather_kv", "k", lambda _: half(1, 2, 8).expand(9, 2, 8), "is written / stride 0"),
    ("gather_kv", "v", lambda _: half(8, 2, 16), "T = 9 / comes from k / [8, 2, 16]"),
    ("gather_kv", "v", lambda a: a["v"].bfloat16(), "float16 (as k) / bfloat16"),
    ("gather_kv", "v", lambda _: half(9, 2, 1).expand(9, 2, 16), "last dimension must be dense"),
    ("gather_kv", "k_cache", lambda _: half(4, 4, 2, 16), "D = 8 / comes from k / [4, 4, 2, 16]"),
    ("gather_kv", "k_cache", lambda a: a["k_cache"].to(torch.float8_e4m3fn), "float16 (as k) / float8_e4m3fn"),
    ("gather_kv", "v_cache", lambda _: half(4, 8, 2, 16), "page_size = 4 / k_cache / [4, 8, 2, 16]"),
    ("gather_kv", "v_cache", lambda _: half(4, 4, 1, 16), "Hkv = 2 / comes from k"),
    ("gather_kv", "block_table", lambda a: a["block_table"].long(), "int32 / int64"),
    ("gather_kv", "block_table", lambda _: int32(0, 1, 2).reshape(3, 1), "B = 2 / comes from cu_seqlens_k / [3, 1]"),
    ("gather_kv", "cu_seqlens_k", lambda _: int32().reshape(0), "[B+1] / >= 1 / [0]"),
    ("merge_states", "out_b", lambda _: half(5, 4, 16), "Dv = 8 / out_a / [5, 4, 16]"),
    ("merge_states", "out_b", lambda a: a["out_b"].bfloat16(), "float16 (as out_a) / bfloat16"),
    ("merge_states", "out_a", lambda _: torch.zeros(5, 4, 8), "float16, bfloat16 / float32"),
    ("merge_states", "lse_a", lambda _: torch.zeros(5, 4), "[Hq, T] / Hq = 4 / [5, 4]"),
    ("merge_states", "lse_b", lambda _: half(4, 5), "float32 / float16"),
]


def row_id(row: tuple[str, str, Change, str]) -> str:
    return f"{row[0]}-{row[1]}-{row[3].split(' / ')[0]}".replace(" ", "_")


@pytest.mark.parametrize("row", ROWS, ids=row_id)
@pytest.mark.parametrize("place", [dict, on_meta], ids=["cpu", "meta"])
def test_B29_each_rule_names_argument_rule_and_value(
    row: tuple[str, str, Change, str], place: Callable[[Arguments], Arguments]
) -> None:
    op, argument, change, words = row
    arguments = valid(op)
    arguments[argument] = change(arguments)
    with pytest.raises(InvalidArgument) as caught:
        call(op, place(arguments))
    error = caught.value
    assert error.argument == argument
    for word in words.split(" / "):
        assert word in str(error), f"{word!r} is not in {error}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_valid_calls_are_valid(op: str) -> None:
    call(op, valid(op))
    results = call(op, on_meta(valid(op)))
    if op in ("paged_attention", "varlen_attention", "merge_states"):
        out, lse = results
        assert out.shape == (5, 4, 8) and out.dtype == torch.float16 and out.is_meta
        assert lse.shape == (4, 5) and lse.dtype == torch.float32 and lse.is_meta
    elif op == "attention":
        assert [list(r.shape) for r in results] == [[2, 4, 3, 16], [2, 2, 12, 8], [2, 2, 12, 16], [2, 4, 3]]
        assert results[0].dtype == torch.float16 and results[3].dtype == torch.float32
    elif op == "paged_attention_":
        assert results.shape == (5, 32) and results.dtype == torch.float16 and results.is_meta
    else:
        assert results is None


@pytest.mark.parametrize("op", SCHEMAS)
def test_each_tensor_of_a_schema_has_a_rule(op: str) -> None:
    parsed = torch._C.parse_schema(f"pa_ops::{op}{SCHEMAS[op]}").arguments
    tensors = {a.name: a for a in parsed if "Tensor" in str(a.type) and a.name != "attn_mask"}  # of several shapes
    rules = {rule.argument: rule for rule in rules_of(op)}
    assert rules.keys() == tensors.keys()
    for name, rule in rules.items():
        alias = tensors[name].alias_info
        assert rule.written == (alias is not None and alias.is_write), name
        assert rule.optional == str(tensors[name].type).startswith("Optional"), name


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_tensor_must_be_on_one_device(op: str) -> None:
    first, *others = (rule for rule in rules_of(op) if not rule.optional)
    for rule in others:
        arguments = signature(op).bind((), valid(op))
        arguments[rule.argument] = arguments[rule.argument].to("meta")
        with pytest.raises(InvalidArgument, match=f"^{rule.argument}: must be on {first.argument}'s device, cpu"):
            validate(op, arguments)


def test_sizes_come_back_by_name() -> None:
    arguments = signature("paged_attention").bind((), valid("paged_attention"))
    assert validate("paged_attention", arguments) == {
        "T": 5,
        "Hq": 4,
        "D": 8,
        "pages": 4,
        "page_size": 4,
        "Hkv": 2,
        "Dv": 8,
        "B": 2,
        "max_pages": 2,
    }


def test_legal_oddities_pass() -> None:
    paged = valid("paged_attention")
    wide = torch.zeros(2, 9, dtype=torch.int32)
    for change in (
        {"block_table": wide[:, 3:5]},
        {"sinks": torch.zeros(4)},
        {"sinks": half(4)},
        {"k_scale": torch.ones(1), "v_scale": torch.ones(2)},
        {"sliding_window": -1},
        {"seqlens_k": int32(1, 0)},  # fewer keys than queries
        {"k_cache": half(0, 4, 2, 8), "v_cache": half(0, 4, 2, 8)},
        {"v_cache": half(4, 4, 2, 16)},
        {"k_cache": half(4, 2, 4, 8).transpose(1, 2)},
    ):
        call("paged_attention", {**paged, **change})
    call("append_kv", {**valid("append_kv"), "key": half(7, 6, 8)[:, 2:4]})


def test_a_parameter_is_welcome_where_no_gradient_is_recorded() -> None:
    arguments = valid("paged_attention") | {"sinks": torch.nn.Parameter(torch.zeros(4))}
    with torch.no_grad():
        call("paged_attention", arguments)
    with pytest.raises(InvalidArgument, match="sinks: must not require grad"):
        pa_ops.paged_attention(**arguments)
