"""The generator's pure parts: axes and rules, architecture words, templates, digests, the graph; no compiler runs."""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from core_rows import loaded_by

from pa_ops.arguments import record_of
from pa_ops.capability import MODELS, Capability, parse_target
from pa_ops.errors import BuildError, InvalidArgument
from pa_ops.evidence import Evidence
from pa_ops.generator import doctor, inventory, matrix, ninja, targets
from pa_ops.generator.cubin import read_facts
from pa_ops.generator.digest import Digester
from pa_ops.generator.language import OLDEST_CUTE_SM, Language, language_of
from pa_ops.generator.matrix import DECODE_MASKS, RULES, declared, refusals
from pa_ops.generator.plan import Planner
from pa_ops.generator.render import CUDA_TYPES, Renderer
from pa_ops.generator.tiles import (
    DECODE_TILES,
    FLASH_SM80_TILES,
    FLASH_SM90_EIGHT_TILES,
    FLASH_SM90_PAIR_TILES,
    FLASH_SM90_SKIPPING_TILES,
    FLASH_SM90_SPLIT_TILES,
    FLASH_SM90_TALL_TILES,
    FLASH_SM90_TILES,
    MEA_DECODE_TILES,
    MEA_TILES,
)
from pa_ops.generator.toolchain import Toolchain
from pa_ops.problem import Problem
from pa_ops.selection import select_entry
from pa_ops.sources import template_folder
from pa_ops.spec import EIGHT, PAIR, PLAIN_MASKS, DType, Family, InstanceSpec, KernelOp, Layout, Mask

TOY = Path(__file__).parent / "toy"


@pytest.mark.parametrize("preset", matrix.PRESETS)
def test_G3_declared_names_are_sorted_unique_and_invertible(preset: str) -> None:
    names = [spec.name for spec in declared(preset)]
    assert names == sorted(set(names))
    assert [InstanceSpec.parse(name) for name in names] == list(declared(preset))


def test_presets_nest() -> None:
    smoke, serving, full = (set(declared(name)) for name in ("smoke", "serving", "full"))
    assert smoke < serving == full
    counts = [Counter(spec.family for spec in declared(name, ("sm_90a",))) for name in ("smoke", "serving")]
    for family, tiles in ((Family.FLASH_SM80, FLASH_SM80_TILES), (Family.FLASH_SM90, FLASH_SM90_TILES)):
        plain = len(Layout) * len(PLAIN_MASKS)
        hopper = family is Family.FLASH_SM90
        more = (4, 2 * plain * len({**FLASH_SM90_TALL_TILES, **FLASH_SM90_SPLIT_TILES})) if hopper else (0, 0)
        pairs = (10, 2 * len(Layout) * 2 * len(FLASH_SM90_PAIR_TILES)) if hopper else (0, 0)  # without a window
        eights = (0, 2 * len(Layout) * len(FLASH_SM90_EIGHT_TILES)) if hopper else (0, 0)  # where all rows see the same
        # And the mask tensor, where dense.
        usual = (12, len(tiles) * 2 * (plain + 1))
        wanted = [sum(each) for each in zip(usual, more, pairs, eights, strict=True)]
        assert [count[family] for count in counts] == wanted
    assert [count[Family.DECODE] for count in counts] == [6, len(DECODE_TILES) * 2 * len(DECODE_MASKS)]
    assert {spec.op for spec in smoke} == set(KernelOp)


@pytest.mark.parametrize("target", ("sm_80", "sm_90a", "sm_100f", "sm_120f"))
def test_a_target_gets_one_tile_of_flash_sm80_for_a_cell(target: str) -> None:
    specs = [spec for spec in declared("full", (target,)) if spec.family is Family.FLASH_SM80]
    cells = Counter((spec.dtype, spec.head_dim, spec.layout, spec.mask) for spec in specs)
    assert set(cells.values()) == {1}
    assert len(cells) == len(FLASH_SM80_TILES) * 2 * (len(Layout) * len(PLAIN_MASKS) + 1)
    pairs = {(spec.head_dim, spec.layout, spec.mask) for spec in specs if spec.tile.warps > 4}
    hopper = {(256, Layout.DENSE, Mask.CAUSAL), (256, Layout.DENSE, Mask.FULL)}
    assert pairs == (hopper if target == "sm_90a" else set())


