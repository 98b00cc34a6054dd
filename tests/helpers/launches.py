"""A product on disk and a library that launches nothing: what a CUDA call asks of kernels, on CPU tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import programs
from pa_ops import Capability, registry
from pa_ops.arguments import record_of
from pa_ops.checks import INT32_MAX
from pa_ops.jit import declared_entries
from pa_ops.manifest import FILE_NAME, Manifest
from pa_ops.scratch import workspace_words
from pa_ops.sources import ours
from pa_ops.spec import Family, InstanceSpec

SM90 = Capability.of_sm(90)
EIGHTS = 15  # clusters of eight blocks that an H200 holds at a time
LIBRARY = b"a library"


@cache
def _product(target: str) -> tuple[Manifest, str]:
    """A manifest of every declared kernel of SM 9.0, as if built for `target`, and its text (30 ms)."""
    entries = tuple(replace(e, digest="0" * 64) for e in declared_entries(SM90) if e.target == "sm_90a")
    entries = tuple(replace(e, target=target, code_targets=(target,)) for e in entries)
    manifest = Manifest(target, {"dsl": "4"}, "libpa_ops.so", hashlib.sha256(LIBRARY).hexdigest(), entries, ours())
    return manifest, manifest.dumps()


def write_product(home: Path, target: str = "sm_90a", *, library: bytes = LIBRARY) -> Manifest:
    """A product of every declared kernel, built as far as anyone who does not launch can tell."""
    manifest, text = _product(target)
    folder = home / target
    folder.mkdir(parents=True)
    (folder / "libpa_ops.so").write_bytes(library)
    (folder / FILE_NAME).write_text(text)
    return manifest


@dataclass(frozen=True)
class Made:
    """One kernel launch: the symbol, the fields and the tensor maps of its record, the grid."""

    symbol: str
    fields: dict[str, Any]
    maps: dict[str, programs.Map]
    x: int
    y: int

    @property
    def family(self) -> Family:
        """The family of the kernel."""
        return InstanceSpec.parse(self.symbol).family

    @property
    def queries(self) -> tuple[int, int]:
        """Where an attention launch finds its queries: the address, the bytes from token to token."""
        if "q_map" in self.maps:
            return self.maps["q_map"].address, self.maps["q_map"].strides[1]
        return self.fields["q"], self.fields["q_token_stride"]

    def serves(self, new: int) -> bool:
        """Whether an attention launch takes a sequence of `new` tokens, as its kernel decides."""
        return self.fields.get("skip_up_to", 0) < new <= self.fields.get("skip_above", INT32_MAX)


class Launches(list[Made]):
    """A library whose kernels are known by a number, and which notes what a program asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols: list[str] = []
        self.workspace = torch.empty(workspace_words(SM90.num_sms), dtype=torch.int32)

    @property
    def families(self) -> list[str]:
        """Those of the launches, in order."""
        return [str(made.family) for made in self]

    def __getitem__(self, symbol: Any) -> Any:
        if not isinstance(symbol, str):
            return super().__getitem__(symbol)
        if symbol == registry.COUNTER:
            return lambda _, device: EIGHTS
        return self.call if symbol == registry.CALLER else lambda: self.handle(symbol)

    def handle(self, symbol: str) -> int:
        self.symbols.append(symbol)
        return len(self.symbols) - 1

    def call(self, address: int, *tensors: Tensor | None) -> int:
        launched = programs.run(address, *tensors)
        if isinstance(launched, int):
            return launched
        for made in launched:
            symbol = self.symbols[made.kernel]
            record = record_of(InstanceSpec.parse(symbol))
            maps = programs.maps_of(record, made.record)
            self.append(Made(symbol, record.unpack(made.record), maps, made.x, made.y))
        return 1
