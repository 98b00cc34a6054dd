"""Turns a coverage into what people and programs read: Markdown, JSON, one self-contained HTML page."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from pa_ops.capability import parse_target
from pa_ops.coverage import Cell, Coverage, Fit, State, Why
from pa_ops.report_page import PAGE
from pa_ops.spec import InstanceSpec, KernelOp, Word
from pa_ops.survey import Reach

SCHEMA = 2
SYMBOLS = {
    State.REFUSED: "-",
    State.DECLARED: "d",
    State.GENERATED: "g",
    State.COMPILED: "C",
    State.STALE: "s",
    State.TESTED: "T",
    State.BENCHMARKED: "B",
}
MEANINGS = {
    State.REFUSED: "does not exist, for the reason given",
    State.DECLARED: "a build would make it",
    State.GENERATED: "its source is rendered",
    State.COMPILED: "in a library",
    State.STALE: "built or tested from other sources than today's",
    State.TESTED: "compiled, and right on a GPU",
    State.BENCHMARKED: "tested, and timed on a GPU",
}


def _row(cell: Cell) -> dict[str, object]:
    """A cell with its name taken apart, for JSON."""
    spec = InstanceSpec.parse(cell.name)
    axes = {
        "op": str(spec.op),
        "family": str(spec.family),
        "dtype": str(spec.dtype),
        "kv_dtype": str(spec.kv_dtype),
        "head_dim": spec.head_dim,
        "head_dim_v": spec.head_dim_v,
        "layout": str(spec.layout),
        "mask": str(spec.mask),
        "tile": str(spec.tile),
    }
    times = [{**asdict(timed), "ratio": timed.ratio} for timed in cell.times]
    return {**_plain(cell), "times": times, **axes}


def _plain(cell: Cell) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Word) else value for key, value in vars(cell).items()}


def to_json(coverage: Coverage) -> str:
    """Every cell with its axes, one a line, every hole, the unreachable kernels; equal coverages give equal text."""
    lists = {
        "states": [[str(state), MEANINGS[state]] for state in State],
        "cells": [_row(cell) for cell in coverage.cells],
        "holes": [{"problem": str(hole.problem), "sm": hole.sm, "reason": hole.reason} for hole in coverage.holes],
        "unreachable": [{"name": cell.name, "target": cell.target} for cell in coverage.unreachable],
    }
    encode = json.JSONEncoder(sort_keys=True).encode
    texts = (f'"{name}": [\n{_lines(map(encode, rows))}]' for name, rows in lists.items())  # type: ignore[call-overload]
    return f'{{"schema": {SCHEMA},\n' + ",\n".join(texts) + "}\n"


def _lines(texts: Iterable[str]) -> str:
    return ",\n".join(texts)


def to_html(coverage: Coverage) -> str:
    """One page with its data, style and script inside: filters, a heat map, a sortable table.

    What most cells share is said once: nine in ten of them are refused, and nothing else is known of those.
    """
    told = json.loads(to_json(coverage))
    usual = json.loads(json.dumps(_plain(Cell("", "", State.REFUSED))))
    cells = [{key: value for key, value in row.items() if usual.get(key) != value} for row in told["cells"]]
    data = json.dumps({**told, "defaults": usual, "cells": cells}, separators=(",", ":"))
    return PAGE.replace("/*DATA*/", data.replace("</", "<\\/"))


def targets_of(coverage: Coverage) -> tuple[str, ...]:
    """The targets of a coverage, oldest SM first."""
    names = {cell.target for cell in coverage.cells}
    return tuple(sorted(names, key=lambda name: (parse_target(name), name)))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(' --- ' for _ in head)}|"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def summary(coverage: Coverage) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """How many cells of each target are in each state: the head and the rows of a table."""
    counts = Counter((cell.target, cell.state) for cell in coverage.cells)
    head = ("target", *(str(state) for state in State))
    return head, [(target, *(counts[target, state] for state in State)) for target in targets_of(coverage)]


def _kernel(spec: InstanceSpec) -> tuple[str, int, int, str, str]:
    """A row of the heat map: family, head sizes of K and V, layout, mask."""
    return str(spec.family), spec.head_dim, spec.head_dim_v, str(spec.layout), str(spec.mask)


def _head_size(head_dim: int, head_dim_v: int) -> str:
    """Both as one word."""
    return f"{head_dim}/{head_dim_v}" if head_dim != head_dim_v else str(head_dim or "any")


def heat_map(coverage: Coverage) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """A row for each kernel but for dtype and tile; a symbol for each dtype, under each target (but for its `sm_`).

    Of the tiles that a family has for several targets, each target refuses all but one, whose symbol it is.
    """
    marks: dict[tuple[str, int, int, str, str], dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for cell in coverage.cells:
        spec = InstanceSpec.parse(cell.name)
        if spec.kv_dtype is spec.dtype:
            symbols = marks[_kernel(spec)][cell.target]
            if cell.state is not State.REFUSED or spec.dtype not in symbols:
                symbols[spec.dtype] = SYMBOLS[cell.state]
    targets = targets_of(coverage)
    head = ("family", "head size", "layout", "mask", *(target.removeprefix("sm_") for target in targets))
    rows: list[tuple[object, ...]] = []
    for key in sorted(marks):
        family, head_dim, head_dim_v, *rest = key
        boxes = (" ".join(marks[key][target].values()) for target in targets)
        rows.append((family, _head_size(head_dim, head_dim_v), *rest, *boxes))
    return head, rows


def _refusals(coverage: Coverage) -> list[tuple[object, ...]]:
    """Reasons of kernels that do not exist, with how many and an example."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in coverage.cells:
        if cell.state is State.REFUSED:
            groups[cell.reason].append(cell)
    return [(len(cells), reason, f"`{cells[0].name}`") for reason, cells in sorted(groups.items())]


