"""Rows of the checklist that concern the serving operator alone: batches, caches, chunks, faults, a serving loop."""

from __future__ import annotations

import pytest
import torch

import pa_ops
from helpers.parity import Evidence, error_of
from helpers.problems import Shape
from helpers.served import CACHES, check, refer, serve
from helpers.serving import images, serving, slot_mapping, twin
from pa_ops.faults import Fault, take_faults

pytestmark = pytest.mark.gpu

C0 = Shape(64, kv_heads=2, group=4, page_size=256)
SMALL = Shape(64, kv_heads=1, group=4, page_size=16)


@pytest.mark.parametrize("batch", [1, 2, 255, 256, 257, 300, 513, 1000, 4097])
def test_B10_B11_B12_any_batch(batch: int, device: torch.device, evidence: Evidence) -> None:
    new = [(7 * row) % 5 for row in range(batch)]
    past = [(13 * row) % 60 for row in range(batch)]
    check(serving(new, past, SMALL, device, rotary_dim=64), evidence, f"batch {batch}")


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_B13_pages_and_groups_read_as_one_row_of_keys(page_size: int, device: torch.device) -> None:
    for group in (1, 2, 4, 7, 8):
        shape = Shape(64, kv_heads=2, group=group, page_size=page_size)
        call = serving([5, 70], [100, 33], shape, device)
        out = serve(call).view(75, shape.heads, 64)
        table, ends = call["block_table"].tolist(), (105, 103)
        keys, values = (
            torch.cat([call[name][table[row]].flatten(0, 1)[:end] for row, end in enumerate(ends)]) for name in CACHES
        )
        starts = torch.tensor([0, 105, 208], dtype=torch.int32, device=device)
        q = call["query"].view(75, shape.heads, 64)
        want, _ = torch.ops.pa_ops.varlen_attention(q, keys, values, call["cu_seqlens_q"], starts)
        error_of(out, want, out.dtype, f"group {group}")


def test_B14_tokens_find_their_sequences(device: torch.device, evidence: Evidence) -> None:
    for new in ([5, 0, 4], [0, 0, 5, 4], [5, 4, 0, 0], [0, *[1] * 130, 0, 3], [0] * 200 + [2] + [0] * 200):
        check(serving(new, [9] * len(new), SMALL, device, rotary_dim=64, spare=5), evidence, new[:6])


def test_B15_nothing_is_padded(device: torch.device) -> None:
    new = [1025, *[1] * 63]
    call = serving(new, [0] * 64, Shape(128, kv_heads=8, group=4), device, rotary_dim=128, packed=True)
    serve(call)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what other tests left would be reused whole, and counted so
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = serve(call)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + 512


@pytest.mark.alone
def test_B19_pages_beyond_32_bit_offsets(device: torch.device, evidence: Evidence) -> None:
    shape = Shape(128, kv_heads=8, group=1, page_size=256)
    call = serving([3, 2], [300, 0], shape, device, rotary_dim=128)
    pool = torch.zeros(2, 8200, 256, 8, 128, dtype=torch.float16, device=device)
    for cache, name in zip(pool, CACHES, strict=True):
        cache[8192 : 8192 + call[name].shape[0]] = call[name]
        call[name] = cache
    call["block_table"] = torch.where(call["block_table"] >= 0, call["block_table"] + 8192, -1)
    check(call, evidence, "pages from 8192 on")
    assert all(cache[:8192].count_nonzero() == 0 for cache in pool)


def test_B20_more_tokens_than_blocks(device: torch.device, evidence: Evidence) -> None:
    check(
        serving([70_000, 3], [0, 5], Shape(64, 1, 1, page_size=256), device, rotary_dim=64), evidence, "70 003 tokens"
    )


def test_B23_no_tokens_and_a_past(dtype: torch.dtype, device: torch.device) -> None:
    for packed in (False, True):
        for rotary_dim in (0, 64):
            shape = Shape(64, kv_heads=2, group=4, page_size=16, dtype=dtype)
            call = serving([0, 0], [30, 5], shape, device, packed=packed, rotary_dim=rotary_dim)
            before = images(call)
            with pa_ops.trace.recording() as calls:
                out = serve(call)
            assert out.shape == (0, 8 * 64) and not calls
            assert all(torch.equal(a, b) for a, b in zip(before, images(call), strict=True))


