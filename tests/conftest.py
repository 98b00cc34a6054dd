"""Options and fixtures shared by every tier of tests; what workers of pytest-xdist saw becomes one evidence file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from helpers.machine import this_machine, wait_asleep
from helpers.parity import Evidence
from pa_ops import evidence as files

settings.register_profile("pa_ops", deadline=None)
settings.load_profile("pa_ops")
os.environ.setdefault("PA_OPS_NO_JIT", "1")  # a kernel that a test misses is one that the build forgot
SEEN = pytest.StashKey[dict[files.Key, files.Evidence]]()
SENT = "pa_ops_evidence"  # the name under which a worker sends its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", type=Path, help="write what the GPU tests saw of each instance to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SEEN] = {}
    if hasattr(config, "workerinput"):  # one of several beside each other
        wait_asleep()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended; one that died sent nothing, and a test of its own has failed."""
    sent = getattr(node, "workeroutput", {}).get(SENT)
    if sent is not None:
        seen = node.config.stash[SEEN]
        node.config.stash[SEEN] = files.joined((seen, files.parse(sent, node.gateway.id)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    path = config.getoption("--evidence")
    if hasattr(config, "workeroutput"):
        config.workeroutput[SENT] = files.document(config.stash[SEEN])
    elif path is not None:
        files.write(path, config.stash[SEEN], this_machine() if torch.cuda.is_available() else None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers in every run, whatever ran before it."""
    # Where there is no GPU, torch notes for later who has asked for a seed of it: 1 ms a test.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """Collects errors by instance and target; written at the end where --evidence names a file."""
    return Evidence(request.node.nodeid, request.config.stash[SEEN])
