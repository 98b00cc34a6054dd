"""Turns a kernel that is missing at its first use into a built one, or into why not and the command that builds it."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pa_ops.capability import Capability, parse_target
from pa_ops.environment import settings
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.heuristics import extremes, prolonged
from pa_ops.homes import destination
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import Policy, select_entry
from pa_ops.spec import KernelOp, Op
from pa_ops.words import question

PRESET = "full"
LOCK_SECONDS = 600.0  # how long a call waits for another process that builds

Wanted = Mapping[str, Sequence[str]]  # target -> names


def declared_entries(capability: Capability) -> tuple[Entry, ...]:
    """Rows of the kernels that a full build makes for the targets that the device loads; of all targets if of none."""
    from pa_ops.generator.matrix import DECLARED_TARGETS, declared  # a door: nothing at run time needs the generator

    loaded = [target for target in DECLARED_TARGETS if target in capability.targets]
    return tuple(
        Entry.declared(spec, target) for target in loaded or DECLARED_TARGETS for spec in declared(PRESET, [target])
    )


def wanted(problem: Problem, capability: Capability, policy: Policy) -> Wanted:
    """The kernels that a full build would serve calls like `problem` with: those of few query rows, of
    many and of long sequences.

    Raises NoInstance where a full build has none either.
    """
    rows = declared_entries(capability)
    sizes = (problem, *((*extremes(problem), prolonged(problem)) if problem.kernel_op is KernelOp.ATTN else ()))
    chosen = [select_entry(rows, size, capability, policy).entry for size in sizes]
    names: dict[str, list[str]] = defaultdict(list)
    for entry in dict.fromkeys(chosen):
        names[entry.target].append(entry.name)
    return names


def model_needs(words: Sequence[str], target: str) -> list[str]:
    """The instances for a model with such attention, e.g. head_dim=128 dtype=bf16, in a serving engine on `target`.

    Raises InvalidArgument for a word that means nothing, NoInstance where the target has no kernel for it.
    """
    from pa_ops.generator.matrix import declared

    rows = [Entry.declared(spec, target) for spec in declared(PRESET, [target])]
    capability = Capability.of_sm(parse_target(target))
    problem = question(Op.PAGED_ATTENTION, words).problem
    problems = (*extremes(problem), prolonged(problem), replace(problem, op=Op.APPEND_KV))
    chosen = [select_entry(rows, each, capability, Policy()).instance for each in problems]
    return list(dict.fromkeys(chosen))


def command(what: Wanted) -> str:
    """The command lines that build `what`."""
    lines = (f"pa-ops build --arch {target} --filter '{','.join(names)}'" for target, names in what.items())
    return " && ".join(lines)


def obstacles(roots: Sequence[Path]) -> Iterator[str]:
    """Why nothing can be built now; nothing where it can."""
    import torch

    if settings().no_jit:
        yield "PA_OPS_NO_JIT=1 forbids building on first use"
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        yield "nothing is built while a CUDA graph is captured: build it, or make such a call, before"
    elif destination(roots) is None:
        yield f"{' and '.join(map(str, roots))} cannot be written; set PA_OPS_HOME"
    else:
        from pa_ops.generator.toolchain import Toolchain, examine

        yield from (detail for _, works, detail in examine(Toolchain()) if not works)


def supply(
    problem: Problem, capability: Capability, policy: Policy, roots: Sequence[Path], notes: Iterable[object]
) -> None:
    """Builds what serves `problem` into the first of `roots` that can be written.

    notes: what a user should know if that cannot be, the selection's own refusal first. Raises NoInstance where nothing
    would serve the problem, or where nothing may be built now: the text has the command that builds it. Raises
    BuildError, BuildBusy.
    """
    what = wanted(problem, capability, policy)
    if reasons := [*obstacles(roots)]:
        raise NoInstance("\n".join((*map(str, notes), *reasons, f"build it: {command(what)}")))
    make(what, roots)


def renew(library: Path, damage: str, entry: Entry, roots: Sequence[Path]) -> None:
    """Builds `entry` again, whose library must not be loaded; of what else was in it, what has a whole object stays.

    Raises InvalidArgument, with the damage and the command, where nothing may be built now.
    """
    what = {entry.target: [entry.name]}
    if reasons := [*obstacles(roots)]:
        rule = "must be the library that its manifest was written for; " + "; ".join(reasons)
        raise InvalidArgument(str(library), f"{rule}; build it again: pa-ops build --arch {entry.target}", damage)
    make(what, roots)


def make(what: Wanted, roots: Sequence[Path]) -> None:
    """Builds, and says so on stderr: a call that takes seconds should not look hung."""
    from pa_ops.generator.build import Request, build
    from pa_ops.generator.progress import Waiting

    root = destination(roots) or roots[0]
    for target, names in what.items():
        _say(f"building {len(names)} kernel{'s'[: len(names) > 1]} for {target}, once: {', '.join(names)}")
        began = time.perf_counter()
        build(Request(root, PRESET, (target,), ",".join(names), lock_seconds=LOCK_SECONDS), Waiting(_say))
        _say(f"built in {time.perf_counter() - began:.1f} s, into {root / target}")


def _say(line: str) -> None:
    print(f"pa_ops: {line}", file=sys.stderr, flush=True)
