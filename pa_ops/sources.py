"""Turns the installed sources that decide products into one fingerprint, which tells a product of others by sight."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pa_ops import arguments

# Of the generator: what renders a source, what turns it into an object, and what is linked into a library.
RENDERING = ("render.py", "language.py", "tiles.py")
COMPILING = ("worker.py", "cubin.py", "ptx.py", "nvrtc.py")
LINKED = ("launch.c", "program.c", "kept.c", "operators.c", "raise.c")
INCLUDED = ("export.h", "launch.h", "program.h", "kept.h", "host.h")
TEMPLATES = (".j2", ".py", ".cuh", ".h")


@lru_cache(maxsize=2)
def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed")
    return Path(spec.origin).parent


def generator_folder() -> Path:
    """Where the generator of this installation lies."""
    return _folder("pa_ops.generator")


def template_folder() -> Path:
    """Where the templates of this installation lie."""
    return _folder("pa_ops.templates")


def _files(templates: Path) -> Iterator[Path]:
    for folder in (templates, templates / "device"):
        yield from sorted(path for path in folder.iterdir() if path.suffix in TEMPLATES)
    yield from (generator_folder() / name for name in (*RENDERING, *COMPILING, *LINKED, *INCLUDED))
    yield Path(arguments.__file__)


def fingerprint(templates: Path | None = None) -> str:
    """The sha256 of templates and device modules, of what renders and compiles them, the linked C and the argument
    records (3 ms)."""
    found = hashlib.sha256()
    for path in _files(templates or template_folder()):
        found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


@lru_cache(maxsize=1)
def ours() -> str:
    """The fingerprint of this installation, as this process found it."""
    return fingerprint()
