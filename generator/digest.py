"""Turns everything that decides an object's bytes into one digest; the bytes themselves are never read.

Two objects with one digest may be exchanged; a build compiles what has no object of its digest.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pa_ops.spec import InstanceSpec

from .language import Language, language_of
from .render import Renderer, template_name

DEVICE = "pa_ops.templates.device"
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"', re.MULTILINE)
_STATEMENT = re.compile(rf"^[ \t]*(from {re.escape(DEVICE)}[.\w]* import (?:\([^)]*\)|[^\n]*))", re.MULTILINE)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=512)
def _imported(text: str) -> frozenset[str]:
    """Names of the device modules that Python source imports; nothing else is parsed, which would take 0.1 s."""
    return frozenset(name for found in _STATEMENT.finditer(text) for name in _imports(ast.parse(found[1])))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == DEVICE:
            yield from (f"{alias.name}.py" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{DEVICE}."):
            yield f"{node.module.removeprefix(f'{DEVICE}.')}.py"


_NAMED: dict[Language, Callable[[str], Iterable[str]]] = {Language.CUTE: _imported, Language.CUDA: _INCLUDE.findall}


@dataclass(frozen=True)
class Digester:
    """Digests for one set of templates and tools; files are read once."""

    renderer: Renderer
    compile_sources: tuple[Path, ...]
    toolchain: Mapping[Language, Mapping[str, str]]

    @cached_property
    def common(self) -> dict[Language, dict[str, object]]:
        """What every digest of a language covers: the sources of the compile worker, and tools."""
        files = {path.name: sha256_of(path) for path in self.compile_sources}
        return {language: {"files": files, "toolchain": dict(self.toolchain[language])} for language in Language}

    @cached_property
    def modules(self) -> dict[str, str]:
        """Device module or header -> its text."""
        return {
            path.name: path.read_text(encoding="utf-8")
            for path in (self.renderer.folder / "device").iterdir()
            if path.is_file()
        }

    @cached_property
    def _sums(self) -> dict[str, str]:
        """Device module or header -> the sha256 of its text."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.modules.items()}

    @cached_property
    def _named(self) -> dict[str, frozenset[str]]:
        """Device module or header -> those that it names itself."""
        languages = {".py": Language.CUTE, ".cuh": Language.CUDA}
        known = ((name, text, languages.get(Path(name).suffix)) for name, text in self.modules.items())
        return {name: frozenset(_NAMED[language](text)) for name, text, language in known if language}

    def device_files(self, language: Language, source: str) -> dict[str, str]:
        """The sha256 of every device module or header that `source` names, itself or through others."""
        found: set[str] = set()
        named = set(_NAMED[language](source))
        while named:
            found |= named
            named = {other for name in named for other in self._named.get(name, ())} - found
        return {name: self._sums[name] for name in sorted(found) if name in self._sums}

    def digest(self, spec: InstanceSpec, target: str, source: str) -> str:
        """The digest of the object that `source`, rendered from `spec`, gives for `target`."""
        language = language_of(spec)
        document = {
            **self.common[language],
            "device": self.device_files(language, source),
            "name": spec.name,
            "target": target,
            "template": template_name(spec),
            "template_text": self.renderer.template_text(spec),
            "source": source,
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
