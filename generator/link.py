"""Turns objects into one library that needs nothing but libtvm_ffi and the C library.

The CUDA runtime and the DSL's host runtime are linked in statically (0.7 MB, once a library), so a product runs with
any CUDA of its driver's generation, any torch and any Python. The kernels' own symbols are all that it exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layout import TEMPORARY, Layout, write_if_changed
from .ninja import Edge, shell
from .toolchain import Toolchain

SYMBOL_PREFIX = "__tvm_ffi_"
SUPPORT = Path(__file__).with_name("support.c")
VERSION_SCRIPT = f"{{ global: {SYMBOL_PREFIX}*; local: *; }};\n"
FLAGS = (
    "-shared",
    "-fPIC",
    "-O2",
    "-fvisibility=hidden",
    "-Wl,--gc-sections",
    "-Wl,-z,defs",
    "-Wl,--build-id=none",
    "-Wl,--exclude-libs,ALL",
)
LIBRARIES = ("-ldl", "-lpthread", "-lrt")


def staged_library(layout: Layout) -> Path:
    """The linker's output; the build publishes it together with its manifest."""
    return layout.link / layout.library.name


def link_edge(tools: Toolchain, layout: Layout, names: Sequence[str]) -> Edge:
    """The edge that links and strips the objects of `names`; writes the version script it needs."""
    script = layout.link / "exports.map"
    write_if_changed(script, VERSION_SCRIPT)
    output = staged_library(layout)
    draft = output.with_name(f"{output.name}{TEMPORARY}")
    response = layout.link / "objects.rsp"
    objects = tuple(layout.object(name) for name in sorted(names))
    link: list[str | Path] = [
        tools.compiler,
        *FLAGS,
        f"-Wl,--version-script={script}",
        "-o",
        draft,
        SUPPORT,
        f"@{response}",
        tools.dialect_runtime,
        tools.cuda_runtime,
        f"-L{tools.tvm_ffi_library.parent}",
        "-ltvm_ffi",
        *LIBRARIES,
    ]
    steps: tuple[list[str | Path], ...] = (link, [tools.strip, "--strip-unneeded", draft], ["mv", "-f", draft, output])
    return Edge(
        rule="link",
        command=" && ".join(shell(step) for step in steps),
        description=f"link {len(objects)} kernels",
        outputs=(output,),
        inputs=objects,
        implicit=(SUPPORT, script, tools.dialect_runtime, tools.cuda_runtime, tools.tvm_ffi_library),
        response=(response, " ".join(f'"{path}"' for path in objects)),
    )
