"""Turns this machine into a list of what works, what does not and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pa_ops import homes
from pa_ops.capability import parse_target
from pa_ops.manifest import Manifest

from .build import default_jobs
from .digest import sha256_of
from .layout import Layout
from .targets import DECLARED_TARGETS, TARGETS, default_targets, target_of_sm, visible_sms
from .toolchain import OLDER_NVRTC, Toolchain, ToolchainError, examine


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is well, what was found or what to do."""

    what: str
    well: bool
    detail: str


def _tools() -> Iterator[Finding]:
    yield Finding("Python", sys.version_info >= (3, 10), sys.version.split()[0])
    for part, works, detail in examine(Toolchain()):
        yield Finding(part, works, detail)
    yield _targets(Toolchain())
    yield Finding("jobs", True, f"{default_jobs()} compile workers at a time fit cores and free memory")


def _targets(tools: Toolchain) -> Finding:
    """Which declared targets can be built, NVRTC 13 knowing none before sm_75; well where those built here are."""
    try:
        missing = [target for target in DECLARED_TARGETS if parse_target(target) not in tools.nvrtc_sms]
    except ToolchainError:
        return Finding("targets", False, "none without NVRTC")
    told = f"NVRTC {tools.nvrtc_version} does not know {', '.join(missing)}; {OLDER_NVRTC}"
    well = set(default_targets()).isdisjoint(missing)
    return Finding("targets", well, told if missing else f"all: {', '.join(DECLARED_TARGETS)}")


def _gpus() -> Iterator[Finding]:
    sms = visible_sms()
    if not sms:
        detail = f"none found; builds are for {', '.join(default_targets())} unless --arch says otherwise"
        yield Finding("GPU", True, detail)
    for sm in sms:
        serves = target_of_sm(sm)
        detail = f"SM {sm / 10:.1f}, served by {serves}" if serves else f"SM {sm / 10:.1f}: no kernel exists for it yet"
        yield Finding("GPU", serves is not None, detail)


def _product(layout: Layout) -> str:
    """What is wrong with a product, empty when nothing is."""
    found = homes.read(layout.root)
    if not isinstance(found, homes.Product):
        return found.reason if found is not None else "its manifest is missing"
    if not found.library.is_file():
        return f"{found.library} is missing"
    if sha256_of(found.library) != found.manifest.library_sha256:
        return "the library is not the one that the manifest was written for"
    return ""


def _products(home: Path) -> Iterator[Finding]:
    writable = homes.writable(home)
    place = f"{home}" if writable else f"{home} cannot be written, so {homes.cache()} is; or set PA_OPS_HOME"
    yield Finding("products", writable or homes.writable(homes.cache()), place)
    built = [target for target in TARGETS if Layout(home / target).manifest.is_file()]
    for target in built:
        layout = Layout(home / target)
        wrong = _product(layout)
        count = "" if wrong else f"{len(Manifest.load(layout.manifest).entries)} kernels"
        yield Finding(f"product {target}", not wrong, f"{wrong}; run pa-ops build --arch {target}" if wrong else count)
    here = {served for sm in visible_sms() if (served := target_of_sm(sm)) is not None}
    for target in sorted(here.difference(built)):
        yield Finding(f"product {target}", False, f"not built for the GPU here; run pa-ops build --arch {target}")


def findings(home: Path) -> tuple[Finding, ...]:
    """Everything looked at, tools first."""
    return (*_tools(), *_gpus(), *_products(home))


def diagnose(home: Path, console: Console) -> int:
    """Print the findings; 1 when anything is not well."""
    table = Table("", "what", "found, or what to do")
    found = findings(home)
    for finding in found:
        table.add_row("ok" if finding.well else "NO", finding.what, finding.detail)
    console.print(table)
    return 0 if all(finding.well for finding in found) else 1
