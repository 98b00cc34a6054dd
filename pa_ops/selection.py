"""Turns rows, a problem, a device and the user's overrides into the row that runs, with every reason on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.families import Rejection, families_of, family_checks, rejections
from pa_ops.heuristics import cost
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.spec import Family, KernelOp

__all__ = [
    "AUTO",
    "Policy",
    "Rejection",
    "Selection",
    "Verdict",
    "explain_text",
    "rejections",
    "select_entry",
    "verdicts",
]

AUTO = "auto"


def _matches(word: str, entry: Entry) -> bool:
    """Whether a user's word means the row: its family, the family's first words ("flash"), or its own name."""
    family = str(entry.spec.family)
    return word in (family, entry.name) or family.startswith(word + "_")


@dataclass(frozen=True)
class Policy:
    """What the user overrides, for attention rows only: helpers have no rival.

    backend: "auto", a family, its first words, or an instance name; backend_source: where it was said, for messages;
    disabled: families (or first words) taken out; batch_invariant: rank without sizes, so that a sequence's row never
    depends on its neighbours.
    """

    backend: str = AUTO
    backend_source: str = "backend="
    disabled: frozenset[str] = field(default_factory=frozenset)
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str) or not self.backend:
            raise InvalidArgument(
                self.backend_source.rstrip("="), "must be 'auto' or a family name", repr(self.backend)
            )

    def rejections(self, entry: Entry) -> Iterator[Rejection]:
        """Why the overrides take `entry` out; nothing when they do not."""
        if entry.spec.op is not KernelOp.ATTN:
            return
        family = str(entry.spec.family)
        if self.backend != AUTO and not _matches(self.backend, entry):
            yield Rejection("backend", f"{self.backend} ({self.backend_source})", family)
        for word in sorted(self.disabled):
            if _matches(word, entry):
                yield Rejection("backend", f"a family that PA_OPS_DISABLE={word} leaves in", family)

    def __str__(self) -> str:
        disabled = ",".join(sorted(self.disabled)) or "unset"
        return f"backend {self.backend} (set by backend= or PA_OPS_BACKEND), PA_OPS_DISABLE {disabled}"


DEFAULT_POLICY = Policy()


@dataclass(frozen=True)
class Verdict:
    """One row and the reasons that reject it; none: the row is eligible."""

    entry: Entry
    reasons: tuple[Rejection, ...]

    @property
    def eligible(self) -> bool:
        """Whether the row may serve the problem."""
        return not self.reasons

    def __str__(self) -> str:
        return f"{self.entry.name} [{self.entry.target}]: " + ("; ".join(map(str, self.reasons)) or "eligible")


@dataclass(frozen=True)
class Selection:
    """The row that runs, its family, and the verdict on every row that was looked at."""

    entry: Entry
    family: Family
    reasons: tuple[Verdict, ...]

    @property
    def instance(self) -> str:
        """The name of the row that runs."""
        return self.entry.name


def verdicts(
    entries: Iterable[Entry], problem: Problem, capability: Capability, policy: Policy = DEFAULT_POLICY
) -> tuple[Verdict, ...]:
    """The verdict on every row, sorted by name, then target."""
    rows = sorted(entries, key=lambda entry: (entry.name, entry.target))
    return tuple(Verdict(entry, (*rejections(entry, problem, capability), *policy.rejections(entry))) for entry in rows)


def select_entry(
    entries: Iterable[Entry], problem: Problem, capability: Capability, policy: Policy = DEFAULT_POLICY
) -> Selection:
    """The cheapest eligible row; raises NoInstance, which says every reason, when no row is eligible."""
    looked_at = verdicts(entries, problem, capability, policy)
    able = [verdict.entry for verdict in looked_at if verdict.eligible]
    if not able:
        raise NoInstance(_refusal_text(looked_at, problem, capability, policy))
    best = _cheapest(able, problem, capability, policy)
    return Selection(best, best.spec.family, looked_at)


def _cheapest(able: list[Entry], problem: Problem, capability: Capability, policy: Policy) -> Entry:
    if policy.batch_invariant:
        problem = replace(problem, batch=1, tokens=1, max_q=None, max_k=None)
    return min(able, key=lambda entry: cost(entry, problem, capability))


def explain_text(
    entries: Iterable[Entry], problem: Problem, capability: Capability, policy: Policy = DEFAULT_POLICY
) -> str:
    """The whole decision as text: problem, device, overrides, then every row with its verdict."""
    looked_at = verdicts(entries, problem, capability, policy)
    able = [verdict.entry for verdict in looked_at if verdict.eligible]
    if not able:
        lines = [_refusal_text(looked_at, problem, capability, policy)]
        return "\n".join([*lines, "rows:", *(f"  {verdict}" for verdict in looked_at)])
    best = _cheapest(able, problem, capability, policy)
    lines = [str(problem), f"on {capability}", str(policy), f"selected: {best.name} [{best.target}]", "rows:"]
    for verdict in looked_at:
        note = " <- selected" if verdict.entry == best else ", ranked behind" if verdict.eligible else ""
        lines.append(f"  {verdict}{note}")
    return "\n".join(lines)


def _refusal_text(looked_at: tuple[Verdict, ...], problem: Problem, capability: Capability, policy: Policy) -> str:
    """Each family's gates beside the actual values, what its rows lack, the overrides, and the command that helps."""
    lines = [f"no kernel can serve {problem} on {capability}"]
    for family in families_of(problem.kernel_op):
        checks = tuple(family_checks(family, problem, capability))
        lines.append(f"{family}:")
        lines += [f"  {'ok' if check.passed else 'NO'}  {check}" for check in checks]
        rows = [verdict for verdict in looked_at if verdict.entry.spec.family is family]
        lines.append("  " + _rows_text(rows))
        if all(check.passed for check in checks) and not any(_only_policy(verdict) for verdict in rows):
            pattern = _filter(family, problem)
            lines.append(f"  build what is missing: pa-ops build --arch {capability.build_target} --filter '{pattern}'")
    if problem.kernel_op is KernelOp.ATTN:
        lines.append(f"overrides: {policy}")
    return "\n".join(lines)


def _rows_text(rows: list[Verdict]) -> str:
    if not rows:
        return "rows: none is built"
    counts = Counter(gate for verdict in rows for gate in {str(reason) for reason in verdict.reasons})
    told = "; ".join(f"{reason} ({count} of {len(rows)})" for reason, count in sorted(counts.items()))
    return f"rows: {len(rows)}, each with a reason: {told}"


def _only_policy(verdict: Verdict) -> bool:
    return all(reason.gate == "backend" for reason in verdict.reasons)


def _filter(family: Family, problem: Problem) -> str:
    """A glob of the instances that would serve the problem; head sizes are left open because rows pad them."""
    head = f"pa_{problem.kernel_op}_{family}_{problem.dtype}_kv{problem.kv_dtype}_*"
    return f"{head}_{problem.layout}_{problem.mask}_*" if problem.kernel_op is KernelOp.ATTN else head
