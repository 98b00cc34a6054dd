"""Products of the real templates: names, rows and symbols are one, every target compiles, nothing spills."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tvm_ffi

from pa_ops.generator import matrix
from pa_ops.generator.build import Request, build
from pa_ops.generator.cubin import read_facts
from pa_ops.generator.layout import Layout
from pa_ops.generator.link import SYMBOL_PREFIX
from pa_ops.generator.plan import Planner
from pa_ops.generator.toolchain import Toolchain
from pa_ops.manifest import Entry, Manifest
from pa_ops.spec import InstanceSpec, KernelOp

pytestmark = pytest.mark.compile
REGISTERS = 255  # what an instruction can name; more means the parser read something else


def rows(product: Layout) -> tuple[Entry, ...]:
    return Manifest.load(product.manifest).entries


def output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_G2_manifest_rows_template_parameters_and_symbols_are_one_set(product: Layout) -> None:
    names = [entry.name for entry in rows(product)]
    declared = matrix.declared("smoke", ("sm_90a",))
    assert names == [spec.name for spec in declared]
    assert [InstanceSpec.parse(name) for name in names] == list(declared)
    exported = [line.split()[-1] for line in output("nm", "-D", "--defined-only", product.library).splitlines()]
    assert sorted(exported) == sorted(SYMBOL_PREFIX + name for name in names)
    module = tvm_ffi.load_module(str(product.library))
    for entry in rows(product):
        assert callable(module[entry.symbol])


def test_G3_sources_are_named_after_their_instance_and_rendered_alike_every_time(product: Layout) -> None:
    planner = Planner(Toolchain())
    for entry in rows(product):
        item = planner.item(entry.spec, "sm_90a")
        assert product.source(entry.name).read_text() == item.source
        assert f'NAME = "{entry.name}"\n' in item.source
        assert "{{" not in item.source and "# %" not in item.source
        assert entry.digest == item.digest != planner.item(entry.spec, "sm_80").digest
    assert len({entry.digest for entry in rows(product)}) == len(rows(product))


def test_G2_facts_are_those_of_the_image_that_ships(product: Layout) -> None:
    library = {facts.image_bytes for facts in read_facts(product.library.read_bytes())}
    for entry in rows(product):
        (facts,) = read_facts(product.object(entry.name).read_bytes())
        assert entry.code_targets == (facts.target,) == ("sm_90a",)
        assert 16 <= entry.registers == facts.registers <= REGISTERS
        assert entry.smem_bytes == entry.spec.smem_bytes + facts.static_smem_bytes
        assert facts.image_bytes in library


def test_product_needs_tvm_ffi_and_the_c_library_only_and_tells_no_paths(product: Layout) -> None:
    dynamic = output("readelf", "-d", product.library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtvm_ffi.so" in needed
    assert needed <= {
        "libtvm_ffi.so",
        "libc.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
    }
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert str(product.root).encode() not in product.library.read_bytes()


def test_attention_keeps_its_registers(product: Layout) -> None:
    attention = [entry for entry in rows(product) if entry.spec.op is KernelOp.ATTN]
    assert attention
    assert [entry.name for entry in attention if entry.spill_bytes] == []


@pytest.mark.parametrize("target", [*matrix.DECLARED_TARGETS, "sm_100a", "sm_120a"])
def test_G5_attention_compiles_for_every_target_without_a_gpu(target: str, tmp_path: Path) -> None:
    (outcome,) = build(Request(tmp_path, "smoke", (target,), "*flash*_fp16_*_d64*_gather_causal_*"))
    (entry,) = Manifest.load(outcome.manifest).entries
    assert entry.code_targets == (target,)
    assert entry.registers <= REGISTERS
