"""Turns cubins into one library that needs nothing but libtvm_ffi, the C library and what those need.

Each image lies in the library as it is, beside the C code that launches it through the driver, so a product runs with
any CUDA of its driver's generation, any torch and any Python. It exports a symbol a kernel, the one that calls them and
those by which a process takes it up (`EXPORTS`).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pa_ops.errors import BuildError
from pa_ops.sources import INCLUDED, LINKED

from .digest import sha256_of
from .layout import TEMPORARY, Layout, write_if_changed
from .ninja import shell
from .toolchain import Toolchain

SYMBOL_PREFIX = "__tvm_ffi_"
EXPORTS = ("pa_attach", "pa_operator", "pa_watch", "pa_keep", "pa_lend", "pa_raise")  # what pa_ops/native.py calls
SOURCES = tuple(Path(__file__).with_name(name) for name in LINKED)
HEADERS = tuple(Path(__file__).with_name(name) for name in INCLUDED)
VERSION_SCRIPT = f"{{ global: {SYMBOL_PREFIX}*; {' '.join(f'{name};' for name in EXPORTS)} local: *; }};\n"
COMPILE_FLAGS = (
    "-fPIC",
    "-O3",  # 3% of a call's host time
    "-fvisibility=hidden",
    "-fexceptions",  # raise.c's pass through operators.c
)
FLAGS = (
    "-shared",
    *COMPILE_FLAGS,
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
        numbers = ", ".join(str(kernel[key]) for key in ("threads", "smem", "arguments", "chained", "cluster"))
        lines.append(f'PA_KERNEL({name}, "{layout.object(name)}", "{kernel["entry"]}", {numbers})')
    return "\n".join(lines) + "\n"


def _run(step: Sequence[str | Path], library: str) -> None:
    done = subprocess.run(step, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(library, shell(step), done.stdout + done.stderr)


def _host_code(tools: Toolchain, layout: Layout) -> Path:
    """One object of all C sources, kept beside the links that it is for: compiling it takes 0.4 s, a link 0.1.

    Its name tells what it was made of, and its own sha256, so that a damaged one is not linked.
    """
    includes = [f"-I{folder}" for folder in (SOURCES[0].parent, *tools.tvm_ffi_includes)]
    words = [str(tools.compiler), *tools.versions.values(), *COMPILE_FLAGS, *includes]
    inputs = [*words, *(sha256_of(path) for path in (*SOURCES, *HEADERS))]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    for path in layout.link.glob(f"host-{key}-*.o"):
        if path.stem.endswith(sha256_of(path)[:16]):
            return path
    draft = layout.link / f"host.o{TEMPORARY}"
    _run([tools.compiler, "-r", "-nostdlib", *COMPILE_FLAGS, *includes, "-o", draft, *SOURCES], layout.linked.name)
    for path in layout.link.glob("host-*.o"):
        path.unlink()
    path = layout.link / f"host-{key}-{sha256_of(draft)[:16]}.o"
    os.replace(draft, path)
    return path


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
        _host_code(tools, layout),
        table,
        f"-L{tools.tvm_ffi_library.parent}",
        *LIBRARIES,
    ]
    strip: list[str | Path] = [tools.strip, "--strip-unneeded", draft]
    for step in (command, strip):
        _run(step, layout.linked.name)
    os.replace(draft, output)
    return output
