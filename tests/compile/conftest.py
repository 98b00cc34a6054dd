"""Fixtures of the compile tier: toy templates to edit, products of the real ones to look into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pa_ops.generator.build import Request, build
from pa_ops.generator.layout import Layout

TOY = Path(__file__).parent / "toy"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A copy of the toy templates that a test may edit."""
    return Path(shutil.copytree(TOY, tmp_path / "templates"))


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The smoke preset of the real templates, built for sm_90a."""
    home = tmp_path_factory.mktemp("products")
    build(Request(home, "smoke", ("sm_90a",)))
    return Layout(home / "sm_90a")
