"""Launches for tensors of more than 2^33 elements: every stride, extent and grid is right, none is cut to 32 bits."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import programs
from pa_ops.arguments import FLASH_SM90, GATHER, MEA
from pa_ops.checks import RULES, Rule
from pa_ops.launch import Attention, Keys, Rows, Scores, Setting, attention_launch, persistent_launch
from pa_ops.launch_rows import gather_launch
from pa_ops.plan import attention_tiles, work_list
from pa_ops.portions import whole
from pa_ops.program import Guard, Launch, Program
from pa_ops.scratch import workspace_words
from pa_ops.spec import InstanceSpec

TOKENS, HEADS, DIM = 2_000_000, 64, 128
PAGE_SIZE = 16
ELEMENTS = TOKENS * HEADS * DIM
ROW_BYTES = 2 * HEADS * DIM
LAST_ROW = 2 * ELEMENTS - ROW_BYTES
NUM_SMS = 132
MAP_NORESERVE = 0x4000  # Linux; address space alone, which nothing reads or writes


@pytest.fixture
def rows() -> Iterator[Tensor]:
    """[T, H, D] fp16 without memory behind it."""
    assert ELEMENTS == 16_384_000_000
    room = mmap.mmap(-1, 2 * ELEMENTS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    yield torch.frombuffer(room, dtype=torch.float16).view(TOKENS, HEADS, DIM)


def launched(op: str, launch: Launch, given: dict[str, Tensor]) -> programs.Launched:
    """What a call with these tensors launches."""
    rules = {rule.argument: rule for rule in RULES[op]} | {"workspace": Rule("workspace", "words", (torch.int32,))}
    program = Program(0, [Guard(rules[name], tensor, False) for name, tensor in given.items()], [launch])
    made = programs.run(program.address, *given.values())
    assert isinstance(made, list) and len(made) == 1
    return made[0]


def attention(keys: Keys) -> Attention:
    """Attention of as many query heads as there are KV heads."""
    return Attention(Rows.of("q"), Rows.of("out"), keys, HEADS, DIM, DIM, Scores(0.1, 0, 0.0, None), None, None)


def ragged(rows: Tensor) -> dict[str, Tensor]:
    """A call of varlen attention on two sequences: queries, keys, values and results each of all rows."""
    ends = torch.tensor([0, 1, TOKENS], dtype=torch.int32)
    return {"q": rows, "k": rows, "v": rows, "cu_seqlens_q": ends, "cu_seqlens_k": ends, "out": rows}


@pytest.mark.parametrize("family", ["mea", "flash_sm90"])
def test_B18_sixteen_billion_elements_of_ragged_attention(family: str, rows: Tensor) -> None:
    given: dict[str, Any] = ragged(rows)
    call = attention(Keys("k", "v", "cu_seqlens_k", HEADS))
    name = f"pa_attn_{family}_fp16_kvfp16_d128v128_dense_causal_" + (
        "m64n64s1w4" if family == "mea" else "m128n128s3w12"
    )
    spec = InstanceSpec.parse(name)
    if family == "flash_sm90":
        launch = persistent_launch(3, spec, call, Setting(NUM_SMS, whole(NUM_SMS)))
        given["workspace"] = torch.zeros(workspace_words(NUM_SMS), dtype=torch.int32)
        made = launched("varlen_attention.out", launch, given)
        for name, found in programs.maps_of(FLASH_SM90, made.record).items():
            of_token, of_head = (TOKENS, ROW_BYTES), (HEADS, 2 * DIM)
            order = (of_head, of_token) if name == "q_map" else (of_token, of_head)
            sizes, strides = zip(*order, strict=True)
            assert found.sizes == (DIM, *sizes, 1) and found.strides[:2] == strides
            at = sizes.index(TOKENS)
            assert found.strides[at] * (found.sizes[1 + at] - 1) == LAST_ROW > 2**34
        assert (made.x, made.y) == (NUM_SMS, 1)
        return
    made = launched("varlen_attention.out", attention_launch(3, spec, call, Setting(NUM_SMS, whole(NUM_SMS))), given)
    fields = MEA.unpack(made.record)
    assert (fields["tokens"], fields["keys"]) == (TOKENS, TOKENS)
    assert all(fields[f"{each}_token_stride"] * (TOKENS - 1) == LAST_ROW for each in ("q", "k", "v", "out"))
    assert (made.x, made.y) == (TOKENS // 64 + 1, HEADS)


def test_B18_sixteen_billion_elements_of_pages(rows: Tensor) -> None:
    cache = rows.view(-1, PAGE_SIZE, HEADS, DIM)
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    table = torch.zeros(1, len(cache), dtype=torch.int32)
    given = {"k_cache": cache, "v_cache": cache, "block_table": table, "cu_seqlens_k": ends, "k": rows, "v": rows}
    made = launched("gather_kv", gather_launch(3, HEADS, DIM, DIM, page_size=PAGE_SIZE), given)
    fields = GATHER.unpack(made.record)
    assert fields["num_pages"] * PAGE_SIZE == fields["tokens"] == TOKENS
    for letter in "kv":
        last = fields[f"{letter}_page_stride"] * (len(cache) - 1) + fields[f"{letter}_token_stride"] * (PAGE_SIZE - 1)
        assert last == LAST_ROW == fields[f"to_{letter}_token_stride"] * (TOKENS - 1)
    assert (made.x, made.y) == (programs.MAX_BLOCKS, 1), "blocks take several tokens each"


@pytest.mark.parametrize("rows_a_tile", [16, 64, 128])
def test_B18_tiles_of_two_million_tokens(rows_a_tile: int) -> None:
    lengths = [1, TOKENS - 2, 0, 1]
    work = list(work_list(lengths, rows_a_tile))
    assert sum(each.rows for each in work) == TOKENS
    assert len(work) <= attention_tiles(TOKENS, len(lengths), rows_a_tile) <= len(work) + len(lengths)
    assert attention_tiles(TOKENS, 1, rows_a_tile) * rows_a_tile >= TOKENS