def test_G4_every_candidate_is_declared_or_refused_with_a_reason() -> None:
    for target in targets.TARGETS:
        refused = {refusal.spec for refusal in refusals("full", (target,))}
        built = set(declared("full", (target,)))
        assert refused.isdisjoint(built)
        assert refused | built == set(matrix.candidates("full"))
    assert {refusal.rule for refusal in refusals()} == {
        "hopper-alone",
        "kv-dtype",
        "before-sm80",
        "bf16-before-sm80",
        "other-tile",
        "shared-memory",
    }
    assert {refusal.rule for refusal in refusals("full", ("sm_90a",))} == {"kv-dtype", "other-tile"}
    assert {refusal.rule for refusal in refusals("full", ("sm_100f",))} == {"hopper-alone", "kv-dtype", "other-tile"}
    assert all(refusal.reason for refusal in refusals())
    assert all(rule.reason for rule in RULES)


def test_G5_targets_before_sm_80_get_cuda_kernels_and_the_reason_for_each_refusal() -> None:
    older = [target for target in targets.DECLARED_TARGETS if parse_target(target) < OLDEST_CUTE_SM]
    assert older == ["sm_53", "sm_60", "sm_70", "sm_75"]
    for target in older:
        specs = declared("full", (target,))
        mea = {Family.MEA: len(MEA_TILES) * (len(Layout) * len(PLAIN_MASKS) + len(set(Mask) - set(PLAIN_MASKS)))}
        mea[Family.MEA_DECODE] = len(MEA_DECODE_TILES) * len(DECODE_MASKS)
        assert Counter(spec.family for spec in specs) == {Family.APPEND: 2, Family.GATHER: 2, **mea}
        assert {spec.dtype for spec in specs if spec.family in mea} == {DType.FP16}
        reasons = {refusal.spec: refusal.rule for refusal in refusals("full", (target,))}
        assert set(reasons) == {*matrix.candidates("full")} - {*specs}
        same = {rule for spec, rule in reasons.items() if spec.kv_dtype is spec.dtype}
        assert same == {"hopper-alone", "before-sm80", "bf16-before-sm80", "other-tile"}


def test_wgmma_is_built_for_sm_90a_alone_and_says_so_elsewhere() -> None:
    wgmma = {spec for spec in declared() if spec.family is Family.FLASH_SM90}
    assert wgmma == {spec for spec in declared("full", ("sm_90a",)) if spec.family is Family.FLASH_SM90}
    for target in set(targets.TARGETS) - {"sm_90a"}:
        assert wgmma.isdisjoint(declared("full", (target,)))
        told = {refusal.spec: refusal for refusal in refusals("full", (target,)) if refusal.rule == "hopper-alone"}
        assert wgmma <= told.keys() and all(each.spec.family is Family.FLASH_SM90 for each in told.values())
        assert {each.reason for each in told.values()} == {"wgmma is an instruction of SM 9.0 alone"}


@pytest.mark.parametrize("sm", [53, 60, 61, 62, 70, 72, 75])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_B1_mea_on_every_sm_before_80(sm: int, head_dim: int) -> None:
    cases = (("paged_attention", 1, Family.MEA_DECODE), ("paged_attention", 512, Family.MEA))
    for op, tokens, family in (*cases, ("varlen_attention", 1, Family.MEA), ("varlen_attention", 512, Family.MEA)):
        problem = Problem(op=op, dtype="fp16", head_dim=head_dim, tokens=tokens)
        entry = select_entry(loaded_by(sm), problem, Capability.of_sm(sm)).entry
        assert entry.spec.family is family and entry.target == targets.target_of_sm(sm)
        assert entry.spec.head_dim == min(tile for tile in MEA_TILES if tile >= head_dim)


