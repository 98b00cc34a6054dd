"""Turns a CUDA device into the kernels that it can load, the one that serves a problem, and its callable."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pa_ops import jit
from pa_ops.capability import Capability
from pa_ops.environment import settings
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.homes import Product, Unusable, homes, products, writable
from pa_ops.manifest import Entry
from pa_ops.overrides import policy
from pa_ops.problem import Problem
from pa_ops.selection import AUTO, Selection, select_entry
from pa_ops.spec import Family

CALLER = "pa_call"
COUNTER = "pa_clusters"
COMPILERS = ("cutlass_dsl", "cuda", "nvrtc")  # what a manifest calls the tools that decide a kernel's bytes


Loaded = tuple[Path, str]  # a library and its sha256
# For the life of the process: kept programs hold addresses in these, whatever is built beside them later.
_libraries: dict[Loaded, Any] = {}


class Damaged(Exception):
    """A library is not there, or is not the one that its manifest was written for; the text says what was found."""

    def __init__(self, library: Path, what: str) -> None:
        self.library = library
        super().__init__(what)


class Registry:
    """The built kernels of one device: the best target first, where several hold a kernel of the same name.

    roots: where products lie; of one target, the first has precedence.
    """

    def __init__(self, capability: Capability, *roots: Path) -> None:
        self.capability = capability
        self.roots = roots
        self._damaged: set[Path] = set()
        self._told: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Reads the manifests, as at first; says once which products are there and are not used."""
        self._owners: dict[str, tuple[Entry, Product]] = {}
        self.unusable: list[Unusable] = []
        for found in products(self.capability.targets, self.roots):
            if isinstance(found, Unusable):
                self.unusable.append(found)
            elif found.library not in self._damaged:
                for entry in found.manifest.entries:
                    self._owners.setdefault(entry.name, (entry, found))
        self.entries: tuple[Entry, ...] = tuple(entry for entry, _ in self._owners.values())
        self._selections: dict[tuple[object, ...], Selection] = {}
        self._found: dict[tuple[object, ...], Selection | None] = {}
        self._kernels: dict[str, int] = {}
        self._clusters: dict[tuple[str, int], int] = {}
        self._loaded: dict[Path, Any] = {}
        for text in map(str, self.unusable):
            if text not in self._told:
                self._told.add(text)
                warnings.warn(f"pa_ops: {text}", RuntimeWarning, stacklevel=2)

    def serve(self, problem: Problem, backend: str = AUTO) -> Selection:
        """What `select` gives, built now where it is missing; raises NoInstance with why that cannot be."""
        try:
            return self.select(problem, backend)
        except NoInstance as refusal:
            notes = (refusal, *self.unusable)
            jit.supply(problem, self.capability, policy(backend), self.roots, notes)
        self.refresh()
        return self.select(problem, backend)

    def select(self, problem: Problem, backend: str = AUTO) -> Selection:
        """The kernel that serves `problem` under the overrides in force; raises NoInstance with every reason."""
        chosen = policy(backend)
        key = (problem.facts, size_class(problem), chosen)
        found = self._selections.get(key)
        if found is None:
            found = self._selections[key] = select_entry(self.entries, problem, self.capability, chosen)
        return found

    def find(self, problem: Problem, backend: str, family: Family) -> Selection | None:
        """The kernel of `family` that serves `problem` under the overrides in force; None where there is none."""
        chosen = policy(backend)
        key = (problem.facts, size_class(problem), chosen, family)
        if key not in self._found:
            entries = [entry for entry in self.entries if entry.spec.family is family]
            try:
                self._found[key] = select_entry(entries, problem, self.capability, chosen)
            except NoInstance:
                self._found[key] = None
        return self._found[key]

    def kernel(self, entry: Entry) -> int:
        """The address of the kernel of `entry` in its library, whose sha256 must be the manifest's.

        A library that is damaged is built again, with a warning; raises InvalidArgument where that cannot be.
        """
        found = self._kernels.get(entry.name)
        if found is None:
            found = self._kernels[entry.name] = self._whole_library(entry)[entry.symbol]()
        return found

    def sibling(self, entry: Entry, cluster: int) -> Entry | None:
        """The same kernel for clusters of so many blocks; None where it is not built."""
        spec = entry.spec
        name = replace(spec, tile=replace(spec.tile, cluster=cluster)).name
        return self._owners[name][0] if name in self._owners else None

    def clusters(self, entry: Entry, device: int) -> int:
        """How many clusters of the kernel of `entry` the CUDA device holds at a time, as its driver tells: parts of one
        name differ in which SMs can be in one cluster."""
        key = entry.name, device
        if key not in self._clusters:
            self._clusters[key] = self._whole_library(entry)[COUNTER](self.kernel(entry), device)
        return self._clusters[key]

    def _whole_library(self, entry: Entry) -> Any:
        for attempt in self._fetch, self._refetch:
            try:
                return attempt(entry)
            except Damaged as error:
                damage = error
        jit.renew(damage.library, str(damage), entry, self.roots)
        warnings.warn(f"pa_ops: {damage.library}: {damage}; it was built again", RuntimeWarning, stacklevel=2)
        if not writable(damage.library.parent):
            self._damaged.add(damage.library)  # what replaces it lies elsewhere
        return self._refetch(entry)

    def _refetch(self, entry: Entry) -> Any:
        """The library of `entry` by the manifest of now: another process may have published since."""
        self.refresh()
        return self._fetch(entry)

    def _fetch(self, entry: Entry) -> Any:
        if entry.name not in self._owners:
            raise Damaged(self.roots[0] / entry.target, f"has no {entry.name} any more")
        _, product = self._owners[entry.name]
        if product.library not in self._loaded:
            self._loaded[product.library] = _load(product)
        return self._loaded[product.library]

    def tools(self, entry: Entry) -> dict[str, str]:
        """The versions of the compilers that made `entry`, by name."""
        _, product = self._owners[entry.name]
        return {tool: product.manifest.toolchain[tool] for tool in COMPILERS if tool in product.manifest.toolchain}

    def caller(self) -> Callable[..., int]:
        """The function that runs a program on kernels of any library; one must be loaded."""
        library = next(iter(self._loaded.values()))
        call: Callable[..., int] = library[CALLER]
        return call

    def library(self) -> Path | None:
        """A library that is loaded, None where there is none."""
        return next(iter(self._loaded), None)


