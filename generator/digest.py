"""Turns everything that decides an object's bytes into one digest; the bytes themselves are never read.

Two objects with one digest may be exchanged; a build compiles what has no object of its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pa_ops.spec import InstanceSpec

from .render import Renderer, template_name


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Digester:
    """Digests for one set of templates, tools and flags; files are read once."""

    renderer: Renderer
    compile_sources: tuple[Path, ...]
    toolchain: Mapping[str, str]
    flags: tuple[str, ...]

    @cached_property
    def common(self) -> dict[str, object]:
        """What every digest covers: files that workers read, tools, flags."""
        device = self.renderer.folder / "device"
        files = [*sorted(device.rglob("*.py")), *self.compile_sources]
        return {
            "files": {path.name: sha256_of(path) for path in files},
            "toolchain": dict(self.toolchain),
            "flags": list(self.flags),
        }

    def digest(self, spec: InstanceSpec, target: str, source: str) -> str:
        """The digest of the object that `source`, rendered from `spec`, gives for `target`."""
        document = {
            **self.common,
            "name": spec.name,
            "target": target,
            "template": template_name(spec),
            "template_text": self.renderer.template_text(spec),
            "source": source,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
