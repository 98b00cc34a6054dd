"""The mea families compile for every SM from 5.3 on without a spill, by the instructions that each SM has."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pa_ops.capability import Capability, parse_target
from pa_ops.generator import nvrtc
from pa_ops.generator.build import Request, build
from pa_ops.generator.layout import Layout
from pa_ops.generator.toolchain import Toolchain
from pa_ops.manifest import Manifest
from pa_ops.sources import template_folder
from pa_ops.spec import Family, InstanceSpec

pytestmark = pytest.mark.compile

NATIVE = ("sm_53", "sm_60", "sm_61", "sm_62", "sm_70", "sm_72", "sm_75", "sm_80", "sm_90a")
INSTRUCTIONS = {  # of each path: what its PTX must hold, and what it must not
    "compute_53": ((), ("mma.sync", "ldmatrix")),
    "compute_70": (("mma.sync.aligned.m8n8k4.row.col", "mma.sync.aligned.m8n8k4.row.row"), ("ldmatrix", "m16n8")),
    "compute_75": (("mma.sync.aligned.m16n8k8.row.col", "ldmatrix"), ("m8n8k4", "m16n8k16")),
}
LATER = ("cp.async", "bf16")


@pytest.fixture(scope="module")
def layouts(kept: Callable[[str], Path]) -> dict[str, Layout]:
    """The smallest instances of the family for each target, two builds at a time."""
    home = kept("mea")

    def built(target: str) -> Layout:
        build(Request(home, "smoke", (target,), "*_mea_*fp16_*", 1))
        return Layout(home / target)

    targets = (*NATIVE, *INSTRUCTIONS)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(built, targets), strict=True))


@pytest.mark.parametrize("target", NATIVE)
def test_B1_G5_native_code_of_every_sm_has_no_spill(target: str, layouts: dict[str, Layout]) -> None:
    entries = Manifest.load(layouts[target].manifest).entries
    assert {entry.spec.family for entry in entries} == {Family.MEA, Family.MEA_DECODE} and len(entries) == 3
    for entry in entries:
        assert entry.code_targets == (target,)
        assert 0 < entry.registers <= 255 and entry.spill_bytes == 0
        assert entry.smem_bytes <= Capability.of_sm(parse_target(target)).smem_optin_bytes


@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_B1_ptx_holds_the_instructions_of_its_path(target: str, layouts: dict[str, Layout]) -> None:
    layout = layouts[target]
    wanted, unwanted = INSTRUCTIONS[target]
    for entry in Manifest.load(layout.manifest).entries:
        assert entry.code_targets == (target,)
        assert (entry.registers, entry.spill_bytes) == (0, 0), "the driver's compiler decides them"
        text = layout.object(entry.name).read_bytes().rstrip(b"\0").decode()
        assert f".target sm_{parse_target(target)}" in text
        assert all(word in text for word in wanted)
        assert not any(word in text for word in (*unwanted, *LATER))


def test_B2_bf16_and_older_sms_trap(tmp_path: Path) -> None:
    build(Request(tmp_path, "smoke", ("sm_80",), "*_mea_*bf16_*_gather_*", 1))
    sources = list(Layout(tmp_path / "sm_80").sources.glob("*.cu"))
    assert len(sources) == 2
    for source in sources:
        text = nvrtc.compile_image(Toolchain().nvrtc, source, "compute_75", template_folder() / "device").decode()
        assert "trap;" in text and "mma.sync" not in text


def test_every_cuda_kernel_waits_for_the_grid_before_its_own(kept: Callable[[str], Path]) -> None:
    """On SM 9.0 a launch lets blocks start while the grid before them still writes what they read (chaining.py)."""
    home = kept("waits")
    build(Request(home, "smoke", ("sm_90a",), ",".join(f"*_{word}_fp16_*" for word in ("append", "gather", "mea*")), 1))
    sources = sorted(Layout(home / "sm_90a").sources.glob("*.cu"))
    families = {InstanceSpec.parse(source.stem).family for source in sources}
    assert families == {Family.APPEND, Family.GATHER, Family.MEA, Family.MEA_DECODE}
    for source in sources:
        text = nvrtc.compile_image(Toolchain().nvrtc, source, "compute_90", template_folder() / "device").decode()
        assert text.index("griddepcontrol.wait") < text.index("ld.global"), source.name