def test_decode_of_the_largest_head_is_refused_where_a_block_may_have_99_kib() -> None:
    refused = [refusal for refusal in refusals() if refusal.rule == "shared-memory"]
    assert {refusal.target for refusal in refused} == {"sm_80", "sm_120f"}
    assert {refusal.spec for refusal in refused} == {
        spec for spec in declared() if spec.family is Family.DECODE and spec.head_dim == 256
    }
    assert all("more shared memory than a block may have" in refusal.reason for refusal in refused)


def test_G4_rules_refuse_what_they_name() -> None:
    spec = next(spec for spec in declared("smoke") if spec.op is KernelOp.ATTN)
    big = replace(spec, tile=replace(spec.tile, n=512), head_dim=256, head_dim_v=256)
    found = matrix.refusal(big, "sm_80")
    assert found is not None and found.rule == "shared-memory"
    older = matrix.refusal(spec, "sm_75")
    assert older is not None and older.rule == "before-sm80"
    quantised = matrix.refusal(replace(spec, kv_dtype=DType.INT8), "sm_80")
    assert quantised is not None and quantised.rule == "kv-dtype"


@pytest.mark.parametrize("sm", [80, 86, 87, 89, 90, 100, 103, 120, 121])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("tokens", [1, 512])
def test_declared_targets_serve_every_sm_from_80_on(sm: int, dtype: str, head_dim: int, tokens: int) -> None:
    problem = Problem(op="paged_attention", dtype=dtype, head_dim=head_dim, tokens=tokens)
    entry = select_entry(loaded_by(sm), problem, Capability.of_sm(sm)).entry
    tiles = {Family.DECODE: DECODE_TILES, Family.FLASH_SM90: FLASH_SM90_TILES, Family.FLASH_SM80: FLASH_SM80_TILES}
    assert entry.spec.head_dim == min(tile for tile in tiles[entry.spec.family] if tile >= head_dim)
    assert entry.target == targets.target_of_sm(sm)


@pytest.mark.parametrize("sm", [53, 60, 61, 62, 70, 72, 75, 80, 86, 89, 90, 103, 120, 121])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_declared_targets_append_on_every_sm_from_53_on(sm: int, dtype: str) -> None:
    problem = Problem(op="append_kv", dtype=dtype, head_dim=128)
    entry = select_entry(loaded_by(sm), problem, Capability.of_sm(sm)).entry
    assert entry.spec.family is Family.APPEND and entry.target == targets.target_of_sm(sm)


@pytest.mark.parametrize(
    ("word", "target"),
    [
        ("sm_53", "sm_53"),
        ("sm_75", "sm_75"),
        ("sm_90", "sm_90a"),
        ("sm_90a", "sm_90a"),
        ("sm_80", "sm_80"),
        ("sm_103", "sm_100f"),
        ("sm_121", "sm_120f"),
    ],
)
def test_architecture_words(word: str, target: str) -> None:
    assert targets.resolve(word) == target


@pytest.mark.parametrize("word", ["sm_52", "90", "sm_90b", ""])
def test_unknown_architecture_words_name_the_known_ones(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"arch: must be one of sm_53, .*sm_90a.* \(kernels begin at SM 5.3\)"):
        targets.resolve(word)


def test_every_sm_from_53_on_but_110_has_a_target() -> None:
    assert [sm for sm in MODELS if targets.target_of_sm(sm) is None] == [50, 52, 110]


