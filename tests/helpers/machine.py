"""Turns the machine that the tests run on into what the report says of it."""

from __future__ import annotations

import ctypes
import platform
import subprocess

import torch

from pa_ops.evidence import Machine

BLOCKING_SYNC = 4  # CU_CTX_SCHED_BLOCKING_SYNC
QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def this_machine() -> Machine:
    """The current card, its driver and the software of this process; a driver that nobody tells is its CUDA's."""
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        told = f"of CUDA {torch._C._cuda_getDriverVersion()}"
    return Machine(torch.cuda.get_device_name(), told, torch.__version__, platform.python_version())


def wait_asleep() -> None:
    """Have this process sleep while it waits for its first GPU, not spin; before anything else uses that.

    Eight workers and two sanitizers that spin kept 11 of 16 cores busy with waiting, and each other from their work.
    Where there is no driver nothing happens.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxSetFlags_v2(0, BLOCKING_SYNC)
