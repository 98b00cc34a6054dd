"""Mixed batches on the GPU: prefill on the SMs that decode leaves it, to equal bits, whatever lengths there are."""

from __future__ import annotations

import pytest
import torch

import pa_ops
from helpers.hopper import tickets
from helpers.parity import Evidence, check, error_of, expected
from helpers.problems import Shape, paged, prefix_sums
from helpers.rooms import as_it_began

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

BATCHES = {
    "few new tokens": [(1, 3000)] * 40 + [(300, 700)],
    "many": [(1, 500)] * 9 + [(200, 900)] * 12 + [(3, 64)],
    "short ones that decode outlasts": [(1, 9000)] * 20 + [(70, 70)] * 30,
    "long ones that outlast decode": [(1, 200)] * 20 + [(130, 6000)] * 2,
    "one of each": [(64, 64), (1, 100)],
    "some without tokens": [(0, 40), (1, 130), (0, 0), (129, 129), (1, 1)] * 4,
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [0, 250])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_C22_D2_prefill_beside_decode_is_right_and_has_equal_bits(
    batch: str, window: int, head_dim: int, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    call = paged(BATCHES[batch], Shape(head_dim, kv_heads=2, group=4, dtype=dtype), device, sliding_window=window)
    with pa_ops.trace.recording() as calls:
        call.run()
    assert [made.family for made in calls] == ["decode", "flash_sm90"]
    right = check(call, evidence, batch)
    for out, lse in (call.run() for _ in range(10)):
        assert torch.equal(out[: call.rows], right[0]) and torch.equal(lse[:, : call.rows], right[1])
    assert set(tickets()) == {0} and as_it_began(device)


def test_A12_X6_a_graph_of_both_serves_whatever_lengths_come(dtype: torch.dtype, device: torch.device) -> None:
    """Captured with a long sequence, replayed with none, and with nothing else."""
    shape = Shape(128, kv_heads=2, group=4, dtype=dtype)
    call = paged([(1, 700)] * 30 + [(200, 900)], shape, device)
    ends = call.tensors["cu_seqlens_q"]
    out, lse = call.poisoned_results()
    call.run_into(out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run_into(out, lse)
    for news in ([1] * 31, [0] * 30 + [200], [7] * 31, [1] * 30 + [200]):
        ends.copy_(prefix_sums(news, device))
        out.fill_(torch.nan)
        graph.replay()
        rows = sum(news)
        want, _ = expected(call)
        error_of(out[:rows], want[:rows], dtype, str(news))
        assert out[rows:].isnan().all()
    assert set(tickets()) == {0}
