"""Turns the manifests of a build into a verdict: no kernel may spill or keep a stack frame."""

from __future__ import annotations

import sys

from pa_ops.generator.layout import built
from pa_ops.homes import home
from pa_ops.manifest import Manifest


def main() -> int:
    """0 where at least one kernel is built and none spills; else 1, with each that does."""
    manifests = [Manifest.load(layout.manifest) for layout in built(home())]
    kernels = [entry for manifest in manifests for entry in manifest.entries]
    spills = [entry for entry in kernels if entry.spill_bytes or entry.stack_bytes]
    for entry in spills:
        print(f"{entry.name} for {entry.target}: {entry.spill_bytes} B spilled, {entry.stack_bytes} B of stack")
    targets = ", ".join(manifest.target for manifest in manifests) or "no target"
    print(f"{len(kernels)} kernels for {targets}: {len(spills)} spill")
    return 1 if spills or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
