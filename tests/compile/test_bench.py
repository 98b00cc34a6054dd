"""The bench's cases, its check against the reference and its files, on CPU tensors; times are the GPU's affair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from pa_ops import bench, bench_timers, cli, evidence
from pa_ops.bench import Case
from pa_ops.errors import InvalidArgument

SMALL = Case("small", num_seqs=2, new=5, ctx=40, window=7, heads=4, kv_heads=2, head_dim=64, dtype="fp16")
CPU = torch.device("cpu")


def test_pairs_and_bytes_count_what_is_visible() -> None:
    assert Case("x", num_seqs=3, new=4, ctx=4).pairs == 3 * (1 + 2 + 3 + 4)
    assert Case("x", num_seqs=1, new=2, ctx=10, window=4).pairs == 8
    assert Case("x", num_seqs=1, new=1, ctx=10, kv_heads=2, head_dim=64).kv_bytes == 2 * 10 * 2 * 64 * 2
    assert Case("x", num_seqs=1, new=1, ctx=10, window=4, kv_heads=2, head_dim=64).kv_bytes == 2 * 4 * 2 * 64 * 2


def test_a_measured_case_is_right_and_a_wrong_result_is_seen() -> None:
    row = bench.measure(SMALL, CPU, lambda call: 100.0)
    assert row.right and row.worst_error <= 5e-3
    assert row.tflops == pytest.approx(SMALL.flops / 1e8)
    inputs = bench.inputs_of(SMALL, CPU)
    out, _ = bench.call_of(SMALL, inputs)()
    out[-1, -1, -1] += 1.0
    assert bench.error_of(SMALL, inputs, out) > 0.9


def test_E12_options_reach_the_case() -> None:
    (case,) = bench.cases_of("swa", ctx=4096, window=1024, dtype="fp16")
    assert (case.ctx, case.window, case.num_seqs, case.dtype) == (4096, 1024, 8, "fp16")
    assert "8 x 1 of 4096 window 1024" in str(case)
    assert [case.new for case in bench.cases_of("all", ctx=100)] == [100, 100, 1, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"name": "race"}, "case"), ({"name": "swa", "ctx": 0}, "ctx"), ({"name": "swa", "dtype": "fp8"}, "dtype")],
)
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{words}: must be"):
        bench.cases_of(**options)  # type: ignore[arg-type]


def test_rows_are_evidence_that_the_coverage_report_reads(tmp_path: Path) -> None:
    row = bench.measure(SMALL, CPU, lambda call: 100.0)
    evidence.write_timed(tmp_path / "bench.json", bench.timed([row]))
    ((key, (read,)),) = evidence.load_timed(tmp_path / "bench.json").items()
    assert key == (row.instance, "") and (read.case, read.microseconds, read.tflops) == ("small", 100.0, row.tflops)
    assert evidence.load_timed(tmp_path / "none") == {}
    (tmp_path / "bench.json").write_text('{"rows": [{}]}')
    with pytest.raises(InvalidArgument, match=r"bench\.json: must be what pa-ops bench --json writes"):
        evidence.load_timed(tmp_path / "bench.json")


@pytest.mark.parametrize("changes", [{"new": 40}, {"new": 1}, {}])
def test_a_peer_computes_the_same(changes: dict[str, int]) -> None:
    case = replace(SMALL, window=0, **changes)
    inputs = bench.inputs_of(case, CPU)
    want, _ = bench.call_of(case, inputs)()
    ((name, peer),) = bench.peers_of(case, inputs).items()
    got = peer().transpose(1, 2).reshape(want.shape)
    assert name == "SDPA" and torch.allclose(got.float(), want.float(), atol=5e-3)
    assert bench.peers_of(SMALL, inputs) == {}, "it has no sliding window"
    assert bench.measure(case, CPU, lambda call: 100.0).peers == {"SDPA": 100.0}


class Device:
    """A GPU that takes 3 ms for each call, and whose clock is asked by the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Mark(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr("pa_ops.bench_timers.perf_counter", lambda: 3e-3 * self.calls)

    def call(self) -> None:
        self.calls += 1


class Mark:
    """An event of it."""

    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1

    def record(self) -> None:
        self.at = self.device.calls

    def synchronize(self) -> None:
        assert self.at >= 0, "nobody waits for what was not recorded"

    def elapsed_time(self, end: Mark) -> float:
        return 3.0 * (end.at - self.at)


def test_every_timer_gives_the_microseconds_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    for timer in (bench_timers.one_by_one, bench_timers.back_to_back, bench_timers.looping(0.5)):
        assert timer(device.call) == pytest.approx(3000.0)


def test_no_timer_keeps_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's may be 134 MB; and where the last one's memory is free, the next one gets it again."""
    device, kept, most = Device(monkeypatch), WeakSet[Tensor](), 0

    def call() -> Tensor:
        nonlocal most
        device.call()
        result = torch.zeros(1)
        kept.add(result)
        most = max(most, len(kept))
        return result

    for timer in (bench_timers.one_by_one, bench_timers.back_to_back, bench_timers.looping(0.5)):
        timer(call)
    assert most == 1


@pytest.mark.parametrize("seconds", [0.01, 0.5, 2.0])
def test_a_loop_takes_as_long_as_it_is_told(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    bench_timers.looping(seconds)(device.call)
    chunk = 3e-3 * bench_timers.CHUNK
    wanted = sum(max(each, 2 * chunk) for each in (bench_timers.LEAD_SECONDS, seconds))
    assert wanted <= 3e-3 * device.calls < wanted + 2 * chunk


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan"), float("inf")])
def test_a_loop_of_no_time_or_too_much_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgument, match=r"^loop: must be seconds, more than 0 and at most 60"):
        bench_timers.looping(seconds)


def test_a_table_has_times_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--case", "mea", "--loop", "1"]) == 1
    assert "loop: must be for one of prefill, chunk, decode, swa, all; got case 'mea'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_bench_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--case", "swa"]) == 1
    assert "bench times kernels on an NVIDIA GPU" in capsys.readouterr().err
