"""Turns rows, a problem, a device and the user's overrides into the row that runs, with every reason on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

from pa_ops.capability import Capability
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.families import Rejection, device_rejections, family_checks, family_rejections, problem_rejections
from pa_ops.gates import GATES, attention_families, families_of
from pa_ops.heuristics import SPLITTING, cheapest, extremes, few_rows, timing
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.spec import Family, InstanceSpec, KernelOp

__all__ = [
    "AUTO",
    "Policy",
    "Rejection",
    "Selection",
    "Verdict",
    "explain_text",
    "select_entry",
    "verdicts",
]

AUTO = "auto"


def _means(word: str, family: Family) -> bool:
    """Whether a user's word means the family: its name, or its first words ("flash")."""
    return word == family or family.startswith(word + "_")


@dataclass(frozen=True)
class Policy:
    """What the user overrides, for attention rows only: helpers have no rival.

    backend: "auto", a family, its first words, or an instance name; backend_source: where it was said, for messages;
    disabled: families (or first words) taken out; batch_invariant: leave out families whose bits depend on a sequence's
    neighbours, and rank without sizes, but for whether query rows are few where such sequences have a kernel of their
    own, so that its row does not either.
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

    def leaves(self, family: Family) -> bool:
        """Whether the overrides leave the family in."""
        asked = self.backend == AUTO or _means(self.backend, family) or self.backend.startswith(f"pa_attn_{family}_")
        steady = GATES[family].invariant or not self.batch_invariant
        return asked and steady and not any(_means(word, family) for word in self.disabled)

    def rejections(self, spec: InstanceSpec) -> Iterator[Rejection]:
        """Why the overrides take a kernel out; nothing when they do not."""
        if spec.op is not KernelOp.ATTN:
            return
        if self.backend not in (AUTO, spec.name) and not _means(self.backend, spec.family):
            yield Rejection("backend", f"{self.backend} ({self.backend_source})", str(spec.family))
        for word in sorted(self.disabled):
            if _means(word, spec.family):
                yield Rejection("backend", f"a family that PA_OPS_DISABLE={word} leaves in", str(spec.family))
        if self.batch_invariant and not GATES[spec.family].invariant:
            yield Rejection("backend", "a family that batch invariance leaves in", str(spec.family))

    def __str__(self) -> str:
        disabled = ",".join(sorted(self.disabled)) or "unset"
        steady = ", batch invariance on" if self.batch_invariant else ""
        return f"backend {self.backend} (set by backend= or PA_OPS_BACKEND), PA_OPS_DISABLE {disabled}{steady}"


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
    """The verdict on every row, sorted by name, then target. Sizes never appear in it.

    What depends on the kernel alone is asked once for all targets that it was compiled for.
    """
    shared = {family: family_rejections(family, problem, capability) for family in Family}
    found: list[Verdict] = []
    for name, rows in groupby(sorted(entries, key=attrgetter("name", "target")), key=attrgetter("name")):
        spec = InstanceSpec.parse(name)
        asked = spec.op is problem.kernel_op  # else the family rejects it, and no more is to be said
        fixed = tuple(problem_rejections(spec, problem)) if asked else ()
        overruled = tuple(policy.rejections(spec))
        for row in rows:
            device = device_rejections(row, capability) if asked else ()
            found.append(Verdict(row, (*shared[spec.family], *device, *fixed, *overruled)))
    return tuple(found)


def select_entry(
    entries: Iterable[Entry], problem: Problem, capability: Capability, policy: Policy = DEFAULT_POLICY
) -> Selection:
    """The row that runs; raises NoInstance with the text of `explain_text` when no row is eligible."""
    looked_at = verdicts(entries, problem, capability, policy)
    able = [verdict.entry for verdict in looked_at if verdict.eligible]
    if not able:
        raise NoInstance(_refusal_text(looked_at, problem, capability, policy))
    best = _cheapest(able, problem, capability, policy)
    return Selection(best, best.spec.family, looked_at)


def _sized(problem: Problem, able: list[Entry], capability: Capability, policy: Policy) -> Problem:
    """The problem as it is ranked: without its sizes where they must not matter.

    A sequence of few query rows may then have a splitting family, which looks at each one's own rows; other families
    take a batch as a whole, and are ranked for it as if it had many.
    """
    if not policy.batch_invariant:
        return problem
    few, many = extremes(replace(problem, max_k=None))
    apart = few_rows(problem) and cheapest(able, few, capability).spec.family in SPLITTING
    return few if apart else many


def _cheapest(able: list[Entry], problem: Problem, capability: Capability, policy: Policy) -> Entry:
    return cheapest(able, _sized(problem, able, capability, policy), capability)


def explain_text(
    entries: Iterable[Entry], problem: Problem, capability: Capability, policy: Policy = DEFAULT_POLICY
) -> str:
    """The whole decision as text: problem, device, overrides, then every row with its verdict."""
    looked_at = verdicts(entries, problem, capability, policy)
    able = [verdict.entry for verdict in looked_at if verdict.eligible]
    if not able:
        return _refusal_text(looked_at, problem, capability, policy)
    best = _cheapest(able, problem, capability, policy)
    sized = _sized(problem, able, capability, policy)
    lines = [str(problem), f"on {capability}", str(policy), f"selected: {best.name} [{best.target}]", "rows:"]
    for verdict in looked_at:
        note = " <- selected" if verdict.entry == best else ", ranked behind" if verdict.eligible else ""
        known = timing(verdict.entry, sized, capability) if verdict.eligible else None
        told = f", {known.microseconds:.1f} us for {known.shape}" if known is not None else ""
        lines.append(f"  {verdict}{told}{note}")
    return "\n".join(lines)


def _refusal_text(looked_at: tuple[Verdict, ...], problem: Problem, capability: Capability, policy: Policy) -> str:
    """Every row with its reasons, each family's gates beside the actual values, the overrides, the command that helps.

    Rows come first, because the end is what a terminal shows of a long error.
    """
    lines = [f"no kernel can serve {problem} on {capability}", *(f"  {verdict}" for verdict in looked_at)]
    for family in families_of(problem.kernel_op):
        checks = tuple(family_checks(family, problem, capability))
        lines.append(f"{family}:")
        lines += [f"  {'ok' if check.passed else 'NO'}  {check}" for check in checks]
        rows = [verdict for verdict in looked_at if verdict.entry.spec.family is family]
        lines += [f"  {line}" for line in _rows_text(rows)]
        missing = not any(_beyond_a_build(verdict) for verdict in rows)
        if missing and policy.leaves(family) and all(check.passed for check in checks):
            pattern = _filter(family, problem)
            lines.append(f"  build what is missing: pa-ops build --arch {capability.build_target} --filter '{pattern}'")
    if problem.kernel_op is KernelOp.ATTN:
        lines.append(f"overrides: {policy}; families: {', '.join(attention_families())}")
    return "\n".join(lines)


def _rows_text(rows: list[Verdict]) -> list[str]:
    """How many rows there are, how many each gate rejects, and the row with the fewest reasons."""
    if not rows:
        return ["rows: none is built"]
    counts = Counter(gate for verdict in rows for gate in {reason.gate for reason in verdict.reasons})
    told = ", ".join(f"{gate} {count}" for gate, count in sorted(counts.items()))
    nearest = min(rows, key=lambda verdict: (len(verdict.reasons), verdict.entry.name, verdict.entry.target))
    return [f"rows: {len(rows)}, rejected by {told}", f"nearest row: {nearest}"]


def _beyond_a_build(verdict: Verdict) -> bool:
    """Whether the row that fits is there and something other than a missing build keeps it out."""
    return all(reason.gate in ("backend", "shared memory") for reason in verdict.reasons)


def _filter(family: Family, problem: Problem) -> str:
    """A glob of the instances that would serve the problem; head sizes are left open because rows pad them."""
    head = f"pa_{problem.kernel_op}_{family}_{problem.dtype}_kv{problem.kv_dtype}_*"
    if problem.kernel_op is not KernelOp.ATTN:
        return head
    mask = next(mask for mask, served in GATES[family].masks.items() if problem.mask in served)
    return f"{head}_{problem.layout}_{mask}_*"
