"""The C function that launches kernels, on a driver that prints what it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pa_ops.arguments import MERGE, RECORDS
from pa_ops.generator.layout import Layout
from pa_ops.manifest import Manifest
from pa_ops.spec import Family

pytestmark = pytest.mark.compile
DRIVER = Path(__file__).with_name("fake_driver.c")
CALL = """
import sys, tvm_ffi
kernel = tvm_ffi.load_module(sys.argv[1])[sys.argv[2]]
for arguments in eval(sys.argv[3]):
    try:
        kernel(*arguments)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    command = ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", DRIVER, "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    return folder


def name_of(product: Layout, family: Family) -> str:
    return next(e.name for e in Manifest.load(product.manifest).entries if e.spec.family is family)


def said(product: Layout, driver: Path | None, name: str, calls: list[tuple[object, ...]], **more: str) -> list[str]:
    """What the driver printed, and errors, for `calls` of one kernel in a fresh process."""
    environment = {**os.environ, **more, "LD_LIBRARY_PATH": str(driver or "")}
    run = subprocess.run(
        [sys.executable, "-u", "-c", CALL, product.library, name, repr(calls)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_launch_tells_the_driver_grid_block_memory_stream_and_arguments(product: Layout, driver: Path) -> None:
    name = name_of(product, Family.MERGE)
    tail = MERGE.tail({key: 40 + i for i, (key, _) in enumerate(MERGE.fields) if key not in MERGE.addresses})
    data = MERGE.head.pack(1, 2, 3, 4, 5, 6) + tail
    lines = said(product, driver, name, [(data, 7, 3, 0, 99)] * 2 + [(data, 8, 1, 1, 0), (data, 0, 3, 0, 0)])
    words = " 1 2 3 4 5 6 46 47 48 49 50 51 52 53 54 55 57"
    launch = f"launch 7 3 1 x 128, 0 B shared, stream 99, {MERGE.size} B:{words}"
    assert lines.count(launch) == 2 and lines.count("load ELF") == 1, lines
    assert sum(line.startswith("launch") for line in lines) == 3, "a grid without blocks launches nothing"
    assert [line for line in lines if line.startswith("context")][:2] == ["context 1", "context 2"]


def test_shared_memory_is_allowed_once_a_device(product: Layout, driver: Path) -> None:
    name = name_of(product, Family.FLASH_SM80)
    entry = next(e for e in Manifest.load(product.manifest).entries if e.name == name)
    data = bytes(RECORDS[Family.FLASH_SM80].size)
    lines = said(product, driver, name, [(data, 1, 1, device, 0) for device in (0, 0, 1)])
    allowed = [f"attribute {attribute} = {value} on {device}" for device in (0, 1)
               for attribute, value in ((8, entry.spec.smem_bytes), (9, 100))]  # fmt: skip
    assert [line for line in lines if line.startswith("attribute")] == allowed


@pytest.mark.parametrize("call", ["cuLibraryLoadData", "cuLibraryGetKernel", "cuLaunchKernel"])
def test_G6_a_driver_error_is_raised_with_its_name(product: Layout, driver: Path, call: str) -> None:
    data = bytes(MERGE.size)
    lines = said(product, driver, name_of(product, Family.MERGE), [(data, 1, 1, 0, 0)], FAKE_CUDA_ERROR=call)
    assert any(line.startswith(f"RuntimeError {call}") and "CUDA error 700, CUDA_ERROR_FAKE" in line for line in lines)


def test_wrong_calls_say_what_is_wrong(product: Layout, driver: Path) -> None:
    name = name_of(product, Family.MERGE)
    data = bytes(MERGE.size)
    calls = [(data,), ("text", 1, 1, 0, 0), (data, 1.5, 1, 0, 0), (data[:-4], 1, 1, 0, 0), (data, 1, 1, 64, 0)]
    lines = said(product, driver, name, calls)
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["TypeError"] * 3 + ["ValueError"] * 2, lines
    assert "argument bytes" in lines[3] and "device" in lines[4]


def test_without_a_driver_the_error_says_so(product: Layout) -> None:
    lines = said(product, None, name_of(product, Family.MERGE), [(bytes(MERGE.size), 1, 1, 0, 0)])
    assert lines and lines[0].startswith("RuntimeError no NVIDIA driver: libcuda.so.1"), lines


def test_every_family_of_the_product_has_a_record(product: Layout) -> None:
    assert {entry.spec.family for entry in Manifest.load(product.manifest).entries} == set(RECORDS)