def _compiled(coverage: Coverage) -> list[tuple[object, ...]]:
    """Facts of the kernels that were built."""
    unbuilt = {State.REFUSED, State.DECLARED, State.GENERATED}
    return [
        (
            f"`{cell.name}`",
            cell.target,
            cell.state,
            cell.registers,
            cell.spill_bytes,
            cell.smem_bytes,
            cell.object_bytes,
            f"{cell.compile_seconds:.1f}",
            cell.tests or "",
            "" if cell.worst_error is None else f"{cell.worst_error:.1e}",
            cell.fit if cell.tests else "",
            ", ".join(f"{timed.microseconds:.1f}" for timed in cell.times),
            ", ".join(f"{timed.ratio:.2f}" for timed in cell.times if timed.ratio is not None),
            " ".join(cell.used),
        )
        for cell in coverage.cells
        if cell.state not in unbuilt
    ]


BUILT = ("kernel", "target", "state", "registers", "spill B", "smem B", "object B", "s",
         "tests", "worst error", "evidence of", "us", "best peer / ours", "run by")  # fmt: skip


def _evidence(coverage: Coverage) -> list[tuple[object, ...]]:
    """How many kernels of a target have evidence, by what it is of; stale evidence is none of today's code."""
    counts = Counter((cell.target, cell.fit) for cell in coverage.cells if cell.state is not State.REFUSED)
    return [(target, *(counts[target, fit] for fit in Fit)) for target in targets_of(coverage)]


def _missing(coverage: Coverage) -> str:
    counts = Counter(str(cell.why) for cell in coverage.cells if cell.why)
    return ", ".join(f"{counts[why]} {why}" for why in map(str, Why) if counts[why])


def to_markdown(coverage: Coverage) -> str:
    """The report as a page of tables."""
    attention = sum(InstanceSpec.parse(cell.name).op is KernelOp.ATTN for cell in coverage.cells)
    lines = [
        "# Instance coverage",
        "",
        f"{len(coverage.cells)} cells, {attention} of them attention; {len(coverage.holes)} undeclared holes, "
        f"{len(coverage.unreachable)} unreachable kernels, {len(coverage.reached(Reach.NAMED))} that are reached by "
        f"their family's name alone, {len(coverage.reached(Reach.SHADOWED))} that are shadowed: wherever they load, "
        "code for another target goes first.",
        "",
        *_table(*summary(coverage)),
        "## Kernels by target",
        "",
        "One letter a dtype (bf16, fp16): " + ", ".join(f"{SYMBOLS[s]} = {s} ({MEANINGS[s]})" for s in State) + ".",
        "",
        *_table(*heat_map(coverage)),
    ]
    lines += ["## What tests showed", "", "Kernels by what the evidence of GPU tests is of.", ""]
    lines += _table(("target", *map(str, Fit)), _evidence(coverage))
    if built := _compiled(coverage):
        lines += ["## Built", "", *_table(BUILT, built)]
    lines += [f"Not there: {_missing(coverage)}.", ""]
    lines += ["## Kernels that do not exist", "", *_table(("how many", "reason", "one of them"), _refusals(coverage))]
    if coverage.holes:
        lines += ["## Holes", ""]
        lines += _table(("problem", "SM", "reason"), ((h.problem, h.sm, _line(h.reason)) for h in coverage.holes))
    if coverage.unreachable:
        lines += ["## Unreachable kernels", ""]
        lines += _table(("kernel", "target"), ((f"`{cell.name}`", cell.target) for cell in coverage.unreachable))
    return "\n".join(lines).rstrip() + "\n"


def _line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
