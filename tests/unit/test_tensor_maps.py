"""What a call tells the copy engine of its tensors: the words of programs, and the maps that come of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from generator.tiles import FLASH_SM90_SPLIT_TILES, FLASH_SM90_TILES
from helpers import plain, programs
from helpers.problems import Shape, empty_pool
from pa_ops.arguments import CONSTANT_BASE, FLASH_SM90, MAP_ALIGNMENT, MAP_BYTES, Record
from pa_ops.checks import RULES, Rule
from pa_ops.launch import Attention, Keys, Rows, Scores, Setting, persistent_launch
from pa_ops.plan import columns_of
from pa_ops.portions import whole
from pa_ops.program import (
    MAP_DTYPES,
    Address,
    Grid,
    GridRule,
    Guard,
    Launch,
    Program,
    Size,
    Source,
    Stride,
    TensorMap,
    Value,
)
from pa_ops.scratch import tiles_at, workspace_words
from pa_ops.spec import InstanceSpec, Layout

CPU = torch.device("cpu")
NUM_SMS = 132
NAME = "pa_attn_flash_sm90_fp16_kvfp16_{sizes}_{layout}_causal_m192n112s3w16"
NAMES = {"gather": ("k_cache", "v_cache", "seqlens_k"), "dense": ("k", "v", "cu_seqlens_k")}


def words_of(program: Program) -> Iterator[int]:
    """The words of a program, one after another."""
    words = programs.Words(program.address)
    while True:
        yield words.one()


def test_a_tensor_map_is_one_patch_of_128_bytes() -> None:
    record = Record(addresses=("x",), maps=("first", "second"))
    sizes: tuple[Value, Value, Value, Value] = (64, Size("x", 0), 2, 1)
    made = TensorMap(Address("x", 32), sizes, (Stride("x", 0, 2), 256, 0), (64, 16, 4), torch.bfloat16)
    x = torch.zeros(5, 64).bfloat16()
    guard = Guard(Rule("x", "T D", (torch.bfloat16,)), x, aligned=True)
    sources: dict[str, Source] = {"x": 0, "first": made, "second": made._replace(box=(32, 8, 1))}
    words = words_of(Program(0, [guard], [Launch(7, record, sources, Grid(GridRule.FIXED, 3, 1))]))
    head = [next(words) for _ in range(3 + 4 + 2 * 3)]
    assert head[:3] == [1, 1, 0], "one tensor, one step, device 0"
    assert [next(words) for _ in range(8)] == [7, record.size, 2, GridRule.FIXED, 3, 1, 0, 1]
    assert not any(next(words) for _ in range(record.size // 8)), "the record comes without its maps"
    values = [(0, 0, 1, 32), (3, 0, 0, 64), (2, 0, 1, 0), (3, 0, 0, 2), (3, 0, 0, 1)]
    values += [(1, 0, 2, 0), (3, 0, 0, 256), (3, 0, 0, 0)]
    for name, box in (("first", (64, 16, 4)), ("second", (32, 8, 1))):
        patch = [next(words) for _ in range(2 + 4 + 8 * 4)]
        assert patch[:6] == [record.offsets[name], MAP_BYTES, *box, MAP_DTYPES[torch.bfloat16]]
        assert patch[6:] == [word for value in values for word in value]


@pytest.mark.parametrize("counts", range(1, 40))
def test_maps_lie_at_multiples_of_64_in_the_constant_bank(counts: int) -> None:
    record = Record(addresses=("a",), counts=tuple(f"n{i}" for i in range(counts)), maps=("m", "n"))
    plain = 8 + 4 * counts
    first, second = (record.offsets[name] for name in ("m", "n"))
    assert (CONSTANT_BASE + first) % MAP_ALIGNMENT == 0 and plain <= first < plain + MAP_ALIGNMENT
    assert (second, record.size) == (first + MAP_BYTES, first + 2 * MAP_BYTES)
    data = record.pack({name: 1 for name, _ in record.fields})
    assert len(data) == record.size and not any(data[plain:])


@pytest.mark.parametrize("head_dim", sorted({*FLASH_SM90_TILES, *chain(*FLASH_SM90_SPLIT_TILES)}))
def test_boxes_are_as_wide_as_columns_of_tiles(head_dim: int) -> None:
    columns = columns_of(head_dim)
    assert columns == plain.run("shared_sm90", {})["columns_of"](head_dim) and head_dim % columns == 0


def test_a_field_that_is_a_map_takes_nothing_else() -> None:
    record = Record(addresses=("x",), maps=("x_map",))
    with pytest.raises(ValueError, match="x_map must be a tensor map, not 0"):
        Program(0, [], [Launch(0, record, {"x": 0, "x_map": 0}, Grid(GridRule.FIXED, 1, 1))])


def maps_of(
    layout: str, q: Tensor, k: Tensor, v: Tensor, tile_n: int = 112, sizes: str = "d64v64"
) -> tuple[dict[str, programs.Map], int]:
    """The maps of a call with these tensors, and the rows of a box of keys."""
    k_name, v_name, lengths = NAMES[layout]
    spec = InstanceSpec.parse(NAME.format(layout=layout, sizes=sizes))
    spec = replace(spec, tile=replace(spec.tile, n=tile_n))
    keys = Keys(k_name, v_name, lengths, k.shape[-2], k.shape[1] if layout == "gather" else 0)
    rows = Rows.of("q"), Rows.of("out")
    call = Attention(*rows, keys, q.shape[1], q.shape[2], v.shape[-1], Scores(0.1, 0, 0.0, None), None, None)
    launch = persistent_launch(3, spec, call, Setting(NUM_SMS, whole(NUM_SMS)))
    ends, room = torch.zeros(3, dtype=torch.int32), torch.zeros(workspace_words(NUM_SMS), dtype=torch.int32)
    given: dict[str, Any] = {
        "q": q,
        k_name: k,
        v_name: v,
        "cu_seqlens_q": ends,
        "out": q.new_empty(*q.shape[:2], v.shape[-1]),
    }
    given |= {lengths: ends[:2] if layout == "gather" else ends, "workspace": room}
    if layout == "gather":
        given["block_table"] = torch.zeros(2, 4, dtype=torch.int32)
    op = "paged_attention" if layout == "gather" else "varlen_attention"
    rules = {rule.argument: rule for rule in RULES[f"{op}.out"]} | {
        "workspace": Rule("workspace", "words", (torch.int32,))
    }
    program = Program(0, [Guard(rules[name], tensor, False) for name, tensor in given.items()], [launch])
    launched = programs.run(program.address, *given.values())
    assert isinstance(launched, list)
    [made] = launched
    fields = FLASH_SM90.unpack(made.record)
    assert (made.x, made.y, fields["tickets"]) == (NUM_SMS, 1, room.data_ptr() + tiles_at(NUM_SMS))
    return programs.maps_of(FLASH_SM90, made.record), int(fields["box_rows"])


@pytest.mark.parametrize("pool", ["separate", "fused", "hnd", "packed"])
@pytest.mark.parametrize(
    ("page_size", "tile_n", "box_rows"),
    [
        (8, 112, 8),
        (16, 112, 16),
        (24, 112, 8),
        (24, 96, 24),
        (48, 96, 48),
        (64, 128, 64),
        (64, 80, 16),
        (256, 128, 128),
    ],
)
def test_X1_X9_boxes_of_keys_divide_page_and_tile(pool: str, page_size: int, tile_n: int, box_rows: int) -> None:
    k, v = empty_pool(Shape(64, kv_heads=2, page_size=page_size, pool=pool), 5, CPU)
    q = torch.zeros(9, 8, 64).half()
    maps, found = maps_of("gather", q, k, v, tile_n)
    assert found == box_rows
    for name, cache in (("k_map", k), ("v_map", v)):
        page, token, head, _ = (2 * stride for stride in cache.stride())
        sizes = (64, page_size, 2, 5)
        box = (64, box_rows, 1)
        assert maps[name] == (cache.data_ptr(), sizes, (token, head, page), box, MAP_DTYPES[torch.float16])
    assert maps["q_map"] == (q.data_ptr(), (64, 8, 9, 1), (128, 8 * 128, 16), (64, 4, 16), MAP_DTYPES[torch.float16])


def test_dense_keys_have_one_page_and_boxes_of_a_whole_tile() -> None:
    packed = torch.zeros(20, 8 + 2 + 2, 64).half()
    maps, box_rows = maps_of(Layout.DENSE, packed[:, :8], packed[:, 8:10], packed[:, 10:])
    assert box_rows == 112
    keys = (20, 2), (12 * 128, 128)
    for name, first, extents, steps in (
        ("q_map", 0, (8, 20), (128, 12 * 128)),
        ("k_map", 8, *keys),
        ("v_map", 10, *keys),
    ):
        found = maps[name]
        assert (found.address, found.sizes) == (packed.data_ptr() + first * 128, (64, *extents, 1))
        assert found.strides == (*steps, 16), "nothing steps over one page, and a stride of 0 is none"


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    ("sizes", "head_dim", "head_dim_v", "columns"),
    [("d192v128", 160, 72, (64, 64, 64)), ("d96v64", 72, 40, (32, 32, 64)), ("d64v96", 40, 80, (64, 64, 32))],
)
def test_each_map_tells_its_own_head_size_and_the_kernel_s_columns(
    layout: Layout, sizes: str, head_dim: int, head_dim_v: int, columns: tuple[int, ...]
) -> None:
    keys = (5, 16, 2) if layout is Layout.GATHER else (80, 2)
    k, v = (torch.zeros(*keys, each).half() for each in (head_dim, head_dim_v))
    maps, _ = maps_of(layout, torch.zeros(9, 8, head_dim).half(), k, v, sizes=sizes)
    assert tuple(maps[f"{name}_map"].sizes[0] for name in "qkv") == (head_dim, head_dim, head_dim_v)
    assert tuple(maps[f"{name}_map"].box[0] for name in "qkv") == columns


def test_what_has_an_extent_of_one_or_none_has_a_map_all_the_same() -> None:
    q, k = torch.zeros(1, 1, 64).half(), torch.zeros(0, 16, 1, 64).half()
    maps, _ = maps_of(Layout.GATHER, q, k, k)
    assert maps["q_map"][1:3] == ((64, 1, 1, 1), (16, 16, 16))
    assert maps["k_map"][:3] == (q.data_ptr(), (64, 16, 1, 1), (128, 16, 16)), (
        "no pages: the queries' address, a size of 1"
    )


def test_X9_heads_that_are_one_in_memory_keep_their_stride_of_0() -> None:
    k = torch.zeros(5, 16, 1, 64).half().expand(5, 16, 4, 64)
    maps, _ = maps_of(Layout.GATHER, torch.zeros(3, 8, 64).half(), k, k)
    assert maps["k_map"][1:3] == ((64, 16, 4, 5), (128, 0, 16 * 128))
