"""Turns a checkout into something to look at: kernels built for this machine, two models run on them, the coverage."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import monotonic

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

import pa_ops
from demo import embeddings, generation
from pa_ops import report
from pa_ops.cli import coverage_of
from pa_ops.overrides import REFERENCE

ROOT = Path(__file__).resolve().parent.parent
USES = ROOT / "docs" / "gpu-uses.json"
HTML = Path("build") / "coverage.html"
MIN_COSINE = 0.999
DTYPE = torch.float16


def pa_ops_command(*arguments: str) -> None:
    """Runs `pa-ops` with `arguments`, as a user would; where that fails it has said why, and the demo ends."""
    status = subprocess.run([sys.executable, "-m", "pa_ops", *arguments], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def show_calls(console: Console, calls: list[pa_ops.trace.Decision]) -> None:
    """Which kernel served how many of the calls."""
    table = Table("calls", "family", "instance", title="what served them", title_justify="left")
    for (family, instance), count in Counter((call.family, call.instance) for call in calls).most_common():
        table.add_row(str(count), family, instance or "plain PyTorch")
    console.print(table)


def show_embeddings(console: Console, device: torch.device) -> bool:
    """Sentence embeddings by stock attention and by pa_ops, side by side."""
    with pa_ops.trace.recording() as calls:
        result = embeddings.run(device, DTYPE)
    table = Table("cosine", "sentence")
    for cosine, sentence in zip(result.cosines, embeddings.SENTENCES, strict=True):
        table.add_row(f"{cosine:.6f}", escape(sentence[:80]))
    console.print(table)
    console.print(f"largest difference of a value: {result.max_difference:.1e}")
    show_calls(console, calls)
    return min(result.cosines) > MIN_COSINE


def show_generation(console: Console, device: torch.device) -> bool:
    """Greedy continuations by stock generation and over a paged cache, token by token."""
    with pa_ops.trace.recording() as calls:
        training, results = generation.run(device, DTYPE)
    console.print(
        f"trained {training.parameters:,} parameters for {training.steps} steps in {training.seconds:.0f} s, "
        f"loss {training.loss:.2f} nats a byte"
    )
    table = Table("equal", "least lead", "prompt and its continuation")
    for result in results:
        at = result.first_mismatch
        equal = "all" if at is None else f"up to {at}"
        text = result.prompt + "[bold]" + escape(bytes(result.ours).decode(errors="replace")) + "[/bold]"
        table.add_row(equal, f"{min(result.margins):.2f}", text)
    console.print(table)
    for result in results:
        if (at := result.first_mismatch) is not None:
            console.print(
                f"first mismatch of {result.prompt!r}: token {at}, stock {result.stock[at]}, pa_ops {result.ours[at]}; "
                f"stock's lead over its second choice there is {result.margins[at]:.4f} logits",
                markup=False,
            )
    show_calls(console, calls)
    return all(result.first_mismatch is None for result in results)


def show_coverage(console: Console) -> None:
    """How far every kernel has come for every target."""
    head, rows = report.heat_map(coverage_of(ROOT / "docs"))
    letters = ", ".join(f"{letter} {state}" for state, letter in report.SYMBOLS.items())
    table = Table(*head, title=f"one letter a dtype: {letters}", title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def write_uses(calls: list[pa_ops.trace.Decision]) -> None:
    """Tells the coverage report which kernels the demo ran; the reference, which serves CPU tensors, is none."""
    names = sorted({call.instance for call in calls if call.family != REFERENCE})
    if names:
        USES.write_text(json.dumps({"demo": names}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Builds, runs both models, prints the coverage; 1 when a model's answer is not the stock one."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: kernels cross-compiled, models on the CPU"
    )
    failures = []
    began = monotonic()
    console.rule(f"1. build the smoke preset ({where})")
    pa_ops_command("build", "--preset", "smoke")
    console.rule("2. sentence embeddings, attention replaced by pa_ops")
    with pa_ops.trace.recording() as calls:
        if not show_embeddings(console, device):
            failures.append(f"an embedding's cosine to stock attention is not above {MIN_COSINE}")
        console.rule("3. a small Llama, decoded over a paged KV cache")
        if not show_generation(console, device):
            failures.append("a continuation differs from stock generation")
    write_uses(calls)
    console.rule("4. coverage")
    show_coverage(console)
    pa_ops_command("report", "--html", str(HTML))
    console.print(f"every kernel with its registers, sizes and states, as a page: {HTML}")
    for failure in failures:
        console.print(f"[red]failed:[/red] {failure}")
    console.print(f"{'failed' if failures else 'done'} in {monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
