"""Turns a product home and a target into the paths of a build: sources, objects, library, manifest."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pa_ops.manifest import FILE_NAME, Manifest
from pa_ops.spec import InstanceSpec

from .language import language_of

LIBRARY = "libpa_ops.so"
TEMPORARY = ".part"  # every unfinished file ends so; the next build removes it


@dataclass(frozen=True)
class Layout:
    """The folders and files of one target's products below `root`."""

    root: Path

    @property
    def sources(self) -> Path:
        """Rendered instances."""
        return self.root / "src"

    @property
    def objects(self) -> Path:
        """Objects and their facts."""
        return self.root / "obj"

    @property
    def linked(self) -> Path:
        """The library as the linker left it."""
        return self.link / LIBRARY

    @property
    def library(self) -> Path:
        """The library that the manifest names; raises where there is none."""
        return self.root / Manifest.load(self.manifest).library

    @property
    def libraries(self) -> tuple[Path, ...]:
        """Every library beside the manifest; those that it does not name belong to it no more."""
        return tuple(self.root.glob(f"{Path(LIBRARY).stem}*.so"))

    def library_of(self, sha256: str) -> Path:
        """Where a library goes, by its content: a file of that name never changes under those who have it open."""
        return self.root / f"{Path(LIBRARY).stem}-{sha256[:16]}.so"

    @property
    def manifest(self) -> Path:
        """What the library holds; written last."""
        return self.root / FILE_NAME

    @property
    def link(self) -> Path:
        """Inputs of the link that are no kernels: the host's code, the table of kernels, exports; and its output."""
        return self.root / "link"

    @property
    def lock(self) -> Path:
        """Held by the one build that may write here."""
        return self.root / ".lock"

    def source(self, spec: InstanceSpec) -> Path:
        """The rendered source of an instance."""
        return self.sources / f"{spec.name}.{language_of(spec)}"

    def object(self, name: str) -> Path:
        """The compiled code of an instance, for the device alone: a cubin, or PTX."""
        return self.objects / f"{name}.image"

    def facts(self, name: str) -> Path:
        """The facts beside an object; they exist only when it is complete."""
        return self.objects / f"{name}.json"

    def files(self, spec: InstanceSpec) -> tuple[Path, Path, Path]:
        """Everything of an instance that a whole build leaves."""
        return self.source(spec), self.object(spec.name), self.facts(spec.name)

    def failure(self, name: str) -> Path:
        """Why an instance did not compile."""
        return self.objects / f"{name}.error"


def built(home: Path) -> tuple[Layout, ...]:
    """Those targets of a product home whose build has ended, by name."""
    return tuple(Layout(manifest.parent) for manifest in sorted(home.glob(f"*/{FILE_NAME}")))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step, so that a reader or a crash sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=TEMPORARY)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_if_changed(path: Path, text: str) -> bool:
    """Write `text` unless the file holds it already; says whether it wrote."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomically(path, text)
    return True