@pytest.mark.parametrize(("sms", "here", "well"), [((53, 75, 80), "sm_80", True), ((75, 80), "sm_53", False)])
def test_doctor_says_which_targets_the_compiler_does_not_know(
    sms: tuple[int, ...], here: str, well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Toolchain()
    tools.nvrtc_sms, tools.nvrtc_version = frozenset(sms), "13.0"
    monkeypatch.setattr(doctor, "default_targets", lambda: (here,))
    found = doctor._targets(tools)
    assert found.well is well
    assert "NVRTC 13.0 does not know" in found.detail and "nvidia-cuda-nvrtc-cu12>=12.9,<13" in found.detail


def test_targets_resolve_once_and_in_order() -> None:
    assert targets.resolve_all(["sm_120", "sm_90", "sm_80", "sm_53", "sm_90a"]) == (
        "sm_53",
        "sm_80",
        "sm_90a",
        "sm_120f",
    )


TOOLS = {Language.CUTE: {"dsl": "4.8.1"}, Language.CUDA: {"nvrtc": "12.9"}}


def digester(**changes: object) -> Digester:
    fields: dict[str, object] = {
        "renderer": Renderer(TOY),
        "compile_sources": (Path(__file__),),
        "toolchain": TOOLS,
    }
    return Digester(**{**fields, **changes})  # type: ignore[arg-type]


def test_digest_changes_with_every_input_and_with_nothing_else() -> None:
    spec, other = (spec for spec in declared("smoke") if spec.op is KernelOp.MERGE_STATES)
    base = digester().digest(spec, "sm_80", "SOURCE = 1")
    assert base == digester().digest(spec, "sm_80", "SOURCE = 1")
    changed = [
        digester().digest(other, "sm_80", "SOURCE = 1"),
        digester().digest(spec, "sm_90a", "SOURCE = 1"),
        digester().digest(spec, "sm_80", "SOURCE = 2"),
        digester(toolchain={**TOOLS, Language.CUTE: {"dsl": "4.8.2"}}).digest(spec, "sm_80", "SOURCE = 1"),
        digester(compile_sources=(TOY / "device" / "scale.py",)).digest(spec, "sm_80", "SOURCE = 1"),
    ]
    assert len({base, *changed}) == 6


def test_evidence_is_of_todays_sources_whatever_compiled_them() -> None:
    planner = Planner(Toolchain())
    spec = next(spec for spec in declared("smoke") if spec.op is KernelOp.MERGE_STATES)
    tools = {"cutlass_dsl": "5.0", "cuda": "cu14", "nvrtc": "14.0"}
    theirs = planner.digest_by(spec, "sm_90a", tools)
    assert theirs != planner.item(spec, "sm_90a").digest
    shown = {
        (spec.name, "sm_90a"): Evidence(theirs, tests=1, tools=tools),
        (spec.name, "sm_80"): Evidence(theirs, tests=1, tools=tools),
        (spec.name, ""): Evidence(theirs, tests=1, tools=tools),
        ("pa_gone", ""): Evidence(theirs, tests=1, tools=tools),
    }
    pairs = [(each, target) for target in ("sm_80", "sm_90a") for each in declared("smoke", (target,))]
    assert inventory.current(planner, shown, pairs) == {(spec.name, "sm_90a"), (spec.name, "")}
    older = [pair for pair in pairs if pair[1] == "sm_80"]
    assert inventory.current(planner, shown, older) == frozenset(), "another target's code has another digest"
    untold = {(spec.name, "sm_90a"): Evidence(theirs, tests=1)}
    assert inventory.current(planner, untold, pairs) == frozenset()


@pytest.mark.parametrize(
    ("language", "tool", "file"),
    [(Language.CUTE, "dsl", "scale.py"), (Language.CUDA, "nvrtc", "scale.cuh")],
)
def test_a_digest_covers_the_tools_and_device_files_of_its_own_language(
    toy: Path, language: Language, tool: str, file: str
) -> None:
    def digests(**changes: object) -> dict[Language, set[str]]:
        found: dict[Language, set[str]] = {each: set() for each in Language}
        for spec in declared("smoke"):
            source = Renderer(toy).render(spec)
            found[language_of(spec)].add(digester(renderer=Renderer(toy), **changes).digest(spec, "sm_80", source))
        return found

    (other,) = set(Language) - {language}
    before, tools = digests(), digests(toolchain={**TOOLS, language: {tool: "another"}})
    with (toy / "device" / file).open("a") as device:
        device.write("\n")
    for after in (tools, digests()):
        assert after[language].isdisjoint(before[language]) and after[other] == before[other]


REACHED = {
    Family.MERGE: {"chaining.py", "compiling.py", "merge.py", "ptx.py", "ptx_global.py", "ptx_grid.py", "softmax.py"},
    Family.APPEND: {"append.cuh", "half.cuh", "memory.cuh", "search.cuh"},
    Family.GATHER: {"gather.cuh", "half.cuh", "memory.cuh", "search.cuh"},
}


@pytest.mark.parametrize("family", REACHED)
def test_a_digest_covers_the_device_files_that_its_source_reaches(tmp_path: Path, family: Family) -> None:
    templates = tmp_path / "templates"
    shutil.copytree(template_folder(), templates)
    spec = next(spec for spec in declared("smoke") if spec.family is family)
    source = Renderer(templates).render(spec)

    def digest() -> str:
        return digester(renderer=Renderer(templates)).digest(spec, "sm_80", source)

    before, changing = digest(), set()
    for path in sorted(path for path in (templates / "device").iterdir() if path.is_file()):
        kept = path.read_text()
        path.write_text(kept + "\n")
        changing |= {path.name} if digest() != before else set()
        path.write_text(kept)
    assert changing == REACHED[family]


def test_imports_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "device" / f"{name}.cuh").write_text(f'#include "{other}.cuh"\n')
    found = digester(renderer=Renderer(tmp_path)).device_files(Language.CUDA, '#include "a.cuh"\n')
    assert found.keys() == {"a.cuh", "b.cuh"}


