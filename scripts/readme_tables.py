"""Turns the declared kernels and the recorded benchmark into README's tables, between its marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import NoInstance
from pa_ops.evidence import load_timed
from pa_ops.gates import GATES, attention_families
from pa_ops.heuristics import extremes
from pa_ops.jit import declared_entries
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import select_entry
from pa_ops.spec import Op

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "docs" / "gpu-bench.json"
NOTHING = "no"
Row = tuple[str, ...]


@lru_cache(maxsize=1)
def _rows(capability: Capability) -> tuple[Entry, ...]:
    """The kernels of a full build whose code the device loads."""
    return tuple(row for row in declared_entries(capability) if capability.loads(row.code_targets))


def _family(problem: Problem, capability: Capability) -> str:
    """The family that a full build serves a problem with."""
    try:
        return f"`{select_entry(_rows(capability), problem, capability).family}`"
    except NoInstance:
        return NOTHING


def _attention(dtype: str, capability: Capability) -> str:
    """The families of few query rows over pages, of many, and of dense keys where that is another."""
    paged = Problem(op=Op.PAGED_ATTENTION, dtype=dtype, head_dim=128, page_size=16)
    dense = Problem(op=Op.VARLEN_ATTENTION, dtype=dtype, head_dim=128, tokens=500)
    found = dict.fromkeys(_family(each, capability) for each in (*extremes(paged), dense))
    return ", ".join(found)


def _head_sizes(capability: Capability) -> str:
    """The head sizes that paged attention in fp16 takes."""
    sizes = range(8, max(GATES[family].head_max for family in attention_families()) + 9, 8)
    served = [
        size
        for size in sizes
        if _family(Problem(op=Op.PAGED_ATTENTION, dtype="fp16", head_dim=size, page_size=16), capability) != NOTHING
    ]
    if not served:
        return NOTHING
    whole = served == list(range(served[0], served[-1] + 1, 8))
    return f"{served[0]} to {served[-1]} by 8" if whole else ", ".join(map(str, served))


def support() -> Iterator[Row]:
    """A row for SMs in succession that are served alike."""

    def cells(sm: int) -> Row:
        capability = Capability.of_sm(sm)
        helpers = (Problem(op=op, dtype="fp16", head_dim=128) for op in (Op.APPEND_KV, Op.MERGE_STATES))
        attention = (_attention(dtype, capability) for dtype in ("fp16", "bf16"))
        return (*attention, _head_sizes(capability), *(_family(each, capability) for each in helpers))

    yield ("SM", "attention in fp16", "in bf16", "head sizes", "`append_kv`", "`merge_states`")
    for alike, group in groupby(sorted(MODELS), cells):
        sms = [f"{sm // 10}.{sm % 10}" for sm in group]
        yield (sms[0] if len(sms) == 1 else f"{sms[0]} to {sms[-1]}", *alike)


def performance() -> Iterator[Row]:
    """A row for each recorded case."""
    yield ("case", "shape", "us", "TFLOP/s", "KV GB/s", "best peer's time / ours", "card")
    for _, times in sorted(load_timed(BENCH).items()):
        for timed in times:
            peer = min(timed.peers, key=timed.peers.__getitem__, default="")
            told = "" if timed.ratio is None else f"{timed.ratio:.2f} ({peer})"
            numbers = f"{timed.microseconds:.0f}", f"{timed.tflops:.0f}", f"{timed.gigabytes_per_second:.0f}"
            yield (timed.case, timed.shape, *numbers, told, timed.card)


def table(rows: Iterator[Row]) -> str:
    """Markdown; a sentence where there is nothing to tell."""
    head, *body = rows
    if not body:
        return "None is recorded yet: `pa-ops bench --json docs/gpu-bench.json`, then `scripts/readme_tables.py`."
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"support": support, "performance": performance}


def renewed(text: str) -> str:
    """README's text with its tables as they are now."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"readme_tables: README must have {begin} and {end} once")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table(rows())}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Rewrites README.md, or says with --check whether that would change it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where the tables are not current")
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = renewed(old)
    if parser.parse_args().check:
        print("README's tables are current" if new == old else "README's tables are not: run scripts/readme_tables.py")
        return 0 if new == old else 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
