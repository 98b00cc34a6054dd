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


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of the toy templates, with the real modules that compile them, that a test may edit."""
    folder = Path(shutil.copytree(TOY, tmp_path / "templates"))
    for name in ("compiling.py", "chaining.py"):
        shutil.copy(template_folder() / "device" / name, folder / "device")
    return folder


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
