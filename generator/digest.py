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

from .language import Language, language_of
from .render import Renderer, template_name

HEADERS = {Language.CUTE: "*.py", Language.CUDA: "*.cuh"}


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Digester:
    """Digests for one set of templates and tools; files are read once."""

    renderer: Renderer
    compile_sources: tuple[Path, ...]
    toolchain: Mapping[Language, Mapping[str, str]]

    @cached_property
    def common(self) -> dict[Language, dict[str, object]]:
        """What every digest of a language covers: files that workers read, and tools."""
        return {language: self._common(language) for language in Language}

    def _common(self, language: Language) -> dict[str, object]:
        device = self.renderer.folder / "device"
        headers = sorted(device.rglob(HEADERS[language]))
        return {
            "files": {path.name: sha256_of(path) for path in (*headers, *self.compile_sources)},
            "toolchain": dict(self.toolchain[language]),
        }

    def digest(self, spec: InstanceSpec, target: str, source: str) -> str:
        """The digest of the object that `source`, rendered from `spec`, gives for `target`."""
        document = {
            **self.common[language_of(spec)],
            "name": spec.name,
            "target": target,
            "template": template_name(spec),
            "template_text": self.renderer.template_text(spec),
            "source": source,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