def size_class(problem: Problem) -> tuple[int, int, int, int]:
    """Sizes to the power of two: what may rank kernels, and few enough values to cache by."""
    max_q = -1 if problem.max_q is None else problem.max_q.bit_length()
    max_k = -1 if problem.max_k is None else problem.max_k.bit_length()
    return problem.batch.bit_length(), problem.tokens.bit_length(), max_q, max_k


def _load(product: Product) -> Any:
    """The library of a product; raises Damaged unless it is the very one of the manifest."""
    key = product.library, product.manifest.library_sha256
    if key not in _libraries:
        try:
            digest = hashlib.sha256(product.library.read_bytes()).hexdigest()
        except OSError as error:
            raise Damaged(product.library, str(error)) from None
        if digest != product.manifest.library_sha256:
            raise Damaged(product.library, f"sha256 {digest}")
        import tvm_ffi  # at the first CUDA call, not at import

        _libraries[key] = tvm_ffi.load_module(str(product.library))
    return _libraries[key]


@lru_cache(maxsize=64)
def capability_of(index: int) -> Capability:
    """What the CUDA device `index` can do, as its driver tells."""
    import torch  # here and below, because what needs no device needs no torch, which takes seconds to import

    properties = torch.cuda.get_device_properties(index)
    return Capability(
        sm=10 * properties.major + properties.minor,
        smem_optin_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        num_sms=properties.multi_processor_count,
        card=properties.name,
    )


def for_device(index: int) -> Registry:
    """The kernels of the CUDA device `index`; read once for each product home."""
    return for_capability(capability_of(index))


def for_capability(capability: Capability) -> Registry:
    """The kernels that a device of `capability` would load; needs no GPU until a kernel is asked for."""
    return _registry(capability, homes())


@lru_cache(maxsize=64)
def _registry(capability: Capability, roots: tuple[Path, ...]) -> Registry:
    return Registry(capability, *roots)


def current_capability() -> Capability:
    """The device to answer for when none is named: PA_OPS_SM, else the current CUDA device; raises InvalidArgument."""
    sm = settings().sm
    if sm is not None:
        return Capability.of_sm(sm)
    import torch

    if torch.cuda.is_available():
        return capability_of(torch.cuda.current_device())
    rule = "no GPU is here, so name one: a pa_ops.Capability, an SM number, or PA_OPS_SM"
    raise InvalidArgument("device", rule, None)
