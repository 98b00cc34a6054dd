"""Memory as bulk copies find it: pages, pools and strides of every kind that a tensor map of flash_sm90 has to tell."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

from helpers.hopper import MASKS, MIXED, OPERATORS, SIZES, on_sm90
from helpers.parity import Evidence
from helpers.problems import Call, Shape, moved_far, paged, punch_holes, varlen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

POOLS = ("separate", "fused", "hnd", "packed")
SAMPLES = {"40": {"head_dim": 40}, **{name: SIZES[name] for name in ("96", "128", "192-128", "256")}}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("page_size", [8, 16, 24, 48, 64, 128, 256])
def test_X1_X9_D6_D10_pages_and_pools(page_size: int, pool: str, device: torch.device, evidence: Evidence) -> None:
    lengths = sorted({page_size - 1, page_size, page_size + 1, 2 * page_size + 1, 300})
    pairs = [(new, kv) for kv in lengths for new in (1, 17, kv)]
    dtypes, masks = cycle((torch.float16, torch.bfloat16)), cycle(MASKS)
    for sizes in ({"head_dim": 40}, *SIZES.values()):
        shape = Shape(**sizes, kv_heads=2, group=3, dtype=next(dtypes), page_size=page_size, pool=pool)
        mask = next(masks)
        call = paged(pairs, shape, device, seed=page_size, **MASKS[mask])
        on_sm90(call, evidence, f"pages of {page_size}, {pool}, {sizes}, {mask}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_X11_every_head_size(operator: str, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    masks = cycle(MASKS)
    for head_dim in range(8, 257, 8):
        mask, shape = next(masks), Shape(head_dim, kv_heads=1, group=2, dtype=dtype)
        call = OPERATORS[operator](MIXED, shape, device, seed=head_dim, **MASKS[mask])
        on_sm90(call, evidence, f"head size {head_dim}, {mask}")


def expanded(call: Call, heads: int) -> Call:
    """The call with its one KV head as `heads` heads, which are one in memory."""
    names = [name for name in call.tensors if name in ("k", "v", "k_cache", "v_cache")]
    views = {name: call.tensors[name].expand(*call.tensors[name].shape[:-2], heads, -1) for name in names}
    assert all(view.stride(-2) == 0 for view in views.values())
    return Call(call.op, {**call.tensors, **views}, call.rows, call.options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_X9_heads_that_are_one_in_memory(
    operator: str, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for sizes in SIZES.values():
        call = OPERATORS[operator](MIXED, Shape(**sizes, kv_heads=1, group=8, dtype=dtype), device)
        on_sm90(expanded(call, 4), evidence, f"a stride of 0 over heads of {sizes}")


def test_X9_queries_and_keys_are_slices_of_wider_rows(device: torch.device, evidence: Evidence) -> None:
    for head_dim in sorted({40, *(sizes["head_dim"] for sizes in SIZES.values())}):
        call = varlen(MIXED, Shape(head_dim), device)
        q, k, v = (call.tensors[name] for name in "qkv")
        packed = q.new_full((max(q.shape[0], k.shape[0]), 8 + 2 + 2, head_dim + 8), torch.nan)
        views = packed[: q.shape[0], :8], packed[: k.shape[0], 8:10], packed[: k.shape[0], 10:]
        for name, view, tensor in zip("qkv", views, (q, k, v), strict=True):
            call.tensors[name] = view[..., 8:]
            call.tensors[name].copy_(tensor)
        on_sm90(call, evidence, f"slices of packed rows, head size {head_dim}")


@pytest.mark.alone
def test_B18_B19_offsets_beyond_32_bits(device: torch.device, evidence: Evidence) -> None:
    call = paged([(3, 300), (70, 513)], Shape(128, kv_heads=8, group=1, page_size=256), device)
    on_sm90(moved_far(call, 8300), evidence, "pages beyond 2^31 elements")


def test_X2_holes_are_masked_box_by_box(device: torch.device, evidence: Evidence) -> None:
    for page_size, causal in product((8, 16, 24, 64), (False, True)):
        call = paged([(5, 300), (1, 64), (40, 40)], Shape(64, page_size=page_size), device, causal=causal)
        punch_holes(call)
        call.tensors["block_table"][0, 4] = -(2**31)
        out, lse = on_sm90(call, evidence, f"holes, pages of {page_size}, causal {causal}")
        assert not out[-40:].any() and (lse[:, -40:] == -torch.inf).all(), "no mapped page: exact zeros"


def test_X2_a_pool_without_pages(device: torch.device, evidence: Evidence) -> None:
    call = paged([(5, 40), (70, 300)], Shape(64), device)
    call.tensors |= {name: call.tensors[name][:0] for name in ("k_cache", "v_cache")}
    call.tensors["block_table"].fill_(-1)
    call.tensors["block_table"][1, 3] = 0
    out, lse = on_sm90(call, evidence, "no pages")
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("sizes", SAMPLES)
def test_sanitizer_sample_of_flash_sm90(sizes: str, device: torch.device, evidence: Evidence) -> None:
    pairs = [(0, 0), (3, 17), (0, 9), (20, 5), (1, 80), (66, 70)]
    for page_size, options in product((8, 48), MASKS.values()):
        shape = Shape(**SAMPLES[sizes], kv_heads=1, group=3, dtype=torch.bfloat16, page_size=page_size)
        on_sm90(paged(pairs, shape, device, **options), evidence, f"{sizes}, {page_size}, {options}")
        on_sm90(varlen(pairs, shape, device, **options), evidence, f"{sizes}, {options}")
