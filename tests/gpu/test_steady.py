"""Calls that no Python sees give the bits, the records and the errors of those that Python serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import pa_ops
from helpers.problems import Shape, paged, varlen
from helpers.served import serve
from helpers.serving import serving, twin
from helpers.streams import side_by_side
from pa_ops import cuda, native

pytestmark = pytest.mark.gpu

MIXED = [(70, 200), (1, 130), (0, 40), (3, 3), (1, 1), (129, 129)]
DECODE = [(1, 300), (1, 17), (1, 64), (1, 1)]


@contextmanager
def no_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block in which a call that is left to Python fails."""

    def run(op: str, *_: object) -> None:
        raise AssertionError(f"{op} was left to Python")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_run", run)
        yield


def warm(call: Callable[[], Any]) -> Any:
    """The result of a call after which its kind is known to the kernels."""
    result = call()
    call()
    assert native.attached(), "this PyTorch has no interface for kernels without Python"
    return result


def same(got: Any, want: Any, rows: int, what: object) -> None:
    """Equal bits of out [T, ...] and lse [H, T] where there is a query."""
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True)
    for number, (a, b) in enumerate(pairs):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride()), what
        assert torch.equal(a[:, :rows] if number else a[:rows], b[:, :rows] if number else b[:rows]), what


