"""Scenes for test_operators.py: a product's kernels behind PyTorch's dispatcher, on CPU tensors and a stand-in driver.

Usage: operators_script.py HOME MAKER ..., which are "directly" or "by the interface": how results are made. Each has a
process of its own, forked from this one when all is imported. Prints a line of JSON for each scene: the maker, the
scene's name and what went wrong, "" if nothing did.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pa_ops
from helpers import stand_in
from pa_ops import InvalidArgument, NoInstance, cuda, trace
from pa_ops.schema import SCHEMAS

HALF = torch.float16
SCENES: dict[str, Callable[[], None]] = {}

asked: list[str] = []  # operators that Python was asked to serve
stream = stand_in.current_stream()
said = -1  # the file that the standard output of a maker's process is
place = 0


def scene(function: Callable[[], None]) -> Callable[[], None]:
    SCENES[function.__name__] = function
    return function


def launched() -> list[str]:
    """The launches that the driver was asked for since the last time; it prints where the standard output was."""
    global place
    ctypes.CDLL(None).fflush(None)
    text = os.pread(said, 1 << 24, place)
    place += len(text)
    return [line for line in text.decode().splitlines() if line.startswith("launch")]


def counted(op: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        asked.append(op)
        return cuda.IMPLEMENTATIONS[op](*args, **kwargs)

    return run


def call(op: str, *tensors: Any, **options: Any) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(getattr(torch.ops, stand_in.NAMESPACE), name), overload or "default")(*tensors, **options)


def steady(op: str, *tensors: Any, **options: Any) -> Any:
    """A call that no Python may see."""
    before = list(asked)
    result = call(op, *tensors, **options)
    assert asked == before, f"{op} was left to Python"
    return result


def left(op: str, *tensors: Any, **options: Any) -> Any:
    """A call that Python must see."""
    before = list(asked)
    result = call(op, *tensors, **options)
    assert asked == [*before, op], f"{op} was not left to Python"
    return result


def states() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, 8, 64, dtype=HALF), torch.zeros(8, 3)


def paged(*news: int, heads: int = 8, dtype: torch.dtype = HALF) -> tuple[Tensor, ...]:
    q = torch.zeros(sum(news), heads, 64, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 4, 16, 2, 64, dtype=dtype)
    ends = torch.tensor([0, *news]).cumsum(0).int()
    lengths = torch.full((len(news),), 20, dtype=torch.int32)
    return q, k_cache, v_cache, ends, lengths, torch.ones(len(news), 2, dtype=torch.int32)


def serving(*news: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _, k_cache, v_cache, ends, lengths, table = paged(*news)
    cos = torch.zeros(32, 16)
    rows = torch.zeros(sum(news), 12 * 64, dtype=HALF)
    options = {"num_heads": 8, "num_kv_heads": 2, "cos": cos, "sin": cos}
    return (rows, None, None, k_cache, v_cache, ends, lengths - 5, table), options


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """A call of every operator."""
    tensors, rotary = serving(1, 1, 40)
    q, k_cache, v_cache, ends, *_ = batch = paged(1, 1, 40)
    k = torch.zeros(42, 2, 64, dtype=HALF)
    buffers = {"out": torch.empty_like(q), "lse": torch.empty(8, 42)}
    flat = {"out": torch.empty(42, 8 * 64, dtype=HALF)}
    return {
        "paged_attention": (batch, {"softmax_scale": 0.3, "max_seqlen_q": 40}),
        "paged_attention.out": (batch, {**buffers, "backend": "flash_sm80"}),
        "paged_attention_": (tensors, rotary),
        "paged_attention_.out": (tensors, {**rotary, **flat, "slot_mapping": torch.arange(42)}),
        "varlen_attention": ((q, k, k, ends, ends), {"causal": True}),
        "varlen_attention.out": ((q, k, k, ends, ends), {"out": buffers["out"], "causal": False}),
        "append_kv": ((k, k, k_cache, v_cache, torch.arange(42)), {}),
        "gather_kv": ((k_cache, v_cache, batch[5], ends, k, k.clone()), {}),
        "merge_states": (2 * states(), {}),
    }


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def refused(error: type[Exception], words: str, op: str, *tensors: Any, **options: Any) -> None:
    launched()
    try:
        call(op, *tensors, **options)
    except error as raised:
        assert type(raised) is error and words in str(raised), str(raised)
    else:
        raise AssertionError(f"{words}: not refused")
    assert not launched(), "an error comes before anything is written"


@scene
def a_steady_call_launches_what_python_does_and_enters_none() -> None:
    for op, (tensors, options) in calls().items():
        launched()
        wanted = left(op, *tensors, **options)
        first = launched()
        with trace.recording() as decisions:
            got = steady(op, *tensors, **options)
        second = launched()
        assert len(second) == len(first) == len(decisions) > 0 and decisions[-1] == trace.last(), op
        if "." in op or op in ("append_kv", "gather_kv"):
            assert second == first, f"{op}: the same buffers give the same records"
        results = [(a, b) for a, b in zip(*map(results_of, (wanted, got)), strict=True)]
        for a, b in results:
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride()), op
        heads = [line.split(":")[0] for line in (*first, *second)]
        assert heads[: len(first)] == heads[len(first) :], f"{op}: extents, sizes and streams"


def results_of(result: Any) -> tuple[Tensor, ...]:
    return () if result is None else (result,) if isinstance(result, Tensor) else tuple(result)


@scene
def a_program_serves_every_size_of_its_kind() -> None:
    left("paged_attention", *paged(1, 1, 1, 1, 1))
    for sequences in (4, 5, 6):
        out, lse = steady("paged_attention", *paged(*[1] * sequences))
        assert out.shape == (sequences, 8, 64) and lse.shape == (8, sequences)
    left("paged_attention", *paged(*[1] * 8))
    left("paged_attention", *paged(1, 1, 1, 1, dtype=torch.bfloat16))
    left("paged_attention", *paged(1, 1, 1, 1, heads=12))
    steady("paged_attention", *paged(1, 1, 1, 1))
    q, *rest = paged(1, 1, 1, 1, dtype=torch.bfloat16)
    steady("paged_attention", q, *rest)
    left("paged_attention", q, *rest, softcap=3.0)
    left("paged_attention", q, *rest, max_seqlen_k=40)
    steady("paged_attention", q, *rest, max_seqlen_k=63)


@scene
def B23_nothing_is_launched_for_nothing() -> None:
    launched()
    for _ in range(2):
        out, lse = call("paged_attention", *paged())
        assert out.shape == (0, 8, 64) and lse.shape == (8, 0)
    assert not launched()


@scene
def B24_a_hit_is_checked_as_a_miss_is() -> None:
    good = paged(3)
    left("paged_attention", *good, softcap=1.0)
    steady("paged_attention", *good, softcap=1.0)
    for at, name in enumerate(("q", "k_cache", "v_cache", "cu_seqlens_q", "seqlens_k", "block_table")):
        for wrong, words in ((good[at].double(), f"{name}: dtype"), (good[at].unsqueeze(0), f"{name}: must have")):
            refused(InvalidArgument, words, "paged_attention", *good[:at], wrong, *good[at + 1 :], softcap=1.0)
    refused(InvalidArgument, "softcap", "paged_attention", *good, softcap=-1.0)
    refused(InvalidArgument, "max_seqlen_k", "paged_attention", *good, softcap=1.0, max_seqlen_k=-1)
    refused(InvalidArgument, "softmax_scale", "paged_attention", *good, softmax_scale=0.0)
    refused(InvalidArgument, "sinks", "paged_attention", *good, softcap=1.0, sinks=torch.zeros(2))
    refused(NoInstance, "k_scale", "paged_attention", *good, softcap=1.0, k_scale=torch.ones(1))
    refused(NoInstance, "a" * 40, "paged_attention", *good, softcap=1.0, backend="a" * 40)
    steady("paged_attention", *good, softcap=1.0)


@scene
def G7_gradients_are_refused_where_they_would_be_recorded() -> None:
    good = paged(3)
    call("paged_attention", *good)
    good[0].requires_grad_()
    refused(InvalidArgument, "q: must not require grad", "paged_attention", *good)
    with warnings.catch_warnings(record=True) as warned:
        good[0].float().sum().backward()
    assert not warned, f"a refusal leaves no mark, {warned[0].message}"
    with torch.inference_mode():
        plain = paged(3)
        steady("paged_attention", *plain)
    with torch.no_grad():
        steady("paged_attention", *good)


@scene
def B4_overrides_reach_the_kernels() -> None:
    tensors = paged(3)
    call("paged_attention", *tensors)
    steady("paged_attention", *tensors)

    def family() -> str:
        launch = trace.last()
        assert launch is not None
        return launch.family

    assert family() == "decode"
    overrides: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("flash_sm90", lambda: pa_ops.backend("flash")),
        ("flash_sm80", lambda: pa_ops.backend("flash_sm80")),
        ("mea_decode", lambda: pa_ops.backend("mea")),
        ("flash_sm90", pa_ops.batch_invariant),
        ("flash_sm90", lambda: environment(PA_OPS_BACKEND="flash")),
        ("flash_sm90", lambda: environment(PA_OPS_DISABLE="decode")),
        ("flash_sm80", lambda: environment(PA_OPS_DISABLE="decode,flash_sm90")),
        ("flash_sm90", lambda: environment(PA_OPS_BATCH_INVARIANT="1")),
    )
    for chosen, enter in overrides:
        with enter():
            left("paged_attention", *tensors)
            steady("paged_attention", *tensors)
            assert family() == chosen
        left("paged_attention", *tensors)
        steady("paged_attention", *tensors)
        assert family() == "decode"
    with pa_ops.backend("lean"):
        refused(NoInstance, "pa_ops.backend()", "paged_attention", *tensors)
    for variable in ("PA_OPS_CHECKED", "PA_OPS_DEBUG"):
        with environment(**{variable: "1"}), contextlib.redirect_stderr(None):
            left("paged_attention", *tensors)
            left("paged_attention", *tensors)
    with environment(PA_OPS_CHECKED="1"):
        wrong = tensors[4] + 100
        refused(InvalidArgument, "sequence 0", "paged_attention", *tensors[:4], wrong, tensors[5])
    with environment(PA_OPS_CHECKED="perhaps"):
        refused(InvalidArgument, "PA_OPS_CHECKED", "paged_attention", *tensors)


@scene
def B25_blocks_of_one_thread_leave_others_alone() -> None:
    tensors, calls_each = paged(3), 300

    def work() -> None:
        for _ in range(calls_each):
            call("paged_attention", *tensors)

    def forced() -> None:
        with pa_ops.backend("flash"):
            work()

    with trace.recording() as decisions:
        threads = [threading.Thread(target=target) for target in (work, forced, work, forced)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    families = [decision.family.partition("_")[0] for decision in decisions]
    assert families.count("decode") == families.count("flash") == 2 * calls_each, families[:9]
    assert len(families) == 4 * calls_each


@scene
def a_stream_has_its_own_workspace() -> None:
    tensors = paged(1)
    call("paged_attention", *tensors)
    launched()
    steady("paged_attention", *tensors)
    [first] = launched()
    stream.value = 64
    try:
        left("paged_attention", *tensors)
        launched()
        steady("paged_attention", *tensors)
        [second] = launched()
    finally:
        stream.value = 0
    assert ", stream 0," in first and ", stream 64," in second
    assert first.split(":")[1] != second.split(":")[1], "partial results lie elsewhere"


@scene
def G6_a_driver_error_is_raised_with_its_name() -> None:
    tensors = paged(3)
    call("paged_attention", *tensors)
    steady("paged_attention", *tensors)
    with environment(FAKE_CUDA_ERROR="cuLaunchKernelEx"):
        try:
            call("paged_attention", *tensors)
        except RuntimeError as error:
            assert "cuLaunchKernelEx" in str(error) and "700, CUDA_ERROR_FAKE" in str(error), str(error)
        else:
            raise AssertionError("no error")
    steady("paged_attention", *tensors)


@scene
def arguments_and_results_are_let_go() -> None:
    for op, (tensors, options) in calls().items():
        for _ in range(3):
            call(op, *tensors, **options)
        given = [value for value in (*tensors, *options.values()) if isinstance(value, Tensor)]
        counts = [tensor._use_count() for tensor in given]
        gone = [weakref.ref(result.untyped_storage()) for result in results_of(steady(op, *tensors, **options))]
        with contextlib.suppress(InvalidArgument):
            call(op, tensors[0].double(), *tensors[1:], **options)
        gc.collect()
        assert [tensor._use_count() for tensor in given] == counts, op
        assert all(reference() is None for reference in gone), op


@scene
def a_result_that_there_is_no_memory_for_is_an_error_and_everything_is_let_go() -> None:
    tensors = paged(1)
    many = tensors[0].expand(1 << 19, 8, 64), *tensors[1:]
    call("paged_attention", *many)
    steady("paged_attention", *many)
    counts = [tensor._use_count() for tensor in many]
    launched()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        steady("paged_attention", *many)
    except RuntimeError as error:
        text = str(error)
    else:
        text = "no error"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "can't allocate memory" in text and not launched(), text
    assert [tensor._use_count() for tensor in many] == counts
    steady("paged_attention", *many)


def play_all(home: str, maker: str) -> None:
    """Plays every scene."""
    global said
    out = os.fdopen(os.dup(1), "w")
    said = os.memfd_create("said")
    os.dup2(said, 1)
    stand_in.serve(home, {op: counted(op) for op in SCHEMAS}, directly=maker == "directly")
    for name, play in SCENES.items():
        try:
            play()
            print(json.dumps([maker, name, ""]), file=out, flush=True)
        except BaseException:
            print(json.dumps([maker, name, traceback.format_exc()]), file=out, flush=True)


def main(home: str, *makers: str) -> int:
    """One after the other; 0 if every process came to its end."""
    for maker in makers:
        child = os.fork()
        if not child:
            try:
                play_all(home, maker)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
