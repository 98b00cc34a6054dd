"""What every GPU test needs: a device. Without one these tests fail; they are left out by `-m`, never skipped."""

from __future__ import annotations

import pytest
import torch

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
