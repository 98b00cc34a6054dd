"""Launch extents and work lists follow the lengths, and lengths that a test gives are taken as they are."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_rows import ROOT
from hypothesis import given
from hypothesis import strategies as st

from helpers.serving import lengths_override
from pa_ops.capability import Capability
from pa_ops.plan import attention_tiles, resident_blocks, work_list

LENGTHS = st.lists(st.one_of(st.just(0), st.integers(0, 300)), max_size=20)
TEXTS = (".py", ".j2", ".c", ".cpp", ".h", ".cuh")
SOURCES = [
    p for folder in ("pa_ops", "generator", "templates") for p in (ROOT / folder).rglob("*") if p.suffix in TEXTS
]


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ([10, 0, 0, 0], 10),
        ([0, 7, 0, 3], 7),
        ([10] + [0] * 15, 10),
        ([65, 0], 65),
        ([1024] * 64, 1024),
        ([0, 0], 0),
        ([], 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_A1_the_longest_sequence_has_all_its_tiles(lengths: list[int], longest: int) -> None:
    work = list(work_list(lengths, 64))
    assert max((tile.first + tile.rows for tile in work), default=0) == longest
    assert attention_tiles(sum(lengths), len(lengths), 64) >= len(work) == sum(-(-n // 64) for n in lengths)
    assert attention_tiles(sum(lengths), len(lengths), 64, longest) >= len(work)


TOKENS = re.compile(r"(\w*tokens?(_count)?|total_q\w*|[tT])", re.ASCII)
SEQUENCES = re.compile(r"(\w*(batch|sequences|seqs)(_size)?|[bB])", re.ASCII)
IN_TEXT = re.compile(rf"\b{TOKENS.pattern}\s*-\s*{SEQUENCES.pattern}\s*\+\s*1\b", re.ASCII)


def terms(node: ast.expr, sign: int = 1) -> Iterator[str]:
    """The terms of a sum with their signs: `a - (b - 1)` has +a, -b, +1; the last name stands for a dotted one."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield from terms(node.left, sign)
        yield from terms(node.right, -sign if isinstance(node.op, ast.Sub) else sign)
    else:
        yield ("+" if sign > 0 else "-") + ast.unparse(node).split(".")[-1]


def guesses_the_longest(source: str, *, python: bool) -> bool:
    """Whether tokens - sequences + 1, which is no bound of anything once a sequence is empty, is in a source."""
    if IN_TEXT.search(source):
        return True
    sums = [set(terms(n)) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.BinOp)] if python else []
    return any(
        "+1" in parts
        and any(t[0] == "+" and TOKENS.fullmatch(t[1:]) for t in parts)
        and any(t[0] == "-" and SEQUENCES.fullmatch(t[1:]) for t in parts)
        for parts in sums
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_A1_no_source_guesses_the_longest_length(path: Path) -> None:
    assert not guesses_the_longest(path.read_text(encoding="utf-8"), python=path.suffix == ".py"), path


def test_A1_the_search_finds_what_it_is_for() -> None:
    for guess in ("token_count - batch_size + 1", "T - B + 1", "tokens - (sequences - 1)", "1 + p.tokens - p.batch"):
        assert guesses_the_longest(f"x = min({guess}, 2)", python=True), guess
    assert guesses_the_longest("int n = token_count - batch + 1;", python=False)
    for honest in ("length - new - window + 1", "tokens + min(sequences, tokens) * (rows - 1)", "tokens - batch"):
        assert not guesses_the_longest(f"x = {honest}", python=True), honest


@given(lengths=LENGTHS, rows=st.sampled_from([1, 16, 64, 128, 192]), keys=st.sampled_from([32, 64, 80, 96, 128]))
def test_A2_each_row_of_each_sequence_is_in_one_tile(lengths: list[int], rows: int, keys: int) -> None:
    for tiles in (list(work_list(lengths, rows)), list(work_list(lengths, rows, math.gcd(rows, keys)))):
        covered = [(tile.sequence, row) for tile in tiles for row in range(tile.first, tile.first + tile.rows)]
        assert covered == [(sequence, row) for sequence, length in enumerate(lengths) for row in range(length)]
        assert all(0 < tile.rows <= rows for tile in tiles)
        for bound in (None, max(lengths, default=0), 2**20):
            assert attention_tiles(sum(lengths), len(lengths), rows, bound) >= len(tiles)
    assert all(tile.first == tile.block * rows for tile in work_list(lengths, rows))


def test_A9_given_lengths_are_used_verbatim() -> None:
    assert lengths_override([10, 0, 7, 64], 4, 64) == [10, 0, 7, 64]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2, 3], r"shape \[4\], got \[3\]"),
        ([[1, 2, 3, 4]], r"shape \[4\], got \[1, 4\]"),
        ([1, -1, 2, 3], r"in \[0, 64\], got -1 for sequence 1"),
        ([1, 2, 65, 3], r"in \[0, 64\], got 65 for sequence 2"),
    ],
)
def test_A9_lengths_of_another_shape_or_range_raise(given: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lengths_override(given, 4, 64)


@pytest.mark.parametrize(
    ("smem", "sm", "blocks"), [(98920, 90, 2), (197224, 90, 1), (98920, 80, 1), (98920, 89, 1), (50000, 86, 2)]
)
def test_an_sm_holds_as_many_blocks_as_their_shared_memory_lets_it(smem: int, sm: int, blocks: int) -> None:
    assert resident_blocks(smem, Capability.of_sm(sm).smem_optin_bytes) == blocks
