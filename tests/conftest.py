"""Options and fixtures shared by every tier of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from helpers.parity import Evidence

settings.register_profile("pa_ops", deadline=None)
settings.load_profile("pa_ops")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", type=Path, help="write what the GPU tests saw of each instance to this JSON file")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def evidence(pytestconfig: pytest.Config) -> Iterator[Evidence]:
    """Collects errors by instance; written at the end where --evidence names a file."""
    collected = Evidence()
    yield collected
    path = pytestconfig.getoption("--evidence")
    if path is not None:
        collected.write(path)
