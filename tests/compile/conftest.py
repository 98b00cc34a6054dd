"""Fixtures of the compile tier: toy templates to edit, products of the real ones to look into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import stand_in
from pa_ops import sources
from pa_ops.generator.build import Request, build
from pa_ops.generator.layout import Layout
from pa_ops.sources import template_folder

TOY = Path(__file__).parent / "toy"


def toy_templates(parent: Path) -> Path:
    """A copy of the toy templates, with the real modules that compile them."""
    folder = Path(shutil.copytree(TOY, parent / "templates"))
    for name in ("compiling.py", "chaining.py"):
        shutil.copy(template_folder() / "device" / name, folder / "device")
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Toy templates that a test may edit."""
    return toy_templates(tmp_path)


@pytest.fixture(scope="session")
def toy_product(kept: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the two kernels of the toy templates that no worker needs the DSL for, built for sm_80."""
    home, templates = kept("toy"), toy_templates(tmp_path_factory.mktemp("toy"))
    build(Request(home, "smoke", ("sm_80",), "*append*", 1, templates))
    return home


@pytest.fixture
def built(toy_product: Path, tmp_path: Path) -> Path:
    """A home that holds a copy of it, which a test may edit, damage and build again."""
    return Path(shutil.copytree(toy_product, tmp_path / "built"))


@pytest.fixture
def installed_toy(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy templates stand for the installed ones, and building on first use is allowed."""
    monkeypatch.setattr(sources, "template_folder", lambda: toy)
    monkeypatch.setattr(sources, "ours", lambda: sources.fingerprint(toy))
    monkeypatch.delenv("PA_OPS_NO_JIT", raising=False)
    return toy


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """Homes that outlive the run: what has its digest is not compiled again, here as in every build."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir


@pytest.fixture(scope="session")
def product(kept: Callable[[str], Path]) -> Layout:
    """The smoke preset of the real templates, built for sm_90a."""
    home = kept("product")
    build(Request(home, "smoke", ("sm_90a",)))
    return Layout(home / "sm_90a")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in libcuda.so.1."""
    return stand_in.compiled(tmp_path_factory.mktemp("driver"))