def test_A12_steady_attention_gives_the_bits_of_the_first_call(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for head_dim in (64, 80, 128, 256):
        shape = Shape(head_dim, dtype=dtype)
        for pairs, options in ((MIXED, {}), (DECODE, {"max_seqlen_q": 1}), (MIXED, {"sliding_window": 9})):
            for make in (paged, varlen):
                call = make(pairs, shape, device, **options)
                want = warm(call.run)
                with pa_ops.trace.recording() as decisions:
                    getattr(torch.ops.pa_ops, f"_{call.op}")(*call.tensors.values(), **call.options)
                out, lse = call.poisoned_results()
                warm(lambda: call.run_into(out, lse))  # noqa: B023
                again = call.poisoned_results()
                with no_python(monkeypatch), pa_ops.trace.recording() as steady:
                    got = call.run()
                    call.run_into(*again)
                assert [made.instance for made in steady] == 2 * [made.instance for made in decisions]
                same(got, want, call.rows, (head_dim, options))
                same(again, (out, lse), call.rows, (head_dim, options, "into buffers"))


def test_A12_steady_serving_gives_the_bits_of_the_first_call(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for new, past in (([1] * 5, [300, 0, 17, 64, 1]), ([10, 1, 0, 65], [3, 40, 7, 0])):
        for packed in (True, False):
            first = serving(new, past, Shape(64, dtype=dtype), device, packed=packed, rotary_dim=32)
            second, third = twin(first), twin(first)
            want = serve(first)
            serve(second)
            with no_python(monkeypatch):
                got = serve(third)
            same(got, want, sum(new), (new, packed))
            for name in ("k_cache", "v_cache"):
                assert torch.equal(first[name].nan_to_num(), third[name].nan_to_num()), name


def test_A12_steady_helpers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = torch.randn(2, 9, 2, 64, device=device).half()
    slots = torch.tensor([0, 41, -1, 5, 6, 7, 8, 20, -1], device=device)
    lse = torch.randn(2, 9, device=device)
    caches = [torch.zeros(2, 6, 7, 2, 64, device=device).half() for _ in range(2)]
    warm(lambda: torch.ops.pa_ops.append_kv(key, value, *caches[0], slots))
    want = warm(lambda: torch.ops.pa_ops.merge_states(key, lse, value, lse))
    with no_python(monkeypatch):
        torch.ops.pa_ops.append_kv(key, value, *caches[1], slots)
        got = torch.ops.pa_ops.merge_states(key, lse, value, lse)
    assert torch.equal(*caches)
    same(got, want, 9, "merge_states")


def test_A12_X6_graphs_capture_steady_calls(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = paged(DECODE, Shape(128), device)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm(call.run)
    with no_python(monkeypatch), torch.cuda.graph(graph, stream=side):
        out, lse = call.run()
    for seed in range(3):
        call.tensors["q"][: call.rows].normal_(generator=torch.Generator(device).manual_seed(seed))
        graph.replay()
        same((out, lse), call.run(), call.rows, f"replay {seed}")


def test_streams_do_not_meet(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [paged(DECODE * 4, Shape(128), device, seed=seed) for seed in range(3)]
    wanted = [call.run() for call in calls]
    for number, results in enumerate(side_by_side(calls)):
        for call, got, want in zip(calls, results, wanted, strict=True):
            same(got, want, call.rows, number)


def test_G7_steady_calls_pass_opcheck_and_compile(device: torch.device) -> None:
    call = paged(DECODE, Shape(64), device)
    call.tensors["q"] = call.tensors["q"][: call.rows]  # opcheck compares every row, also those that nobody writes
    want = warm(call.run)
    verdicts = torch.library.opcheck(torch.ops.pa_ops.paged_attention.default, tuple(call.tensors.values()))
    assert set(verdicts.values()) == {"SUCCESS"}, verdicts
    compiled = torch.compile(
        lambda *tensors: pa_ops.paged_attention(*tensors)[0] * 2, fullgraph=True, backend="aot_eager"
    )
    for _ in range(3):
        got = compiled(*call.tensors.values())
    assert torch.equal(got[: call.rows], 2 * want[0][: call.rows])


def test_B24_steady_calls_are_checked(device: torch.device) -> None:
    call = paged(MIXED, Shape(64), device)
    warm(call.run)
    for name, tensor in call.tensors.items():
        for wrong, words in ((tensor.double(), f"{name}: dtype"), (tensor.cpu(), "device")):
            with pytest.raises(pa_ops.InvalidArgument, match=words):
                torch.ops.pa_ops.paged_attention(*{**call.tensors, name: wrong}.values())
    with pytest.raises(pa_ops.NoInstance, match="k_scale"):
        call.run(k_scale=torch.ones(1, device=device))
    call.tensors["q"].requires_grad_()
    with pytest.raises(pa_ops.InvalidArgument, match="must not require grad"):
        call.run()
    with torch.inference_mode():
        call.run()


def test_B16_a_result_without_memory_is_pytorch_s_error_and_everything_is_let_go(device: torch.device) -> None:
    call = paged(DECODE, Shape(64), device)
    q = call.tensors["q"].new_zeros(1 << 20, *call.tensors["q"].shape[1:])  # an engine's buffer, of a GiB or more
    tensors = {**call.tensors, "q": q}

    def run() -> None:
        torch.ops.pa_ops.paged_attention(*tensors.values())

    warm(run)
    counts = {name: tensor._use_count() for name, tensor in tensors.items()}
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(device) + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert {name: tensor._use_count() for name, tensor in tensors.items()} == counts
    run()


def test_B4_overrides_reach_steady_calls(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = paged(DECODE, Shape(64, group=2), device)  # seven tokens, and decode takes eight
    warm(call.run)

    def families() -> list[str]:
        with pa_ops.trace.recording() as decisions:
            for _ in range(3):
                call.run()
        return [decision.family.partition("_")[0] for decision in decisions]

    assert families() == ["decode"] * 3
    with pa_ops.backend("flash"):
        assert families() == ["flash"] * 3
    with pa_ops.batch_invariant():
        assert families() == ["decode", "flash"] * 3, "nobody has said that no sequence is longer"
    monkeypatch.setenv("PA_OPS_DISABLE", "decode,mea,mea_decode")
    assert families() == ["flash"] * 3
    monkeypatch.delenv("PA_OPS_DISABLE")
    assert families() == ["decode"] * 3


@pytest.mark.alone
def test_A12_host_time_of_a_decode_step(device: torch.device) -> None:
    """In calls of torch.add, because hosts differ: 2.5 of them were 10 us on the slowest that was met."""
    call = paged(DECODE, Shape(128, kv_heads=8, group=4), device)
    x = torch.zeros(1, device=device)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                work()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        warm(call.run)
        ratio = best(call.run) / best(lambda: torch.add(x, x))
    assert ratio < 2.5, f"a call costs the host {ratio:.2f} times what torch.add does"
