"""Products of the real templates: names, rows and symbols are one, every target compiles, nothing spills."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tvm_ffi

from pa_ops.arguments import record_of
from pa_ops.capability import parse_target
from pa_ops.errors import BuildError
from pa_ops.gates import attention_families
from pa_ops.generator import matrix
from pa_ops.generator.build import Request, build
from pa_ops.generator.cubin import is_code_for, read_facts
from pa_ops.generator.language import OLDEST_CUTE_SM, Language, language_of
from pa_ops.generator.layout import Layout
from pa_ops.generator.link import EXPORTS, SYMBOL_PREFIX
from pa_ops.generator.plan import Planner
from pa_ops.generator.toolchain import Toolchain
from pa_ops.manifest import Entry, Manifest
from pa_ops.registry import CALLER, COUNTER
from pa_ops.sources import template_folder
from pa_ops.spec import Family, InstanceSpec, KernelOp

pytestmark = pytest.mark.compile
REGISTERS = 255  # what an instruction can name; more means the parser read something else
BLOCK_REGISTERS = 32768  # of one block on SM 5.3 and 6.2, which have the fewest
Everywhere = dict[tuple[KernelOp, str], tuple[Entry, ...]]  # rows by operator and target
BINDS = {Language.CUTE: 'NAME = "{name}"\n', Language.CUDA: " {name}(const Arguments args)\n"}


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
    assert sorted(exported) == sorted([*EXPORTS, *(SYMBOL_PREFIX + name for name in (*names, CALLER, COUNTER))])
    module = tvm_ffi.load_module(str(product.library))
    for entry in rows(product):
        assert callable(module[entry.symbol])


def test_G3_sources_are_named_after_their_instance_and_rendered_alike_every_time(product: Layout) -> None:
    planner = Planner(Toolchain())
    for entry in rows(product):
        item = planner.item(entry.spec, "sm_90a")
        assert product.source(entry.spec).read_text() == item.source
        assert BINDS[language_of(entry.spec)].format(name=entry.name) in item.source
        assert "{{" not in item.source and language_of(entry.spec).statement not in item.source
        assert entry.digest == item.digest != planner.item(entry.spec, "sm_80").digest
    assert len({entry.digest for entry in rows(product)}) == len(rows(product))


def test_G2_facts_are_those_of_the_image_that_ships(product: Layout) -> None:
    library = product.library.read_bytes()
    for entry in rows(product):
        cubin = product.object(entry.name).read_bytes()
        (facts,) = read_facts(cubin)
        assert entry.code_targets == ("sm_90a",) and is_code_for(facts.target, "sm_90a")
        assert 16 <= entry.registers == facts.registers <= REGISTERS
        assert entry.smem_bytes == entry.spec.smem_bytes + facts.static_smem_bytes
        assert facts.argument_bytes == record_of(entry.spec).size
        assert facts.image_bytes == len(cubin) and library.count(cubin) == 1
    assert len(read_facts(library)) == len(rows(product))


def test_product_needs_tvm_ffi_and_the_c_library_only_and_tells_no_paths(product: Layout) -> None:
    dynamic = output("readelf", "-d", product.library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtvm_ffi.so" in needed
    assert needed <= {
        "libtvm_ffi.so",
        "libc.so.6",
        "libdl.so.2",
        "libgcc_s.so.1",  # which libtvm_ffi.so needs too
        "libpthread.so.0",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
    }
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert str(product.root).encode() not in product.library.read_bytes()


def test_no_kernel_spills(product: Layout) -> None:
    assert [(entry.name, entry.spill_bytes) for entry in rows(product) if entry.spill_bytes] == []


PATTERNS = {
    KernelOp.ATTN: "*_fp16_*_d64*_gather_causal_*",
    KernelOp.APPEND_KV: "*append*",
    KernelOp.GATHER_KV: "*gather_kv*",
}
CUTE_TARGETS = [target for target in matrix.DECLARED_TARGETS if parse_target(target) >= OLDEST_CUTE_SM]
HELPERS = {KernelOp.APPEND_KV: Family.APPEND, KernelOp.GATHER_KV: Family.GATHER}
TARGETS = {
    KernelOp.ATTN: (*CUTE_TARGETS, "sm_100a", "sm_120a"),
    **dict.fromkeys(HELPERS, matrix.DECLARED_TARGETS),
}


@pytest.fixture(scope="module")
def everywhere(kept: Callable[[str], Path]) -> Everywhere:
    """Attention, append and gather for their targets; two builds at a time, because most of one is a single process."""
    home = kept("everywhere")

    def entries(key: tuple[KernelOp, str]) -> tuple[Entry, ...]:
        op, target = key
        (outcome,) = build(Request(home / op, "smoke", (target,), PATTERNS[op]))
        return Manifest.load(outcome.manifest).entries

    keys = [(op, target) for op, targets in TARGETS.items() for target in targets]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(entries, keys), strict=True))


@pytest.mark.parametrize("target", TARGETS[KernelOp.ATTN])
def test_G5_attention_compiles_for_every_target_and_never_spills(target: str, everywhere: Everywhere) -> None:
    entries = everywhere[KernelOp.ATTN, target]
    hopper = target == "sm_90a"
    wanted = [family for family in attention_families() if hopper or family is not Family.FLASH_SM90]
    wanted += [Family.FLASH_SM90] * hopper  # and its blocks by twos
    assert sorted(entry.spec.family for entry in entries) == sorted(wanted)
    for entry in entries:
        assert entry.code_targets == (target,)
        assert entry.registers <= REGISTERS
        assert entry.spill_bytes == 0


@pytest.mark.parametrize("op", HELPERS)
@pytest.mark.parametrize("target", matrix.DECLARED_TARGETS)
def test_G5_helpers_compile_for_every_declared_target_and_never_spill(
    target: str, op: KernelOp, everywhere: Everywhere
) -> None:
    entries = everywhere[op, target]
    assert [entry.spec.family for entry in entries] == [HELPERS[op]] * 2
    assert {entry.code_targets for entry in entries} == {(target,)}
    assert [entry.spill_bytes for entry in entries] == [0, 0]
    assert all(entry.registers * entry.spec.threads <= BLOCK_REGISTERS for entry in entries)


def test_E5_a_window_costs_nothing_where_there_is_none(tmp_path: Path, kept: Callable[[str], Path]) -> None:
    """The kernels without a window, from templates whose arguments have none: byte for byte the same."""
    names = "pa_attn_decode_bf16_*_d64v64_gather_causal_*"
    bare = Path(shutil.copytree(template_folder(), tmp_path / "templates"))
    template = bare / "decode.py.j2"
    plain = "from pa_ops.arguments import DECODE, "
    fields = (
        "from dataclasses import replace\n\nfrom pa_ops.arguments import DECODE as WHOLE\n\n"
        'DECODE = replace(WHOLE, counts=tuple("nothing" if x == "window" else x for x in WHOLE.counts))\n'
        "from pa_ops.arguments import "
    )
    text = template.read_text()
    assert plain in text
    template.write_text(text.replace(plain, fields))
    images = []
    for home, templates in ((kept("with-window"), None), (tmp_path / "home", bare)):
        build(Request(home, "serving", ("sm_90a",), names, templates=templates))
        layout = Layout(home / "sm_90a")
        images.append([layout.object(entry.name).read_bytes() for entry in rows(layout)])
    assert images[0] and images[0] == images[1]
    with pytest.raises(BuildError, match="window"):
        build(Request(tmp_path / "home", "serving", ("sm_90a",), names.replace("causal", "window"), templates=bare))
