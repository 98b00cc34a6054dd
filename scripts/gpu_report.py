"""Turns runs of the GPU tests (junit XML, evidence JSON) into docs/gpu-report.md and docs/gpu-evidence.json."""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pa_ops import evidence as files
from pa_ops.evidence import Evidence, Key, Machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Tests:
    """Outcomes by test file, and the first line of each failure by test name."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: dict[str, str] = field(default_factory=dict)

    def total(self, outcome: str) -> int:
        """Tests with `outcome` (passed, failed, skipped) in all files."""
        return sum(counts[outcome] for counts in self.outcomes.values())


def read_tests(paths: Iterable[Path]) -> Tests:
    """The outcomes in junit XML files as pytest writes them."""
    tests = Tests()
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        file = case.get("classname", "").replace(".", "/") + ".py"
        bad = [child for tag in ("failure", "error") for child in case.findall(tag)]
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        tests.outcomes[file][outcome] += 1
        tests.seconds[file] += float(case.get("time", "0"))
        if bad:
            text = bad[0].get("message") or "no message"
            tests.failures[f"{file}::{case.get('name')}"] = text.splitlines()[0]
    return tests


def machine_of(paths: Iterable[Path]) -> Machine:
    """The one machine of all runs; raises where there are several."""
    machines = {files.machine_of(path) for path in paths}
    if len(machines) != 1:
        raise SystemExit(f"gpu_report: the runs must be of one machine, not {machines}")
    return machines.pop()


def commit_here() -> str:
    """The checkout's commit, marked where files differ from it; raises where this is no checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        raise SystemExit("gpu_report: not a git checkout, so name the commit: --commit")
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(' --- ' for _ in head)}|"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def compilers(evidence: Mapping[Key, Evidence]) -> list[tuple[str, str]]:
    """What made the code that ran, a row for the targets of the same compilers."""
    targets: dict[str, set[str]] = defaultdict(set)
    for (_, target), row in evidence.items():
        targets[", ".join(" ".join(tool) for tool in sorted(row.tools.items()))].add(target)
    return [(f"compilers of {', '.join(sorted(of))}", tools) for tools, of in targets.items() if tools]


def markdown(tests: Tests, evidence: Mapping[Key, Evidence], machine: Machine, commit: str) -> str:
    """The report as a page."""
    by_file = [
        (f"`{file}`", counts["passed"], counts["failed"], counts["skipped"], f"{tests.seconds[file]:.1f}")
        for file, counts in sorted(tests.outcomes.items())
    ]
    parity = [
        (f"`{name}`", target, row.tests, f"{row.worst_error or 0:.2e}", len(row.by), f"`{row.digest[:12]}`")
        for (name, target), row in sorted(evidence.items())
    ]
    lines = [
        "# GPU report",
        "",
        "Written by `scripts/gpu_report.py` from one run of `./run gpu`; not edited by hand.",
        "",
        *table(
            ("what", "value"),
            [
                ("commit", f"`{commit}`"),
                ("card", machine.card),
                ("driver", machine.driver),
                ("torch", machine.torch),
                ("Python", machine.python),
                ("tests", f"{tests.total('passed')} passed, {tests.total('failed')} failed, "
                          f"{tests.total('skipped')} skipped in {sum(tests.seconds.values()):.0f} s of all workers"),
                ("kernels that ran", len(evidence)),
                *compilers(evidence),
            ],
        ),
        "## Tests",
        "",
        *table(("file", "passed", "failed", "skipped", "s"), by_file),
    ]  # fmt: skip
    if tests.failures:
        lines += ["## Failures", "", *table(("test", "message"), list(tests.failures.items()))]
    lines += [
        "## Parity by instance",
        "",
        "Every comparison is a call on poisoned memory (NaN in each slot and row that must not be read or written)",
        "against the fp32 reference. It holds when |got - want| <= atol + rtol * |want| everywhere, with atol = rtol =",
        "5e-3 in fp16, and atol = 1e-2, rtol = 5e-2 in bf16; the error shown is the largest |got - want| of an output.",
        "",
        *table(("instance", "target", "comparisons", "largest error", "tests", "digest"), parity),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Reads a run, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--junit", type=Path, required=True, nargs="+", help="one a run")
    parser.add_argument("--evidence", type=Path, required=True, nargs="+", help="one a run, of one build")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--commit", help="the commit that was tested; default: git's")
    arguments = parser.parse_args()
    commit = arguments.commit or commit_here()
    tests, machine = read_tests(arguments.junit), machine_of(arguments.evidence)
    if not tests.outcomes:
        raise SystemExit("gpu_report: no test ran, so there is nothing to report")
    seen = files.joined(files.load(path) for path in arguments.evidence)
    rows = {key: replace(row, commit=commit, card=machine.card) for key, row in seen.items()}
    files.write(arguments.docs / "gpu-evidence.json", rows, machine)
    page = markdown(tests, rows, machine, commit)
    (arguments.docs / "gpu-report.md").write_text(page, encoding="utf-8")
    print(f"{tests.total('passed')} passed, {tests.total('failed')} failed -> {arguments.docs / 'gpu-report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
