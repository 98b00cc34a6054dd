"""What every unit test has: a home in which nothing is built, whatever this checkout's build folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product home without products: questions about devices that are not here are answered by declared kernels."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def nothing_built(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ask for another home, or for none, say so themselves."""
    monkeypatch.setenv("PA_OPS_HOME", str(empty_home))
