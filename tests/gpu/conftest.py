"""What every GPU test needs: a device. Without one these tests fail; they are left out by `-m`, never skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.mea import PTX
from pa_ops.capability import Feature
from pa_ops.homes import home
from pa_ops.manifest import FILE_NAME
from pa_ops.registry import current_capability

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The current CUDA device."""
    assert torch.cuda.is_available(), "the gpu tests need an NVIDIA GPU and a torch that sees it"
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=DTYPES, ids=("fp16", "bf16"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both dtypes of a query."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def hopper() -> None:
    """Elsewhere there is nothing to test: no build makes these kernels."""
    if Feature.WGMMA not in current_capability().features:
        pytest.skip("wgmma is an instruction of SM 9.0 alone")


@pytest.fixture(params=("native", *PTX))
def code(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which code runs: what is best here, or the PTX of an older SM alone, in a home that holds nothing else."""
    target: str = request.param
    if target != "native":
        built = home() / target
        assert (built / FILE_NAME).is_file(), f"not built: pa-ops build --arch {target}"
        (tmp_path / target).symlink_to(built)
        monkeypatch.setenv("PA_OPS_HOME", str(tmp_path))
    return target
