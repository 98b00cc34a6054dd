"""Turns the machine that the tests run on into what the report says of it."""

from __future__ import annotations

import platform
import subprocess

import torch

from pa_ops.evidence import Machine

QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def this_machine() -> Machine:
    """The current card, its driver and the software of this process; a driver that nobody tells is its CUDA's."""
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        told = f"of CUDA {torch._C._cuda_getDriverVersion()}"
    return Machine(torch.cuda.get_device_name(), told, torch.__version__, platform.python_version())
