"""gather_kv on the GPU: each bit of each token, by every path; and paged attention against gather + dense attention."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.mea import MASKS, gathered
from helpers.parity import error_of
from helpers.problems import Shape, empty_pool, paged, prefix_sums, randn, sinks

pytestmark = pytest.mark.gpu

POOLS = ("separate", "fused", "hnd", "packed")
LENGTHS = ([0, 5, 0, 300, 0], [70, 1, 33], [0, 0], [*[1] * 130, 0, 3])
CLOSE = {torch.float16: (2e-4, 2e-3), torch.bfloat16: (1e-3, 1e-2)}  # two roundings of one sum; absolute, relative


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as int16, so that NaN equals NaN."""
    return tensor.contiguous().view(torch.int16)


def filled_pool(shape: Shape, pages: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Caches of random bits, NaN of every kind among them."""
    generator = torch.Generator(device).manual_seed(seed)
    caches = empty_pool(shape, pages, device)
    for cache in caches:
        noise = torch.randint(-(2**15), 2**15, cache.shape, generator=generator, device=device, dtype=torch.int16)
        cache.copy_(noise.view(shape.dtype))
    return caches


def wanted(cache: Tensor, table: Tensor, lengths: list[int]) -> Tensor:
    """cache[table[b, i // page_size], i % page_size] of every token, zeros where there is no such page."""
    pages, size = cache.shape[:2]
    rows = []
    for row, length in enumerate(lengths):
        at = torch.arange(length, device=cache.device)
        page = table[row].long()[at // size]
        mapped = (page >= 0) & (page < pages)
        found = bits(cache)[page.clamp(0, pages - 1), at % size]
        rows.append(torch.where(mapped[:, None, None], found, 0))
    return torch.cat(rows)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_B13_B14_every_bit_of_every_token(code: str, page_size: int, device: torch.device) -> None:
    for seed, (lengths, pool) in enumerate(product(LENGTHS, POOLS)):
        head_dim = (64, 8, 12, 200)[seed % 4]
        shape = Shape(head_dim, kv_heads=1 + seed % 3, page_size=page_size, pool=pool)
        columns = max(-(-length // page_size) for length in lengths) + 1
        caches = filled_pool(shape, len(lengths) * columns + 3, device, seed)
        table = torch.randperm(len(lengths) * columns, device=device).to(torch.int32).view(len(lengths), columns)
        table[-1, 0], table[0, -1] = -1, 2**31 - 1
        total = sum(lengths)
        results = [c.new_full((total + 3, *c.shape[2:]), 7.0) for c in caches]
        with pa_ops.trace.recording() as calls:
            torch.ops.pa_ops.gather_kv(*caches, table, prefix_sums(lengths, device), *results)
        assert [made.family for made in calls] == ["gather"]
        for result, cache in zip(results, caches, strict=True):
            assert torch.equal(bits(result[:total]), wanted(cache, table, lengths)), f"{code}, {lengths}, {pool}"
            assert (result[total:] == 7).all(), "rows past the last stay as they are"


def test_B14_prefix_sums_that_lie_reach_no_memory_that_is_not_there(device: torch.device) -> None:
    shape = Shape(64, page_size=16)
    caches, table = filled_pool(shape, 9, device, 1), torch.arange(9, device=device).to(torch.int32).view(3, 3)
    for ends in ([0, 40, 10, 48], [5, 9, 20, 30], [0, -7, 3, 2**31 - 1], [2**31 - 1] * 4, [-(2**31), 3, 9, 48]):
        results = [torch.zeros(48, *c.shape[2:], dtype=c.dtype, device=device) for c in caches]
        lies = torch.tensor(ends, dtype=torch.int32, device=device)
        torch.ops.pa_ops.gather_kv(*caches, table, lies, *results)
    torch.cuda.synchronize()


def test_B18_B19_offsets_beyond_32_bits(device: torch.device) -> None:
    shape, pages = Shape(128, kv_heads=8, page_size=256), 8200
    caches = empty_pool(shape, pages, device)
    used = [pages - 1, 3, 8192]
    for cache in caches:
        assert cache.numel() > 2**31
        cache[used] = randn(torch.Generator(device).manual_seed(4), shape.dtype, 3, *cache.shape[1:])
    table = torch.tensor([[0], [0], [0]], dtype=torch.int32, device=device).expand(3, 1).repeat(1, 3)
    table[2] = torch.tensor(used)
    far = pages * 256  # the last sequence begins where a 32-bit count of elements has run over
    ends = torch.tensor([0, 0, far, far + 700], dtype=torch.int32, device=device)
    k, v = (torch.empty(far + 700, 8, 128, dtype=shape.dtype, device=device) for _ in "kv")
    torch.ops.pa_ops.gather_kv(*caches, table, ends, k, v)
    for rows, cache in ((k, caches[0]), (v, caches[1])):
        assert torch.equal(rows[far:], cache[used].flatten(0, 1)[:700])
        assert not rows[768:far].any(), "beyond the block table"


def test_B20_more_tokens_than_blocks(device: torch.device) -> None:
    shape, tokens = Shape(64, kv_heads=1, page_size=16), 200_000
    caches = filled_pool(shape, tokens // 16, device, 2)
    table = torch.randperm(tokens // 16, device=device).to(torch.int32).view(1, -1)
    results = [torch.empty(tokens, *c.shape[2:], dtype=c.dtype, device=device) for c in caches]
    torch.ops.pa_ops.gather_kv(*caches, table, prefix_sums([tokens], device), *results)
    for result, cache in zip(results, caches, strict=True):
        assert torch.equal(bits(result), bits(cache[table[0].long()].flatten(0, 1)))


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_B13_paged_attention_is_gather_and_dense_attention(
    code: str, head_dim: int, page_size: int, device: torch.device
) -> None:
    pairs = [(3, 70), (0, 5), (130, 150), (1, 257), (65, 64), (33, 300), (1, 0)]
    for (mask, options), group in product(MASKS.items(), (1, 2, 4, 7, 8)):
        shape = Shape(head_dim, kv_heads=2, group=group, page_size=page_size)
        call = paged(pairs, shape, device, seed=group, sinks=sinks(shape, device), softcap=4.0, **options)
        call = call.with_options(backend="mea")
        with pa_ops.trace.recording() as calls:
            want, want_lse = (t[..., : call.rows] if t.dim() == 2 else t[: call.rows] for t in gathered(call).run())
        assert [made.family for made in calls] == ["gather", "mea"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PA_OPS_DISABLE", "mea_decode")
            out, lse = (t[..., : call.rows] if t.dim() == 2 else t[: call.rows] for t in call.run())
        where, (absolute, relative) = f"{code}, {mask}, group {group}", CLOSE[shape.dtype]
        torch.testing.assert_close(out, want, atol=absolute, rtol=relative, msg=lambda text, at=where: f"{at}: {text}")
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)
        out, lse = call.run()  # few query rows go to mea_decode, whose sums are in another order
        error_of(out[: call.rows], want, shape.dtype, where)
        torch.testing.assert_close(lse[:, : call.rows], want_lse, atol=1e-3, rtol=1e-3)


def test_A12_G7_a_steady_gather_enters_no_python_and_a_graph_holds_it(device: torch.device) -> None:
    shape = Shape(64, page_size=16)
    caches, table = filled_pool(shape, 8, device, 3), torch.arange(8, device=device).to(torch.int32).view(2, 4)
    ends = prefix_sums([50, 30], device)
    results = [torch.zeros(80, *c.shape[2:], dtype=c.dtype, device=device) for c in caches]
    torch.library.opcheck(torch.ops.pa_ops.gather_kv.default, (*(c.zero_() for c in caches), table, ends, *results))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        torch.ops.pa_ops.gather_kv(*caches, table, ends, *results)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        torch.ops.pa_ops.gather_kv(*caches, table, ends, *results)
    for cache in caches:
        cache.copy_(torch.randn_like(cache))
    ends.copy_(prefix_sums([10, 64], device))
    graph.replay()
    torch.cuda.synchronize()
    for result, cache in zip(results, caches, strict=True):
        assert torch.equal(bits(result[:74]), wanted(cache, table, [10, 64]))


def test_sanitizer_sample_of_gather(device: torch.device) -> None:
    for head_dim, page_size in product((12, 64), (1, 7)):
        shape = Shape(head_dim, kv_heads=3, page_size=page_size)
        caches = filled_pool(shape, 40, device, page_size)
        table = torch.arange(60, device=device).to(torch.int32).view(3, 20) - 5
        ends = prefix_sums([0, 25, 9], device)
        results = [torch.zeros(36, *c.shape[2:], dtype=c.dtype, device=device) for c in caches]
        torch.ops.pa_ops.gather_kv(*caches, table, ends, *results)
        for result, cache in zip(results, caches, strict=True):
            want = wanted(cache, torch.nn.functional.pad(table, (0, 9), value=-1), [0, 25, 9])
            assert torch.equal(bits(result[:34]), want), (head_dim, page_size)
