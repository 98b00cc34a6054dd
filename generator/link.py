"""Turns cubins into one library that needs nothing but libtvm_ffi, the C library and what those need.

Each image lies in the library as it is, beside the C code that launches it through the driver, so a product runs with
any CUDA of its driver's generation, any torch and any Python. It exports a symbol a kernel and the one that calls them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pa_ops.errors import BuildError
from pa_ops.sources import LINKED

from .layout import TEMPORARY, Layout, write_if_changed
from .ninja import shell
from .toolchain import Toolchain

SYMBOL_PREFIX = "__tvm_ffi_"
EXPORTS = ("pa_attach", "pa_operator", "pa_watch", "pa_keep", "pa_lend", "pa_raise")  # what pa_ops/native.py calls
SOURCES = tuple(Path(__file__).with_name(name) for name in LINKED)
VERSION_SCRIPT = f"{{ global: {SYMBOL_PREFIX}*; {' '.join(f'{name};' for name in EXPORTS)} local: *; }};\n"
FLAGS = (
    "-shared",
    "-fPIC",
    "-O2",
    "-fvisibility=hidden",
    "-fexceptions",  # raise.c's pass through operators.c
    "-Wl,--gc-sections",
    "-Wl,-z,defs",
    "-Wl,--build-id=none",
    "-Wl,--exclude-libs,ALL",
)
LIBRARIES = ("-ltvm_ffi", "-ldl", "-lpthread")


def _table(layout: Layout, names: Sequence[str]) -> str:
    """The C source that binds every image to its launch."""
    lines = ['#include "launch.h"']
    for name in names:
        kernel = json.loads(layout.facts(name).read_text(encoding="utf-8"))["launch"]
        numbers = ", ".join(str(kernel[key]) for key in ("threads", "smem", "arguments", "chained"))
        lines.append(f'PA_KERNEL({name}, "{layout.object(name)}", "{kernel["entry"]}", {numbers})')
    return "\n".join(lines) + "\n"


def link(tools: Toolchain, layout: Layout, names: Sequence[str]) -> Path:
    """Link and strip the cubins of `names`; returns the library. Raises BuildError with the compiler's words."""
    table, script = layout.link / "kernels.c", layout.link / "exports.map"
    write_if_changed(table, _table(layout, sorted(names)))
    write_if_changed(script, VERSION_SCRIPT)
    output = layout.linked  # the build publishes it together with its manifest
    draft = output.with_name(f"{output.name}{TEMPORARY}")
    command: list[str | Path] = [
        tools.compiler,
        *FLAGS,
        *(f"-I{folder}" for folder in (SOURCES[0].parent, *tools.tvm_ffi_includes)),
        f"-Wl,--version-script={script}",
        "-o",
        draft,
        *SOURCES,
        table,
        f"-L{tools.tvm_ffi_library.parent}",
        *LIBRARIES,
    ]
    strip: list[str | Path] = [tools.strip, "--strip-unneeded", draft]
    for step in (command, strip):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(layout.linked.name, shell(step), done.stdout + done.stderr)
    os.replace(draft, output)
    return output
