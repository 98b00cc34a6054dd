"""The serving operator's parity matrices on the GPU: onnxruntime's quick one whole, its full one by sample."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from helpers.parity import Evidence
from helpers.problems import Shape
from helpers.served import check
from helpers.serving import serving

pytestmark = pytest.mark.gpu

ROTARY = ((True, False), (True, True), (False, False))  # (rotary, interleaved)
QUICK = tuple(product((False, True), ROTARY, (False, True), (0.0, 50.0)))
REGRESSIONS = (
    # new tokens, longest total, rotary
    ([10, 0, 0, 0], 64, True),
    ([0, 7, 0, 3], 64, True),
    ([10, *[0] * 15], 64, True),
    ([65, 0], 128, True),
    ([65, 0], 128, False),
    ([10, 0, 0, 0], 64, False),
    ([0, 0, 0, 5], 64, True),
)
LENGTHS = (
    (3, 1024),
    (1, 339),
    (408, 800),
    (333, 799),
    (64, 2048),
    (837, 4000),
    (17, 49),
    (257, 257),
    (459, 459),
)
FULL = {
    "batch": (1, 3, 5),
    "lengths": LENGTHS,
    "heads": ((6, 6), (6, 3), (9, 9), (9, 3)),
    "head_dim": (32, 40, 64, 80, 96, 128, 160, 192, 224, 256),
    "page_size": (256, 512),
}


@pytest.mark.parametrize(("local", "rotary", "packed", "softcap"), QUICK)
def test_A10_quick_matrix(
    local: bool, rotary: tuple[bool, bool], packed: bool, softcap: float, device: torch.device, evidence: Evidence
) -> None:
    draw = random.Random(str((local, rotary, packed, softcap)))
    new = [draw.randint(1, 1025) for _ in range(4)]
    past = [draw.randint(0, 2047 - 1025) for _ in range(4)]
    call = serving(
        new,
        past,
        Shape(256, kv_heads=8, group=4, page_size=256),
        device,
        packed=packed,
        rotary_dim=256 if rotary[0] else 0,
        rotary_interleaved=rotary[1],
        sliding_window=draw.randint(1, 2046) if local else 0,
        softcap=softcap,
    )
    check(call, evidence, f"new {new}, past {past}")


@pytest.mark.parametrize(("new", "total", "rotary"), REGRESSIONS)
def test_A10_regressions(
    new: list[int], total: int, rotary: bool, dtype: torch.dtype, device: torch.device, evidence: Evidence
) -> None:
    draw = random.Random(str(new))
    shape = Shape(64, kv_heads=2, group=4, page_size=256, dtype=dtype)
    past = [draw.randint(0, total - max(new)) for _ in new]
    check(serving(new, past, shape, device, rotary_dim=64 if rotary else 0), evidence, f"new {new}, past {past}")


@pytest.mark.parametrize("number", range(48))
def test_A10_full_matrix_sampled(number: int, dtype: torch.dtype, device: torch.device, evidence: Evidence) -> None:
    draw = random.Random(number)
    point = {axis: draw.choice(values) for axis, values in FULL.items()}
    longest, total = point["lengths"]
    heads, kv_heads = point["heads"]
    head_dim = point["head_dim"]
    rotary, interleaved = draw.choice(ROTARY)
    call = serving(
        [draw.randint(1, longest) for _ in range(point["batch"])],
        [draw.randint(0, total - longest) for _ in range(point["batch"])],
        Shape(head_dim, kv_heads, heads // kv_heads, dtype, point["page_size"]),
        device,
        seed=number,
        packed=draw.random() < 0.5,
        rotary_dim=draw.choice((head_dim, head_dim // 2)) if rotary else 0,
        rotary_interleaved=interleaved,
        sliding_window=draw.choice((0, draw.randint(1, total))),
        softcap=draw.choice((0.0, 50.0)),
        sinks=draw.choice((None, torch.linspace(-2, 6, heads, device=device))),
    )
    check(call, evidence, point)


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("pool", ["separate", "fused", "hnd", "packed"])
def test_X1_X9_D10_pages_of_any_size_and_layout(
    page_size: int, pool: str, device: torch.device, evidence: Evidence
) -> None:
    shape = Shape(64, kv_heads=2, group=7, page_size=page_size, pool=pool)
    call = serving([3, 0, 65, 1], [13, 100, 0, 255], shape, device, rotary_dim=32, packed=True)
    check(call, evidence, f"pages of {page_size}, {pool}")
