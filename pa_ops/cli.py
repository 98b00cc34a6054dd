"""Turns a command line into a build, a list, an explanation, a report, a bench or a diagnosis.

Exit status: 0 done, 1 refused or failed (the reason is on stderr), 2 a command line that argparse rejects, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pa_ops import evidence, report, report_diff, timings
from pa_ops.coverage import Coverage, cover
from pa_ops.errors import InvalidArgument, PaOpsError
from pa_ops.homes import destination, home, homes
from pa_ops.spec import Op
from pa_ops.survey import Reach
from pa_ops.words import question

if TYPE_CHECKING:
    from pa_ops.generator.build import Request

EVIDENCE = "gpu-evidence.json"
BENCH = "gpu-bench.json"
USES = "gpu-uses.json"


def _archs(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="pa-ops", description="Generated paged and ragged attention kernels.")
    commands = top.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="generate and build: sources, objects, libraries, manifest")
    build.add_argument("--preset", default="serving", metavar="NAME", help="smoke, serving (the default) or full")
    build.add_argument("--arch", type=_archs, default=(), metavar="A,B", help="sm_80,sm_90a,...; default: the GPU here")
    build.add_argument("--filter", metavar="GLOB", help="only instances whose name matches")
    build.add_argument("--model", type=_archs, metavar="A=B,C=D", help="what a model needs: head_dim=128,dtype=bf16")
    build.add_argument("--jobs", type=int, default=0, metavar="N", help="processes at a time; default: one a core")
    build.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    build.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    build.set_defaults(run=run_build)

    listing = commands.add_parser("list", help="the instances, one a line, by their stable names")
    listing.add_argument("--preset", default="full", metavar="NAME")
    listing.add_argument("--arch", type=_archs, default=(), metavar="A,B")
    listing.add_argument("--filter", metavar="GLOB")
    listing.add_argument("--json", action="store_true", help="with axes, targets and whether each is built")
    listing.set_defaults(run=run_list)

    explain = commands.add_parser("explain", help="what would be selected, and why the rest is not")
    explain.add_argument("op", metavar="OP", help="one of " + ", ".join(Op))
    explain.add_argument(
        "facts", nargs="*", metavar="key=value", help="a Problem's fields, sm=90, card=NAME, backend=NAME"
    )
    explain.set_defaults(run=run_explain)

    coverage = commands.add_parser("report", help="the instance-coverage report, as Markdown on stdout")
    coverage.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    coverage.add_argument("--json", type=Path, metavar="FILE", help="write it for programs")
    coverage.add_argument("--markdown", type=Path, metavar="FILE", help="write the Markdown to a file")
    coverage.add_argument("--diff", type=Path, metavar="OLD", help="fail on what is worse than in an older --json FILE")
    coverage.add_argument("--docs", type=Path, default=_docs(), metavar="DIR", help=f"holds {EVIDENCE} and {BENCH}")
    coverage.add_argument("--check", action="store_true", help="fail on a hole or an unreachable kernel")
    coverage.set_defaults(run=run_report)

    doctor = commands.add_parser("doctor", help="toolchains, GPU, products: what works, what does not, what to do")
    doctor.set_defaults(run=run_doctor)

    bench = commands.add_parser("bench", help="time the built instances on the GPU")
    bench.add_argument(
        "--case", default="all", metavar="NAME", help="prefill, chunk, decode, swa, serving, padded, mea or all"
    )
    bench.add_argument("--ctx", type=int, metavar="N", help="keys of each sequence")
    bench.add_argument("--window", type=int, metavar="N", help="sliding window")
    bench.add_argument("--num-seqs", type=int, metavar="N", help="sequences")
    bench.add_argument("--dtype", default="bf16", metavar="NAME", help="fp16 or bf16")
    bench.add_argument("--loop", type=float, metavar="SECONDS", help="call back to back so long, not one at a time")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the rows for programs")
    table = "time each built kernel instead, into the table that selection ranks by on such a card"
    bench.add_argument("--record", type=Path, nargs="?", const=timings.FILE, metavar="FILE", help=table)
    bench.set_defaults(run=run_bench)
    return top


def _docs() -> Path:
    return Path(__file__).resolve().parent.parent / "docs"


def for_model(request: Request, words: Sequence[str]) -> list[Request]:
    """The request for each of its targets, of what a model with such attention needs there."""
    from pa_ops.jit import model_needs

    targets = request.resolved_targets()
    return [replace(request, targets=(each,), pattern=",".join(model_needs(words, each))) for each in targets]


def run_build(arguments: argparse.Namespace, console: Console) -> int:
    """Build, or say what a build would do."""
    from pa_ops.generator.build import Request, build, plans
    from pa_ops.generator.progress import Display

    if arguments.jobs < 0:
        raise InvalidArgument("jobs", "must be an integer >= 0", arguments.jobs)
    root = destination(homes()) or home()
    request = Request(root, arguments.preset, arguments.arch, arguments.filter, arguments.jobs)
    requests = [request] if arguments.model is None else for_model(request, arguments.model)
    if arguments.dry_run:
        rows = [
            {
                "target": plan.target,
                "compile": [item.name for item in plan.stale],
                "up_to_date": [item.name for item in (*plan.fresh, *plan.kept)],
                "drop": list(plan.dropped),
            }
            for request in requests
            for _, plan in plans(request)
        ]
        _say_plans(rows, as_json=arguments.json, console=console)
        return 0
    with Display(Console(stderr=True) if arguments.json else console) as display:
        outcomes = [outcome for request in requests for outcome in build(request, display)]
    if arguments.json:
        done = [
            {
                "target": outcome.target,
                "compiled": list(outcome.compiled),
                "up_to_date": list(outcome.fresh),
                "dropped": list(outcome.dropped),
                "seconds": round(outcome.seconds, 2),
                "manifest": str(outcome.manifest),
            }
            for outcome in outcomes
        ]
        print(json.dumps(done, indent=1))
        return 0
    for outcome in outcomes:
        total = len(outcome.compiled) + len(outcome.fresh)
        text = f"{outcome.target}: {total} kernels, {len(outcome.compiled)} compiled, {outcome.seconds:.1f} s"
        console.print(f"{text} -> {outcome.manifest.parent}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _say_plans(rows: list[dict[str, object]], *, as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        for verb in ("compile", "up_to_date", "drop"):
            names = row[verb]
            assert isinstance(names, list)
            for name in names:
                console.print(f"{row['target']} {verb.replace('_', ' ')} {name}", markup=False, soft_wrap=True)


def run_list(arguments: argparse.Namespace, console: Console) -> int:
    """Names, or with --json axes and states."""
    from pa_ops.generator import inventory, matrix, targets

    wanted = targets.resolve_all(arguments.arch) if arguments.arch else targets.DECLARED_TARGETS
    specs = matrix.declared(arguments.preset, wanted)
    chosen = [spec for spec in specs if arguments.filter is None or matrix.matches(spec.name, arguments.filter)]
    if not chosen:
        raise InvalidArgument("filter", f"must match one of {len(specs)} instances", repr(arguments.filter))
    if not arguments.json:
        print("\n".join(spec.name for spec in chosen))
        return 0
    built = {(entry.name, m.target) for m in inventory.manifests(home()) for entry in m.entries}
    rows = [
        {
            "name": spec.name,
            **{field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "tile"},
            "tile": str(spec.tile),
            "smem_bytes": spec.smem_bytes,
            "targets": [target for target in wanted if matrix.refusal(spec, target) is None],
            "built": sorted(target for name, target in built if name == spec.name),
        }
        for spec in chosen
    ]
    print(json.dumps(rows, indent=1))
    return 0


def run_explain(arguments: argparse.Namespace, console: Console) -> int:
    """The decision for a problem on a device that need not be here."""
    from pa_ops.selecting import explain

    asked = question(arguments.op, arguments.facts)
    print(explain(asked.problem, asked.capability, asked.backend))
    return 0


def coverage_of(docs: Path) -> Coverage:
    """The coverage of this installation: matrix, products, and the evidence files in `docs`."""
    from pa_ops.generator import inventory

    tests, bench = evidence.load(docs / EVIDENCE), evidence.load_timed(docs / BENCH)
    return cover(inventory.inputs(home(), tests, bench, inventory.uses(docs / USES, bench)))


def run_report(arguments: argparse.Namespace, console: Console) -> int:
    """Write the forms that were asked for; with none, Markdown on stdout. 1 for a hole, or for what a diff found."""
    coverage = coverage_of(arguments.docs)
    lost = report_diff.found(report_diff.read(arguments.diff), coverage) if arguments.diff is not None else ()
    forms = (
        (arguments.html, report.to_html),
        (arguments.json, report.to_json),
        (arguments.markdown, report.to_markdown),
    )
    written = [(path, form) for path, form in forms if path is not None]
    for path, form in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(form(coverage), encoding="utf-8")
    if written:
        head, rows = report.summary(coverage)
        table = Table(*head)
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)
        shadowed = len(coverage.reached(Reach.SHADOWED))
        more = f"; {shadowed} shadowed by code for another target" if shadowed else ""
        console.print(f"{len(coverage.holes)} holes, {len(coverage.unreachable)} unreachable kernels{more}")
    elif arguments.diff is None:
        print(report.to_markdown(coverage), end="")
    if arguments.diff is not None:
        print(report_diff.text(lost, arguments.diff), end="")
    bad = arguments.check and (coverage.holes or coverage.unreachable)
    return 1 if bad or lost else 0


def run_doctor(arguments: argparse.Namespace, console: Console) -> int:
    """What works, what does not, what to do about it; 1 when anything does not."""
    from pa_ops.generator.doctor import diagnose

    status: int = diagnose(home(), console)
    return status


def run_bench(arguments: argparse.Namespace, console: Console) -> int:
    """Time the built instances; needs a GPU."""
    if arguments.record is not None:
        from pa_ops import bench_record

        return bench_record.run(console, arguments.record)
    from pa_ops.bench import run

    return run(
        console,
        case=arguments.case,
        ctx=arguments.ctx,
        window=arguments.window,
        num_seqs=arguments.num_seqs,
        dtype=arguments.dtype,
        loop=arguments.loop,
        output=arguments.json,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script's entry point."""
    arguments = parser().parse_args(argv)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        status: int = arguments.run(arguments, console)
        sys.stdout.flush()
    except PaOpsError as error:
        print(f"pa-ops: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has enough, `pa-ops list | head` say; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file that was named cannot be read or written
        print(f"pa-ops: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pa-ops: interrupted; what was complete is kept", file=sys.stderr)
        return 130
    return status
