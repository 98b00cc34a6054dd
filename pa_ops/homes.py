"""Turns the places where products may lie into manifests with their libraries; the only file that knows the places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pa_ops.environment import settings
from pa_ops.manifest import FILE_NAME, Manifest

_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Product:
    """One built library and what it holds."""

    manifest: Manifest
    library: Path


def home() -> Path:
    """The folder that products are written to and read from: PA_OPS_HOME, else a checkout's build/, else a cache."""
    chosen = settings().home
    if chosen is not None:
        return chosen
    if (_CHECKOUT / "generator").is_dir():  # installed packages have no such sibling
        return _CHECKOUT / "build"
    import platformdirs  # needed by no one who has a checkout or names a home

    return Path(platformdirs.user_cache_dir("pa_ops"))


def products(targets: Iterable[str], *, root: Path | None = None) -> Iterator[Product]:
    """The product of each of `targets` that has been built below `root` (home() unless given), in that order."""
    root = home() if root is None else root
    for target in targets:
        manifest = root / target / FILE_NAME
        if manifest.is_file():
            loaded = Manifest.load(manifest)
            yield Product(loaded, manifest.parent / loaded.library)
