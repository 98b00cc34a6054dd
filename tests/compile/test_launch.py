"""The C functions that match programs and launch kernels, on a driver that prints what it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pa_ops.arguments import RECORDS
from pa_ops.generator.layout import Layout
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import Family
from pa_ops.templates.device.chaining import is_chained

pytestmark = pytest.mark.compile
HERE = Path(__file__).parent
SCRIPT = HERE / "launch_script.py"


def entry_of(product: Layout, family: Family) -> Entry:
    """One of the family's kernels; of flash_sm90, whose blocks may come in clusters, one for two of them."""
    blocks = 2 if family is Family.FLASH_SM90 else 1
    entries = Manifest.load(product.manifest).entries
    return next(e for e in entries if e.spec.family is family and e.spec.tile.cluster == blocks)


SCENES = (
    (Family.MERGE, "twin"),
    (Family.FLASH_SM90, "twin"),
    (Family.FLASH_SM80, "devices"),
    (Family.MERGE, "driver errors"),
    (Family.FLASH_SM90, "driver errors"),
    (Family.FLASH_SM90, "clusters"),
    (Family.MERGE, "wrong calls"),
)
Told = dict[tuple[Family, str], list[str]]


def play(product: Layout, driver: Path | None, scenes: Sequence[tuple[Family, str]]) -> Told:
    """What scenes of launch_script.py, and the driver, print, each in a process that has loaded nothing before."""
    paths = os.pathsep.join(map(str, (HERE.parent, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver or ""), "PYTHONPATH": paths}
    asked = {f"{entry_of(product, family).name}:{scene}": (family, scene) for family, scene in scenes}
    command = [sys.executable, str(SCRIPT), str(product.library), *asked]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ends = [json.loads(line) for line in run.stdout.splitlines()]
    assert [status for _, status, _ in ends] == [0] * len(scenes), (ends, run.stderr)
    return {asked[each]: text.splitlines() for each, _, text in ends}


@pytest.fixture(scope="module")
def told(product: Layout, driver: Path) -> Told:
    return play(product, driver, SCENES)


CHAINED = "attribute 6 = 1 0 0"  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CLUSTER = "attribute 4 = 2 1 1"  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


def numbers(line: str) -> list[int]:
    """The record's words in a line of the driver's, or of the script's."""
    return [int(word) for word in line.split(":")[1].split(",")[0].split()]


def attributes(line: str) -> list[str]:
    """What a launch is told beside its record."""
    return line.split(":")[1].split(", ")[1:]


@pytest.mark.parametrize("family", [Family.MERGE, Family.FLASH_SM90])
def test_programs_launch_what_their_python_twin_says(family: Family, product: Layout, told: Told) -> None:
    """With the tensor maps that C has encoded, which the stand-in driver leaves legible."""
    lines = told[family, "twin"]
    entry, size = entry_of(product, family), RECORDS[family].size
    asked = [line for line in lines if line.startswith("launch")]
    wanted = [line for line in lines if line.startswith("want")]
    assert len(asked) == len(wanted) > 50
    for got, want in zip(asked, wanted, strict=True):
        extent, words = json.loads(want.removeprefix("want "))
        blocks = f"{extent[0]} {extent[1]} 1 x {entry.spec.threads}, {entry.spec.smem_bytes} B shared"
        assert got.startswith(f"launch {blocks}, stream 0, {size} B:")
        assert numbers(got) == words
        assert attributes(got) == [CHAINED] * is_chained(product.root.name) + [CLUSTER] * (entry.spec.tile.cluster > 1)
    assert lines.count("load ELF") == 1, "an image is loaded once"
    refused = [line for line in lines if line.startswith("refused")]
    assert refused == ["refused 0"] * len(refused) and len(refused) > 30
    assert "empty 2" in lines


def test_shared_memory_is_allowed_once_a_device(product: Layout, told: Told) -> None:
    lines = told[Family.FLASH_SM80, "devices"]
    entry = entry_of(product, Family.FLASH_SM80)
    allowed = [f"attribute 8 = {entry.spec.smem_bytes} on 0", "attribute 9 = 100 on 0"]
    assert [line for line in lines if line.startswith("attribute")] == allowed
    assert sum(line.startswith("launch") for line in lines) == 2 and "context 1" in lines


@pytest.mark.parametrize(("family", "first"), [(Family.MERGE, ()), (Family.FLASH_SM90, ("cuTensorMapEncodeTiled",))])
def test_G6_a_driver_error_is_raised_with_its_name(family: Family, first: tuple[str, ...], told: Told) -> None:
    lines = told[family, "driver errors"]
    errors = [line for line in lines if line.startswith("RuntimeError")]
    calls = (*first, "cuLibraryLoadData", "cuLibraryGetKernel", "cuLaunchKernelEx")
    assert len(errors) == len(calls), errors
    assert sum(line.startswith("launch") for line in lines) == 1, "the one that fails"
    for line, call in zip(errors, calls, strict=True):
        assert line.startswith(f"RuntimeError {call} of ") and "700, CUDA_ERROR_FAKE" in line


def test_a_device_tells_how_many_clusters_it_holds(product: Layout, told: Told) -> None:
    """The context that was current is again, and an error of the driver's has its name."""
    lines, spec = told[Family.FLASH_SM90, "clusters"], entry_of(product, Family.FLASH_SM90).spec
    asked = f"clusters of 2 x {spec.threads}, {spec.smem_bytes} B shared, {CHAINED}, {CLUSTER}"
    assert [line for line in lines if line.startswith("clusters")] == [asked] * 4
    assert [line for line in lines if line.startswith("held")] == ["held 30"] * 3
    assert lines[-1].startswith("RuntimeError cuOccupancyMaxActiveClusters of ")
    contexts = [line for line in lines if line.startswith("context")]
    assert contexts == ["context 1", "context 2", "context 1"], "of the first, of the other, of the first again"


def test_wrong_calls_say_what_is_wrong(told: Told) -> None:
    errors = [line for line in told[Family.MERGE, "wrong calls"] if "Error" in line.split()[0]]
    words = (
        *["TypeError pa_clusters: takes a kernel's address and a device"] * 2,
        "the device must be in [0, 64)",
        "TypeError pa_call: takes a program's address",
        "TypeError pa_call: the program is for another number of tensors",
        "the program's record is not the kernel's",
    )
    assert len(errors) == len(words) and all(word in line for word, line in zip(words, errors, strict=True)), errors


def test_without_a_driver_the_error_says_so(product: Layout) -> None:
    (lines,) = play(product, None, [(Family.MERGE, "once")]).values()
    assert lines and lines[-1].startswith("RuntimeError no NVIDIA driver: libcuda.so.1"), lines


def test_every_family_of_the_product_has_a_record(product: Layout) -> None:
    assert {entry.spec.family for entry in Manifest.load(product.manifest).entries} == set(RECORDS)