def test_rendering_binds_the_spec_and_hides_its_statements() -> None:
    for spec in declared("smoke"):
        source = Renderer(TOY).render(spec)
        assert language_of(spec).statement not in source and "{{" not in source
        if language_of(spec) is Language.CUDA:
            assert f" {spec.name}(const Arguments args)" in source
            continue
        assert f'NAME = "{spec.name}"' in source
        assert ("BFloat16" in source) == (spec.dtype is DType.BF16)
        compile(source, spec.name, "exec")


def test_groups_leave_out_blocks_of_keys_by_some_tiles_where_no_window_cuts_them() -> None:
    wgmma = [spec for spec in declared("full", ("sm_90a",)) if spec.family is Family.FLASH_SM90]
    found = {spec for spec in wgmma if " skipping=True" in Renderer().render(spec)}
    alone = {(spec.head_dim, spec.mask) for spec in found if spec.tile.cluster == 1}
    assert alone == set(product((96, 128), (Mask.CAUSAL, Mask.FULL)))
    assert all(spec in found for spec in wgmma if spec.tile.cluster > 1)
    able = {spec for spec in wgmma if spec.tile in FLASH_SM90_SKIPPING_TILES}
    assert found == {spec for spec in able if spec.mask is not Mask.WINDOW}


def test_blocks_that_share_keys_know_whether_one_by_itself_leaves_any_out() -> None:
    wgmma = [spec for spec in declared("full", ("sm_90a",)) if spec.family is Family.FLASH_SM90]
    told = {spec for spec in wgmma if "alone_skipping=True" in Renderer().render(spec)}
    assert {spec.head_dim for spec in told if spec.tile.cluster > 1} == {96, 128}
    assert told == {spec for spec in wgmma if replace(spec.tile, cluster=1) in FLASH_SM90_SKIPPING_TILES}


def test_two_grids_share_tiles_out_where_eight_blocks_share_keys_and_each_has_its_pair() -> None:
    wgmma = [spec for spec in declared("full", ("sm_90a",)) if spec.family is Family.FLASH_SM90]
    told = {spec for spec in wgmma if "shared_out=True" in Renderer().render(spec)}
    eights = {spec for spec in wgmma if spec.tile.cluster == EIGHT}
    pairs = {replace(spec, tile=replace(spec.tile, cluster=PAIR)) for spec in eights}
    assert told == eights | pairs <= set(wgmma)
    assert {(spec.head_dim, spec.mask) for spec in told} == {(256, Mask.FULL)}


