"""Whatever family serves a problem, the answer is one: every one that selection leaves in, on problems by chance."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch

from helpers.chosen import able, problem_of
from helpers.parity import Evidence, check_each
from helpers.problems import Call, Shape, paged, sinks, varlen

pytestmark = pytest.mark.gpu

PROBLEMS = 200
PAGE_SIZES = (1, 7, 8, 16, 24, 40, 64, 128)
POOLS = ("separate", "fused", "hnd", "packed")
LENGTHS = (0, 1, 3, 16, 64, 130, 200, 400)


def problem_by_chance(number: int, device: torch.device) -> Call:
    """One of the problems: any layout, shape, mask and option that some family serves."""
    rng = random.Random(number)
    dense, head_dim = rng.random() < 0.4, 8 * rng.randint(1, 32)
    shape = Shape(
        head_dim,
        kv_heads=rng.choice((1, 2, 3)),
        group=rng.choice((1, 2, 3, 4, 7, 16)),
        dtype=rng.choice((torch.float16, torch.bfloat16)),
        page_size=rng.choice(PAGE_SIZES),
        pool=rng.choice(POOLS),
        head_dim_v=8 * rng.randint(1, 32) if dense and rng.random() < 0.1 else 0,
    )
    pairs = [
        (rng.randint(0, rng.choice(LENGTHS)), rng.randint(0, rng.choice(LENGTHS))) for _ in range(rng.randint(1, 6))
    ]
    options: dict[str, Any] = {
        "causal": rng.random() < 0.7,
        "sliding_window": rng.choice((0, 0, 0, rng.randint(1, 300))),
        "softcap": rng.choice((0.0, 0.0, 10.0)),
        "sinks": sinks(shape, device) if rng.random() < 0.3 else None,
    }
    return (varlen if dense else paged)([(1, 1), *pairs], shape, device, seed=number, **options)


@pytest.mark.parametrize("number", range(PROBLEMS))
def test_D5_every_eligible_family_agrees(number: int, device: torch.device, evidence: Evidence) -> None:
    call = problem_by_chance(number, device)
    families = able(problem_of(call))
    assert families, "each problem is one that is served"
    check_each(call, families, evidence, f"problem {number}")


def test_D5_every_family_has_its_share_of_the_problems(device: torch.device) -> None:
    found = [able(problem_of(problem_by_chance(number, device))) for number in range(PROBLEMS)]
    counts = Counter(family for families in found for family in families)
    assert {"flash_sm80", "decode", "mea", "mea_decode"} <= counts.keys()
    assert all(count > PROBLEMS // 5 for count in counts.values()), counts
    assert sum(len(families) > 2 for families in found) > PROBLEMS // 2


@pytest.mark.parametrize("softcap", (0.0, 20.0))
@pytest.mark.parametrize("window", (0, 50))
def test_X7_sinks_on_every_family(
    window: int, softcap: float, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    for make, head_dim in product((paged, varlen), (64, 128, 256)):
        shape = Shape(head_dim, kv_heads=2, group=4, dtype=dtype)
        values = torch.linspace(-2, 6, shape.heads, device=device)
        call = make([(1, 130), (70, 200), (0, 9), (3, 2)], shape, device, sinks=values, sliding_window=window)
        call = call.with_options(softcap=softcap)
        families = able(problem_of(call))
        assert len(families) > 1
        check_each(call, families, evidence, f"head size {head_dim}, window {window}, softcap {softcap}")
