"""Turns the places where products may lie into manifests with their libraries; the only file that knows the places."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pa_ops import sources
from pa_ops.environment import settings
from pa_ops.errors import InvalidArgument
from pa_ops.manifest import FILE_NAME, Manifest

_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Product:
    """One built library and what it holds; not yet compared with its sha256."""

    manifest: Manifest
    library: Path

    @property
    def root(self) -> Path:
        """The home that it lies in."""
        return self.library.parent.parent


@dataclass(frozen=True)
class Unusable:
    """A product that is there and must not be loaded, and why."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.folder} is not used: {self.reason}"


def home() -> Path:
    """The folder that products are written to and read from: PA_OPS_HOME, else a checkout's build/, else a cache."""
    chosen = settings().home
    if chosen is not None:
        return chosen
    if (_CHECKOUT / "generator").is_dir():  # installed packages have no such sibling
        return _CHECKOUT / "build"
    return cache()


def cache() -> Path:
    """The user's own folder, which serves where the home cannot be written."""
    import platformdirs  # needed by no one who has a checkout or names a home

    return Path(platformdirs.user_cache_dir("pa_ops"))


def homes() -> tuple[Path, ...]:
    """Where products are looked for, first come first served: the home, then the cache if that cannot be written."""
    first = home()
    return (first,) if writable(first) else tuple(dict.fromkeys((first, cache())))


def destination(roots: Iterable[Path]) -> Path | None:
    """The first of `roots` that products can be written to."""
    return next(filter(writable, roots), None)


def writable(root: Path) -> bool:
    """Whether products can be written below `root`, which need not exist."""
    place = next((path for path in (root, *root.absolute().parents) if path.exists()), Path("/"))
    return os.access(place, os.W_OK | os.X_OK)


def manifest_in(folder: Path) -> Manifest | Unusable | None:
    """The manifest in `folder`, home/<target>, or why it cannot be read; None where no build has ended."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return Manifest.load(path)
    except (InvalidArgument, OSError, UnicodeDecodeError) as error:
        return Unusable(folder, f"its manifest is damaged or of another version ({error})")


def read(folder: Path) -> Product | Unusable | None:
    """The product in `folder`, home/<target>, or why it must not be loaded; None where no build has ended."""
    manifest = manifest_in(folder)
    if not isinstance(manifest, Manifest):
        return manifest
    if manifest.target != folder.name:
        return Unusable(folder, f"its manifest is {manifest.target}'s")
    if manifest.sources != sources.ours():
        return Unusable(folder, "it was built from other sources than those that are installed")
    return Product(manifest, folder / manifest.library)


def products(targets: Iterable[str], roots: Iterable[Path]) -> Iterator[Product | Unusable]:
    """What lies below `roots` for each of `targets`, in that order."""
    places = list(roots)
    for target in targets:
        for root in places:
            found = read(root / target)
            if found is not None:
                yield found