def test_cuda_sources_declare_the_fields_of_their_record_in_order() -> None:
    spec = declared("smoke", ("sm_53",))[0]
    members = [f"    {CUDA_TYPES[letter]} {name};\n" for name, letter in record_of(spec).fields]
    assert "struct Arguments {\n" + "".join(members) + "};" in Renderer().render(spec)


def test_a_missing_template_names_instance_and_file(tmp_path: Path) -> None:
    spec = declared("smoke")[0]
    with pytest.raises(BuildError, match=r"append\.cu\.j2") as caught:
        Renderer(tmp_path).template_text(spec)
    assert caught.value.instance == spec.name


def test_ninja_text_escapes_what_ninja_would_read() -> None:
    edge = ninja.Edge("compile", "a $b", "c", (Path("/x y"),), (Path("/p:q"), Path("/r$")))
    text = ninja.text_of([edge], Path("/log dir"))
    assert "command = a $$b\n" in text and "build /x$ y: compile /p$:q /r$$\n" in text
    assert "builddir = /log$ dir\n" in text


def test_the_dsl_sees_no_stray_settings() -> None:
    kept = ninja.clean_environment({"CUTE_DSL_ARCH": "sm_75", "CUTLASS_X": "1", "PATH": "/bin"})
    assert kept == {"PATH": "/bin", "CUTE_DSL_DISABLE_FILE_CACHING": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(60), b"no image here"])
def test_an_object_without_device_code_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no device code"):
        read_facts(data)


def image(flags: int, abi: int, sections: dict[str, bytes]) -> bytes:
    """A cubin of `sections` after the one of names."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (".shstrtab", *sections))
    bodies = [names, *sections.values()]
    table = 64 + sum(map(len, bodies))
    head = b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, table, flags, 64, 0, 0, 64, len(bodies), 0)
    rows, at = b"", 64
    for name, body in zip((".shstrtab", *sections), bodies, strict=True):
        kind = 0x70000000 if body is not names else 3
        start = names.index(name.encode() + b"\0")
        rows += struct.pack("<IIQQQQIIQQ", start, kind, 0, 0, at, len(body), 0, 0, 4, 0)
        at += len(body)
    return head + b"".join(bodies) + rows


COMMON = (
    struct.pack("<BBH", 3, 0x37, 130)  # a value in place of a size: nothing follows it
    + struct.pack("<BBHII", 4, 0x2F, 8, 1, 168)
    + struct.pack("<BBHII", 4, 0x2F, 8, 2, 96)
    + struct.pack("<BBHII", 4, 0x11, 8, 1, 24)
)
OWN = struct.pack("<BBH", 3, 0x19, 160)


@pytest.mark.parametrize(
    ("flags", "abi", "target"),
    [
        (0x500550, 7, "sm_80"),
        (0x5A0D5A, 7, "sm_90a"),
        (0x600640A, 8, "sm_100a"),
        (0x6006402, 8, "sm_100"),
        (0x6005A04, 8, "sm_90"),
        (0x6005004, 8, "sm_80"),
    ],
)
def test_facts_of_an_image_inside_a_library(flags: int, abi: int, target: str) -> None:
    cubin = image(flags, abi, {".nv.info": COMMON, ".nv.info.kernel": OWN})
    (facts,) = read_facts(b"\x7fELF" + bytes(60) + cubin + b"after")
    assert (facts.target, facts.registers, facts.frame_bytes) == (target, 168, 24)
    assert (facts.entry, facts.argument_bytes, facts.image_bytes) == ("kernel", 160, len(cubin))


@pytest.mark.parametrize(
    "sections",
    [
        {".nv.info": COMMON},
        {".nv.info": COMMON, ".nv.info.one": OWN, ".nv.info.two": OWN},
        {".nv.info": b"", ".nv.info.one": OWN},
    ],
)
def test_an_image_of_other_than_one_kernel_is_an_error(sections: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="must hold one kernel and its register count"):
        read_facts(image(0x500550, 7, sections))