def test_B24_lengths_that_lie_reach_no_memory_that_is_not_there(device: torch.device) -> None:
    for ends, past in (((0, 9, 2), (-5, 10**9)), ((3, 1, 100), (2**31 - 9, 0)), ((-4, 2, 7), (0, -(2**31)))):
        call = serving([3, 4], [5, 6], C0, device, rotary_dim=64)
        call["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32, device=device)
        call["past_lens"] = torch.tensor(past, dtype=torch.int32, device=device)
        serve(call)
        torch.cuda.synchronize()
    take_faults(device)


def test_B25_choices_coexist_and_auto_is_no_choice(device: torch.device) -> None:
    call = serving([5, 1], [30, 99], C0, device, rotary_dim=64)
    plain = serve(twin(call))
    assert torch.equal(serve(twin({**call, "backend": "auto"})), plain)
    with pa_ops.backend("reference"):
        other = serve(twin(call))
        for family in ("flash", "mea"):
            with pa_ops.backend(family), pa_ops.trace.recording() as decisions:
                error_of(serve(twin(call)), other, plain.dtype, family)
            assert decisions[-1].family.startswith(family)
        with pa_ops.backend("auto"):
            assert torch.equal(serve(twin(call)), plain)
    error_of(plain, other, plain.dtype, "the reference")
    assert torch.equal(serve(twin(call)), plain)


def test_B28_caches_are_updated_in_place_and_opcheck_passes(device: torch.device) -> None:
    call = serving([2, 3], [7, 0], SMALL, device, rotary_dim=32)
    for name in CACHES:
        call[name].nan_to_num_()
    pointers = [call[name].data_ptr() for name in CACHES]
    slots = slot_mapping(call)
    before = images(call)
    serve(call)
    assert [call[name].data_ptr() for name in CACHES] == pointers
    for old, new in zip(before, images(call), strict=True):
        changed = (old != new).flatten(2).any(-1).flatten()
        assert changed.nonzero().flatten().tolist() == sorted(slots.tolist())
    tensors = tuple(call.values())[:8]
    options = {name: call[name] for name in ("num_heads", "num_kv_heads", "cos", "sin")}
    torch.library.opcheck(torch.ops.pa_ops.paged_attention_.default, tensors, options)


def test_D7_a_prefix_that_is_cached_is_read(device: torch.device, evidence: Evidence) -> None:
    call = serving([4], [60], SMALL, device, rotary_dim=64)
    honest = check(call, evidence, "prefix")
    call["v_cache"][call["block_table"][0, 0]] += 1
    assert not torch.equal(serve(call), honest)


@pytest.mark.parametrize("rotary_dim", [0, 64])
def test_D8_chunks_are_one_shot(rotary_dim: int, device: torch.device) -> None:
    whole = serving([33], [0], SMALL, device, packed=True, rotary_dim=rotary_dim)
    rows = whole["query"]
    results = []
    for chunks in ([33], [16, 9, 8], [1] * 33):
        mine, outs, at = twin(whole), [], 0
        for chunk in chunks:
            step = {
                **mine,
                "query": rows[at : at + chunk],
                "cu_seqlens_q": torch.tensor([0, chunk], dtype=torch.int32, device=device),
                "past_lens": torch.tensor([at], dtype=torch.int32, device=device),
            }
            outs.append(serve(step))
            at += chunk
        results.append((torch.cat(outs), images(mine)))
    for out, caches in results[1:]:
        error_of(out, results[0][0], out.dtype, "chunks")
        assert all(torch.equal(a, b) for a, b in zip(caches, results[0][1], strict=True))


def test_D11_a_serving_loop_repeats_itself(device: torch.device) -> None:
    shape, prompts, steps = Shape(64, kv_heads=2, group=4), [2, 11, 22, 44], 20
    generator = torch.Generator(device).manual_seed(7)
    embed = torch.randn(97, shape.heads * 64 + 4 * 64, generator=generator, device=device).half()
    head = torch.randn(shape.heads * 64, 97, generator=generator, device=device).half()
    room = serving([p + steps for p in prompts], [0] * 4, shape, device, rotary_dim=64)

    def generate(cached: int) -> list[int]:
        """Greedy tokens, the first `cached` tokens of each prompt being in the cache already."""
        texts = [[(5 * i + p) % 97 for i in range(p)] for p in prompts]
        past, fresh = [min(cached, p - 1) for p in prompts], []
        fresh = [text[skip:] for text, skip in zip(texts, past, strict=True)]
        for _ in range(steps):
            ends = torch.tensor([0, *map(len, fresh)], device=device).cumsum(0, dtype=torch.int32)
            step = {
                **room,
                "query": embed[torch.tensor([t for tokens in fresh for t in tokens], device=device)],
                "key": None,
                "value": None,
                "cu_seqlens_q": ends,
                "past_lens": torch.tensor(past, dtype=torch.int32, device=device),
            }
            chosen = (serve(step)[ends[1:].long() - 1] @ head).argmax(-1).tolist()
            past = [before + len(tokens) for before, tokens in zip(past, fresh, strict=True)]
            fresh = [[token] for token in chosen]
            for text, token in zip(texts, chosen, strict=True):
                text.append(token)
        return [token for text in texts for token in text]

    warm = generate(0)
    assert all(generate(cached) == warm for cached in (0, 8, 8, 1, 0))


def test_faults_are_raised_by_kernels_and_told_on_demand(device: torch.device, evidence: Evidence) -> None:
    take_faults(device)
    check(serving([3], [4], SMALL, device, rotary_dim=64), evidence, "no fault")
    assert take_faults(device) is Fault.NONE
    call = serving([3], [4], SMALL, device, rotary_dim=64)
    check({**call, "cos": call["cos"][:5], "sin": call["sin"][:5]}, evidence, "cos too short: its last row stands in")
    assert take_faults(device) is Fault.POSITION and take_faults(device) is Fault.NONE
    unmapped = {**call, "block_table": torch.full_like(call["block_table"], -1)}
    serve(unmapped)
    assert take_faults(device) is Fault.SLOT
    before = images(call)
    refer({**unmapped})
    assert all(torch.equal(a, b) for a, b in zip(before, images(call), strict=True))


@pytest.mark.parametrize("head_dim", [8, 40, 72, 136, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_sizes_of_every_kind(
    head_dim: int, interleaved: bool, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for rotary_dim in {2, 6, head_dim // 2, head_dim - 2, head_dim}:
        for fp32 in (False, True):
            call = serving(
                [3, 0, 17],
                [9, 4, 40],
                Shape(head_dim, 2, 3, dtype, 7),
                device,
                rotary_dim=rotary_dim // 2 * 2,
                rotary_interleaved=interleaved,
                packed=True,
            )
            if not fp32:
                call |= {name: call[name].to(dtype) for name in ("cos", "sin")}
            check(call, evidence, f"rotary {rotary_dim} of {head_dim}, fp32 {fp32}")
