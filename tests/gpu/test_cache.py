"""append_kv and merge_states on the GPU: in place, complete at any size; and 64-bit offsets everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.parity import Evidence, check, error_of
from helpers.problems import Call, Shape, empty_pool, prefix_sums, randn, varlen
from helpers.profile import traced
from pa_ops import reference

pytestmark = pytest.mark.gpu

POOLS = ("separate", "fused", "hnd", "packed")
MANY = 200_000  # tokens; 8 heads of 128 are 25.6M 16-byte vectors, more than 65535 blocks of 256 threads


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as int16, so that NaN equals NaN."""
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize("pool", POOLS)
def test_B28_X3_append_changes_the_named_slots_only(pool: str, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    for head_dim in (8, 40, 64, 128, 200, 256):
        shape = Shape(head_dim, kv_heads=3, dtype=dtype, page_size=16, pool=pool)
        caches = empty_pool(shape, 40, device)
        slots = torch.randperm(40 * 16, generator=generator, device=device)[:333]
        slots[::7] = -1
        packed = randn(generator, dtype, 340, 12, head_dim)
        key, value = packed[:333, 6:9], packed[:333, 9:12]
        want = [cache.clone() for cache in caches]
        reference.append_kv(key, value, *want, slots)
        pointers = [cache.data_ptr() for cache in caches]
        with pa_ops.trace.recording() as calls:
            torch.ops.pa_ops.append_kv(key, value, *caches, slots)
        assert [made.family for made in calls] == ["append"]
        assert [cache.data_ptr() for cache in caches] == pointers
        for got, expected in zip(caches, want, strict=True):
            assert torch.equal(bits(got), bits(expected)), f"{pool}, head size {head_dim}"


def test_B28_schema_marks_the_mutation_and_opcheck_passes(device: torch.device) -> None:
    schema = str(torch.ops.pa_ops.append_kv.default._schema)
    assert "Tensor(a!) k_cache" in schema and "Tensor(b!) v_cache" in schema
    shape = Shape(64, kv_heads=2, page_size=16)
    caches = [cache.zero_() for cache in empty_pool(shape, 4, device)]
    generator = torch.Generator(device).manual_seed(2)
    key, value = (randn(generator, shape.dtype, 5, 2, 64) for _ in "kv")
    slots = torch.tensor([0, 17, -1, 63, 5], device=device)
    torch.library.opcheck(torch.ops.pa_ops.append_kv.default, (key, value, *caches, slots))
    call = varlen([(5, 9), (2, 2)], shape, device)
    call.tensors["q"] = call.tensors["q"][:7]
    torch.library.opcheck(torch.ops.pa_ops.varlen_attention.default, tuple(call.tensors.values()))
    with pytest.raises(pa_ops.InvalidArgument, match="k_cache"):
        torch.ops.pa_ops.append_kv(key, value, caches[0][:1].expand(4, -1, -1, -1), caches[1], slots)


@pytest.mark.alone
def test_B19_page_offsets_beyond_32_bits(device: torch.device, evidence: Evidence) -> None:
    shape = Shape(128, kv_heads=8, group=1, page_size=256)
    pages = 8200
    caches = empty_pool(shape, pages, device)
    assert caches[0].numel() > 2**31
    generator = torch.Generator(device).manual_seed(4)
    used = [pages - 1, 3, 8192, pages - 5]
    length = 1000
    key, value = (randn(generator, shape.dtype, length, 8, 128) for _ in "kv")
    positions = torch.arange(length)
    slots = (torch.tensor(used)[positions // 256] * 256 + positions % 256).to(device)
    torch.ops.pa_ops.append_kv(key, value, *caches, slots)
    for cache, new in zip(caches, (key, value), strict=True):
        assert torch.equal(cache.view(-1, 8, 128)[slots], new)
    q = randn(generator, shape.dtype, 130, 8, 128)
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    table = torch.tensor([used], dtype=torch.int32, device=device)
    cu_seqlens = prefix_sums([130], device)
    with pa_ops.trace.recording() as calls:
        out, _ = torch.ops.pa_ops.paged_attention(q, *caches, cu_seqlens, lengths, table)
    small = [cache[used].float() for cache in caches]
    local = torch.arange(4, dtype=torch.int32, device=device)[None]
    want, _ = reference.paged_attention(q.float(), *small, cu_seqlens, lengths, local)
    evidence.add(calls, error_of(out, want, shape.dtype, "pages past 8192"))


@pytest.mark.alone
def test_B18_two_to_the_31_elements_of_keys(device: torch.device, evidence: Evidence) -> None:
    shape = Shape(128, kv_heads=64, group=1, dtype=torch.bfloat16)
    sequences, length = 256, 1024
    k, v = (torch.full((sequences * length, 64, 128), torch.nan, dtype=shape.dtype, device=device) for _ in "kv")
    assert k.numel() == 2**31
    generator = torch.Generator(device).manual_seed(5)
    for tensor in (k, v):
        tensor[-length:] = randn(generator, shape.dtype, length, 64, 128)
    q = randn(generator, shape.dtype, sequences, 64, 128)
    cu_q, cu_k = prefix_sums([1] * sequences, device), prefix_sums([length] * sequences, device)
    with pa_ops.trace.recording() as calls:
        out, _ = torch.ops.pa_ops.varlen_attention(q, k, v, cu_q, cu_k)
    one = prefix_sums([1], device), prefix_sums([length], device)
    want, _ = reference.varlen_attention(q[-1:].float(), k[-length:].float(), v[-length:].float(), *one)
    evidence.add(calls, error_of(out[-1:], want, shape.dtype, "the last sequence"))


@pytest.mark.alone
def test_B20_helper_grids_are_capped_and_complete(device: torch.device, tmp_path: Path) -> None:
    generator = torch.Generator(device).manual_seed(6)
    key, value = (randn(generator, torch.float16, MANY, 8, 128) for _ in "kv")
    caches = [torch.empty(MANY // 16, 16, 8, 128, dtype=torch.float16, device=device) for _ in "kv"]
    slots = torch.randperm(MANY, generator=generator, device=device)
    other = torch.full_like(value, torch.nan)
    lse = torch.zeros(8, MANY, device=device)
    nothing = torch.full_like(lse, -torch.inf)
    merged: list[Tensor] = []

    def work() -> None:
        torch.ops.pa_ops.append_kv(key, value, *caches, slots)
        merged[:] = torch.ops.pa_ops.merge_states(value, lse, other, nothing)

    kernels = [event for event in traced(tmp_path / "trace.json", work) if event["cat"] == "kernel"]
    assert len(kernels) == 2, [event["name"] for event in kernels]
    for event in kernels:
        assert max(event["args"]["grid"]) <= 65535, event
    for cache, new in zip(caches, (key, value), strict=True):
        assert torch.equal(cache.view(MANY, 8, 128)[slots], new)
    assert torch.equal(merged[0], value) and torch.equal(merged[1], lse)


def test_X8_two_halves_merge_to_the_whole(dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    for head_dim, cut in ((64, 64), (96, 1), (128, 130), (256, 299)):
        shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype)
        whole = varlen([(40, 300)], shape, device, seed=head_dim, causal=False)
        out, lse = check(whole, evidence, f"whole, head size {head_dim}")
        states: list[Tensor] = []
        for part in (slice(0, cut), slice(cut, 300)):
            tensors = dict(whole.tensors)
            tensors["q"] = tensors["q"][:40]
            tensors["k"], tensors["v"] = tensors["k"][part], tensors["v"][part]
            tensors["cu_seqlens_k"] = prefix_sums([part.stop - part.start], device)
            states += Call("varlen_attention", tensors, 40, {"causal": False}).run()
        with pa_ops.trace.recording() as calls:
            merged_out, merged_lse = torch.ops.pa_ops.merge_states(*states)
        assert [made.family for made in calls] == ["merge"]
        evidence.add(calls, error_of(merged_out, out.float(), dtype, f"merged out, head size {head_dim}"))
        error_of(merged_lse, lse, dtype, f"merged lse, head size {head_dim}")


def test_X8_infinite_states_are_empty(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(8)
    out = randn(generator, dtype, 4, 2, 64)
    lse = torch.tensor([[0.5, -torch.inf, torch.inf, -torch.inf]] * 2, device=device)
    out[1:] = torch.nan
    other = randn(generator, dtype, 4, 2, 64)
    other_lse = torch.tensor([[-torch.inf, 2.0, -1.0, torch.inf]] * 2, device=device)
    other[0] = torch.nan
    other[3] = torch.inf
    for states in ((out, lse, other, other_lse), (other, other_lse, out, lse)):
        merged, merged_lse = torch.ops.pa_ops.merge_states(*states)
        assert torch.equal(merged[0], out[0]) and torch.equal(merged[1:3], other[1:3])
        assert not merged[3].any(), "two empty states give exact zeros"
        assert torch.equal(merged_lse, torch.tensor([[0.5, 2.0, -1.0, -torch.inf]] * 2, device=device))
