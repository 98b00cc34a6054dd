"""What every unit test has: a home in which nothing is built, whatever this checkout's build folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.launches import SM90, Launches, write_product
from pa_ops import calls, registry, scratch, steps


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product home without products: questions about devices that are not here are answered by declared kernels."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def nothing_built(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ask for another home, or for none, say so themselves."""
    monkeypatch.setenv("PA_OPS_HOME", str(empty_home))


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """CUDA calls on CPU tensors, of a device of SM 9.0 with every kernel: what they would launch."""
    made = Launches()
    write_product(tmp_path)
    monkeypatch.setenv("PA_OPS_HOME", str(tmp_path))
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: made)
    monkeypatch.setattr(registry, "capability_of", lambda index: SM90)
    mask = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(steps, "mask_of", lambda device: mask)
    monkeypatch.setattr(scratch, "workspace_for", lambda out: made.workspace)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls._plans.clear()
    return made
