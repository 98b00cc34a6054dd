"""The operator attention on its way to kernels: which instance, which record, and the whole space of problems."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from core_rows import declared_rows

import pa_ops
from helpers.launches import Launches
from helpers.padded import MASKS, Padded, expected
from pa_ops import Capability, InvalidArgument, NoInstance, Problem, padded, scratch, trace
from pa_ops.arguments import INT64, MASKED
from pa_ops.capability import MODELS, Feature
from pa_ops.families import device_passes, device_rejections, problem_passes, problem_rejections
from pa_ops.gates import attention_families
from pa_ops.padding import LAYOUTS
from pa_ops.scratch import workspace_words
from pa_ops.selection import select_entry
from pa_ops.spec import DType, Family, InstanceSpec, Mask, Op, TensorMask
from pa_ops.survey import HIDING_OPTIONS
from pa_ops.unsupported import unsupported


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that no stream has."""
    made = torch.empty(workspace_words(Capability.of_sm(90).num_sms), dtype=torch.int32)
    monkeypatch.setattr(scratch, "workspace_for", lambda out: made)


HALVES = (DType.FP16, DType.BF16)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def run(case: Padded, **changes: Any) -> tuple[dict[str, Any], tuple[torch.Tensor, ...]]:
    call = {**case.call(), **changes}
    return call, padded.attention(*(call[name] for name in "qkv"), **{n: t for n, t in call.items() if n not in "qkv"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_C8_the_record_tells_how_each_tensor_lies(launches: Launches, layout: str) -> None:
    order = LAYOUTS[layout]
    case = Padded(3, 48, kv_heads=2, group=2, mask="bool", layout=layout)
    call, (out, _, _, lse) = run(case, backend="flash_sm80")
    [made] = launches
    spec, fields = InstanceSpec.parse(made.symbol), made.fields
    assert (spec.family, spec.mask, spec.dtype) == (Family.FLASH_SM80, Mask.TENSOR, DType.FP16)
    axes = {"bnsh": (0, 2, 1), "bsnh": (0, 1, 2)}
    for name, prefix, axis in (("q", "sequence", order.q), ("k", "page", order.kv), ("v", "page", order.kv)):
        strides = [2 * call[name].stride(at) for at in axes[axis]]
        found = [fields[f"{name}_{what}_stride"] for what in (prefix, "token", "head")]
        assert (fields[name], found) == (call[name].data_ptr(), strides), name
    assert fields["out"] == out.data_ptr() and out.shape == call["q"].shape
    assert [fields["out_token_stride"], fields["out_head_stride"]] == [2 * 4 * 64, 2 * 64]
    assert (fields["lse"], fields["lse_head_stride"], lse.stride()) == (lse.data_ptr(), 4 * 6, (3, 6, 1))
    assert [fields[name] for name in ("tokens", "sequences", "keys", "group")] == [6, 2, 48, 2]
    assert (fields["causal"], fields["window"], fields["position"], fields["kv_lengths"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_C8_the_maps_have_a_sequence_as_their_outermost_extent(launches: Launches, layout: str) -> None:
    order = LAYOUTS[layout]
    call, _ = run(Padded(3, 48, batch=3, kv_heads=2, group=2, mask="bool", layout=layout))
    [made] = launches
    assert made.family is Family.FLASH_SM90 and (made.x, made.y) == (Capability.of_sm(90).num_sms, 1)
    token_and_head = {"bnsh": (2, 1), "bsnh": (1, 2)}
    q_axes, k_axes = (*reversed(token_and_head[order.q]), 0), (*token_and_head[order.kv], 0)
    for name, axes, sizes in (("q", q_axes, (64, 4, 3, 3)), ("k", k_axes, (64, 48, 2, 3))):
        told = made.maps[f"{name}_map"]
        assert (told.address, told.sizes) == (call[name].data_ptr(), sizes)
        assert told.strides == tuple(2 * call[name].stride(at) for at in axes)
    assert made.maps["q_map"].box == (64, 1, 64), "a row of the mask is one token's of one head"
    assert made.maps["v_map"].box == made.maps["k_map"].box == (64, made.fields["box_rows"], 1) == (64, 128, 1)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "columns"), [(160, 72, 64), (96, 40, 32)])
def test_C10_each_map_tells_its_own_head_size(launches: Launches, head_dim: int, head_dim_v: int, columns: int) -> None:
    run(Padded(3, 48, head_dim=head_dim, head_dim_v=head_dim_v, mask="bool"))
    [made] = launches
    assert [made.maps[f"{name}_map"].sizes[0] for name in "qkv"] == [head_dim, head_dim, head_dim_v]
    assert [made.maps[f"{name}_map"].box[0] for name in "qkv"] == [columns] * 3


@pytest.mark.parametrize(("mask", "size"), [("bool", 1), ("additive", 2), ("fp32", 4)])
def test_C3_C5_a_mask_is_read_where_it_lies(launches: Launches, mask: str, size: int) -> None:
    for axes in product((False, True), repeat=3):
        case = Padded(3, 48, kv_heads=2, group=2, mask=mask, mask_axes=(*axes, True))
        call, _ = run(case)
        fields = launches[-1].fields
        given = [stride * real * size for stride, real in zip(call["attn_mask"].stride(), axes, strict=False)]
        found = [fields[f"mask_{what}_stride"] for what in ("sequence", "head", "row")]
        assert (found, fields["mask"], fields["mask_bytes"]) == (given, call["attn_mask"].data_ptr(), size)


def test_a_mask_broadcast_over_keys_is_spread_once(launches: Launches) -> None:
    call, _ = run(Padded(3, 48, mask="bool", mask_axes=(False, False, True, False)))
    fields = launches[-1].fields
    assert fields["mask"] != call["attn_mask"].data_ptr()
    assert [fields[f"mask_{what}_stride"] for what in ("sequence", "head", "row")] == [0, 0, 48]


@pytest.mark.parametrize(
    ("queries", "keys", "past", "position"), [(3, 48, 0, 0), (48, 16, 0, 0), (3, 16, 32, 45), (40, 24, 8, -8)]
)
def test_C20_positions_are_told_by_signed_numbers(
    launches: Launches, queries: int, keys: int, past: int, position: int
) -> None:
    run(Padded(queries, keys, past, mask="bool", options={"causal": True, "sliding_window": 7}))
    assert (launches[-1].fields["position"], launches[-1].fields["window"]) == (position, 7)
    run(Padded(queries, keys, past, mask="bool", options={"sliding_window": 7}))
    assert (launches[-1].fields["position"], launches[-1].fields["causal"]) == (position, 1)


def test_C21_an_addend_joins_the_capped_score(launches: Launches) -> None:
    for softcap, factor in ((0.0, 1 / 0.25), (50.0, 1 / 50)):
        run(Padded(3, 48, mask="additive", options={"softcap": softcap, "softmax_scale": 0.25}))
        assert launches[-1].fields["mask_factor"] == pytest.approx(factor)


def test_C18_a_mask_takes_families_out_and_says_so(launches: Launches) -> None:
    with trace.recording() as decisions:
        run(Padded(70, 48, mask="bool"))
    [decision] = decisions
    assert decision.family == "flash_sm90"
    for family in ("decode", "mea_decode"):
        reasons = [reason for reason in decision.reasons if f"_{family}_" in reason]
        assert reasons and all("mask: needs" in reason and "got tensor" in reason for reason in reasons)
    with pytest.raises(NoInstance, match="mask"):
        run(Padded(70, 48, mask="bool"), backend="decode")
    with pytest.raises(NoInstance, match="mask tensor: needs additive or bool, got additive_fp32"):
        run(Padded(70, 48, mask="fp32"), backend="flash_sm90")
    assert len(launches) == 1


def test_positions_that_lengths_tell_need_no_kernel_of_their_own(launches: Launches) -> None:
    causal = {"causal": True}
    for case in (
        Padded(16, 16, options=causal),
        Padded(16, 48, options=causal),
        Padded(16, 16, 32, options=causal),
        Padded(16, 48, nonpad=(3, 40)),
    ):
        run(case)
        assert not launches
    for case in (Padded(48, 16, options=causal), Padded(16, 48, nonpad=(3, 40), options=causal)):
        run(case)
        assert (launches[-1].fields["mask"], launches[-1].fields["causal"]) == (0, 1)
    assert len(launches) == 2


def test_a_padding_mask_is_served_by_lengths_and_the_device_decides(launches: Launches) -> None:
    """CPU tensors: paged attention is the reference, so the result is right if and only if it took all rows."""
    case = Padded(5, 48, kv_heads=2, group=2, mask="bool", mask_axes=(True, False, False, True))
    for seen, by_lengths in ((torch.arange(48) < torch.tensor([[9], [48]]), True), (torch.arange(48) % 5 > 0, False)):
        mask = seen.expand(2, 48)[:, None, None].contiguous()
        call = {**case.call(), "attn_mask": mask}
        _, (out, _, _, _) = run(case, attn_mask=mask)
        same = torch.allclose(out.float(), expected(call)[0], atol=5e-3, rtol=5e-3)
        assert same == by_lengths
    assert len(launches) == 2, "the masked kernel, whose prefix sums are zeros where lengths served"
    run(Padded(5, 48, mask="bool", mask_axes=(True, False, False, True), options={"causal": True}))
    assert launches[-1].fields["causal"] == 1


def test_one_program_serves_every_length_of_its_kind(launches: Launches) -> None:
    for queries, keys in ((40, 48), (50, 64), (60, 96)):
        run(Padded(queries, keys, mask="bool"))
    assert len(launches) == 3 and len({made.symbol for made in launches}) == 1
    assert len(launches.symbols) == 1, "the kernel was looked up for one program"


def test_a_causal_program_is_not_used_for_other_positions(launches: Launches) -> None:
    for keys in (8, 16, 24):
        run(Padded(4, keys, 8, mask="fp32", options={"causal": True}))
    assert [made.fields["position"] for made in launches] == [12, 20, 28]


@pytest.mark.parametrize("total", [11, 33, 35, 37])
@pytest.mark.parametrize("sm", sorted(MODELS))
def test_C6_unaligned_masks_go_where_any_alignment_will_do_and_the_others_say_why(total: int, sm: int) -> None:
    capability = Capability.of_sm(sm)
    for kind in (TensorMask.BOOL, TensorMask.ADDITIVE):
        problem = Problem(op="attention", dtype="fp16", head_dim=64, attn_mask=kind, mask_aligned=False, max_k=total)
        refusal = unsupported(problem, capability)
        if refusal is None:
            assert select_entry(declared_rows(), problem, capability).family is Family.MEA
        if refusal is None and Feature.CP_ASYNC in capability.features:
            told = "mask alignment: needs mask rows in multiples of 16 bytes, got unaligned"
            assert told in pa_ops.explain(problem, device=capability)


@pytest.mark.parametrize(("mask", "elements"), [("bool", 16), ("additive", 8), ("fp32", 4)])
def test_C7_rows_are_aligned_in_elements(launches: Launches, mask: str, elements: int) -> None:
    for dtype in NAMES:
        run(Padded(3, 3 * elements, mask=mask, dtype=dtype))
        assert f"_{NAMES[dtype]}_" in launches[-1].symbol
        with pytest.raises(NoInstance, match="mask alignment"):
            run(Padded(3, 3 * elements + 1, mask=mask, dtype=dtype), backend="flash_sm80")


def test_C10_two_head_sizes_have_a_kernel_everywhere() -> None:
    for sm, past in product(MODELS, (0, 31)):
        capability = Capability.of_sm(sm)
        problem = Problem(op="attention", dtype="fp16", head_dim=32, head_dim_v=64, page_size=past + 1)
        if unsupported(problem, capability) is None:
            family = select_entry(declared_rows(), problem, capability).family
            by_maps = sm == 90 and past  # with a page of one token no box can be copied
            assert family in ((Family.FLASH_SM90,) if by_maps else (Family.MEA, Family.MEA_DECODE)), sm


def test_C16_sizes_beyond_32_bits_are_told_whole_or_refused(launches: Launches) -> None:
    wide = torch.empty(1, 1, 64, 256, dtype=torch.float16, device="meta").expand(1 << 14, 128, 64, 256)
    out, _, _, lse = torch.ops.pa_ops.attention(wide, wide, wide, need_present=False)
    assert out.numel() == 1 << 35 and lse.numel() == 1 << 27
    for record in MASKED.values():
        widths = dict(record.fields)
        assert {widths[name] for name in widths if name.endswith("_stride")} == {INT64}
    many = torch.empty(1, 1, 1, 8, dtype=torch.float16).expand(1 << 16, 1, 1 << 15, 8)
    few = torch.zeros(1, 1, 1, 8, dtype=torch.float16).expand(1 << 16, 1, 1, 8)
    with pytest.raises(InvalidArgument, match=r"^q: B \* Sq, .* 32 bits; got 2147483648"):
        padded.attention(many, few, few)
    assert not launches


@cache
def space() -> tuple[Problem, ...]:
    """Of the operator attention: dtype, heads, masks, head sizes, options; past and order of axes are views."""
    heads = ({"num_heads": 8}, {"num_heads": 8, "num_kv_heads": 2})
    sizes = ({"head_dim": d, "head_dim_v": v} for d, v in ((64, 64), (128, 128), (256, 256), (32, 64), (128, 72)))
    pasts = ({"page_size": 48, "tokens": 64}, {"page_size": 33, "tokens": 1})
    options = product((False, True), (False, True), (False, True))
    facts = (
        {"dtype": dtype, "softcap": cap, "sinks": sinks, "aligned": aligned, **head, **size, **past, **hiding}
        for dtype, head, size, past, hiding, (cap, sinks, aligned) in product(
            (*HALVES, DType.FP32), heads, tuple(sizes), pasts, HIDING_OPTIONS[Op.ATTENTION], tuple(options)
        )
    )
    return tuple(dict.fromkeys(map(problem_of, facts)))


def problem_of(facts: dict[str, Any]) -> Problem:
    tensor = "attn_mask" in facts or facts.get("anchored")
    return Problem(op="attention", **{name: fact for name, fact in facts.items() if not tensor or name != "page_size"})


@pytest.mark.parametrize("sm", sorted(MODELS))
def test_C19_no_hole_in_the_space_of_padded_problems(sm: int) -> None:
    capability = Capability.of_sm(sm)
    running = [row for row in declared_rows() if not any(device_rejections(row, capability))]
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for row in running:
        kinds.setdefault((row.spec.dtype, row.spec.layout, row.spec.mask), []).append(row)
    families, served = attention_families(), Counter[str]()
    for problem in space():
        refusal = unsupported(problem, capability)
        near = [
            row
            for (dtype, layout, mask), group in kinds.items()
            if (dtype, layout) == (problem.dtype, problem.layout)
            and (mask is problem.mask or {mask, problem.mask} == {Mask.CAUSAL, Mask.FULL})
            for row in group
        ]
        able = [f for f in families if problem_passes(f, problem) and device_passes(f, problem.dtype, capability)]
        rows_of_able = (row for row in near if row.spec.family in able)
        found = next((row for row in rows_of_able if not any(problem_rejections(row.spec, problem))), None)
        if found is None:
            assert refusal is not None and refusal.reason, f"a hole: {problem} on sm {sm}"
            served["refused"] += 1
        else:
            assert refusal is None, f"{problem} is declared to have no kernel on sm {sm}, and has {found.name}"
            served[found.spec.family] += 1
    assert served["refused"] and (len(served) > 1) == (sm >= 53 and sm != 110), served


def test_C22_overrides_end_with_their_block_whatever_happens(launches: Launches) -> None:
    run(Padded(70, 48, mask="bool"))
    with pytest.raises(NoInstance, match="decode"), pa_ops.backend("decode"):
        run(Padded(70, 48, mask="bool"))
    with pa_ops.backend("flash_sm80"):
        run(Padded(70, 48, mask="bool"))
    run(Padded(70, 48, mask="bool"))
    assert launches.families == ["flash_sm90", "flash_sm80", "flash_sm90"]


def test_every_mask_of_the_helpers_is_a_kind_of_mask_tensor(launches: Launches) -> None:
    for mask in MASKS[1:]:
        run(Padded(3, 48, mask=mask))
    assert {InstanceSpec.parse(made.symbol).mask for made in launches} == {Mask.TENSOR}
    with pytest.raises(NoInstance, match="k_scale"):
        run(Padded(3, 48, mask="bool"), k_scale=torch.ones(1))
    for mask in MASKS:
        case = Padded(3, 48, mask=mask, dtype=torch.float32)
        with pytest.raises(NoInstance, match="no kernel takes float32"):
            run(case)
        out = run(case, backend="reference")[1][0]
        assert torch.equal(out, expected(case.call())[0])
    with pytest.raises(InvalidArgument, match=r"^attn_mask: belongs to the operator attention"):
        Problem(op="paged_attention", dtype="fp16", head_dim=64, attn_mask="bool")
