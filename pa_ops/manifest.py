"""Turns a build's manifest.json into checked rows, one per kernel of a library, and back into the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pa_ops.capability import parse_target
from pa_ops.errors import InvalidArgument
from pa_ops.spec import InstanceSpec

SCHEMA = 2
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One kernel: its name and symbol, a digest of its inputs, and what the compiler said.

    `code_targets`: the targets its code was compiled for. Sizes in bytes (spill and stack a thread, shared memory a
    block, object on disk), registers a thread, compile time in seconds. An empty digest marks a row that is declared
    and not built.
    """

    name: str
    symbol: str
    digest: str
    target: str
    code_targets: tuple[str, ...]
    smem_bytes: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    object_bytes: int
    compile_seconds: float

    def __post_init__(self) -> None:
        InstanceSpec.parse(self.name)
        for target in (self.target, *self.code_targets):
            parse_target(target)

    @property
    def spec(self) -> InstanceSpec:
        """What is fixed at compile time, read from the name."""
        return InstanceSpec.parse(self.name)

    @property
    def built(self) -> bool:
        """Whether code exists for the row."""
        return bool(self.digest)

    @classmethod
    def declared(cls, spec: InstanceSpec, target: str) -> Entry:
        """The row of a kernel that a build would make, with the compiler's facts left at zero."""
        return cls(spec.name, spec.name, "", target, (target,), spec.smem_bytes, 0, 0, 0, 0, 0.0)


@dataclass(frozen=True)
class Manifest:
    """One built library: target, versions of the tools, the library's file name and sha256, a row per kernel.

    sources: the fingerprint of the sources that it was built from (`pa_ops.sources`).
    """

    target: str
    toolchain: Mapping[str, str]
    library: str
    library_sha256: str
    entries: tuple[Entry, ...]
    sources: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise InvalidArgument("manifest schema", f"this version reads schema {SCHEMA}; build again", self.schema)
        parse_target(self.target)
        if Path(self.library).name != self.library:
            raise InvalidArgument("manifest library", "must be a file beside the manifest", repr(self.library))
        names = [entry.name for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidArgument("manifest entries", "names must be unique", ", ".join(twice))

    def dumps(self) -> str:
        """The text of manifest.json: rows by name, keys sorted, so equal builds give equal text."""
        rows = [asdict(entry) for entry in sorted(self.entries, key=lambda entry: entry.name)]
        document = {
            "schema": self.schema,
            "target": self.target,
            "toolchain": dict(self.toolchain),
            "library": self.library,
            "library_sha256": self.library_sha256,
            "sources": self.sources,
            "entries": rows,
        }
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @classmethod
    def loads(cls, text: str, *, where: str = "manifest") -> Manifest:
        """The manifest that `text` spells; raises InvalidArgument naming `where` and the key that is wrong."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidArgument(where, "must be JSON", str(error)) from None
        _check_keys(where, document, _MANIFEST_TYPES)
        for key, value in document["toolchain"].items():
            _check_type(f"{where} toolchain.{key}", value, str)
        entries = tuple(_entry(f"{where} entries[{i}]", row) for i, row in enumerate(document["entries"]))
        return cls(**{**document, "entries": entries})

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """The manifest in the file `path`; raises OSError when unreadable, InvalidArgument when not a manifest."""
        return cls.loads(Path(path).read_text(encoding="utf-8"), where=str(path))


_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "tuple[str, ...]": list}
_ENTRY_TYPES = {field.name: _TYPES[str(field.type)] for field in fields(Entry)}
_MANIFEST_TYPES: dict[str, type] = {
    "schema": int,
    "target": str,
    "toolchain": dict,
    "library": str,
    "library_sha256": str,
    "sources": str,
    "entries": list,
}


def _check_type(where: str, value: object, kind: type) -> None:
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InvalidArgument(where, f"must be a JSON {kind.__name__}", repr(value))


def _check_keys(where: str, document: Any, types: Mapping[str, type]) -> None:
    _check_type(where, document, dict)
    if document.keys() != types.keys():
        missing = ", ".join(sorted(types.keys() - document.keys())) or "none"
        unknown = ", ".join(sorted(document.keys() - types.keys())) or "none"
        raise InvalidArgument(
            where, f"must have exactly the keys {', '.join(types)}", f"missing {missing}, unknown {unknown}"
        )
    for key, kind in types.items():
        _check_type(f"{where} {key}", document[key], kind)


def _entry(where: str, row: Any) -> Entry:
    _check_keys(where, row, _ENTRY_TYPES)
    for target in row["code_targets"]:
        _check_type(f"{where} code_targets", target, str)
    return Entry(**{**row, "code_targets": tuple(row["code_targets"])})
