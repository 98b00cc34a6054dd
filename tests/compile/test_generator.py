"""The generator's pure parts: axes and rules, architecture words, templates, digests, the graph; no compiler runs."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from pa_ops.capability import MODELS, Capability
from pa_ops.errors import BuildError, InvalidArgument
from pa_ops.generator import matrix, ninja, targets
from pa_ops.generator.cubin import read_facts
from pa_ops.generator.digest import Digester
from pa_ops.generator.matrix import FLASH_SM80_TILES, RULES, declared, refusals
from pa_ops.generator.render import Renderer
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.selection import select_entry
from pa_ops.spec import DType, InstanceSpec, KernelOp, Layout, Mask

TOY = Path(__file__).parent / "toy"


@pytest.mark.parametrize("preset", matrix.PRESETS)
def test_G3_declared_names_are_sorted_unique_and_invertible(preset: str) -> None:
    names = [spec.name for spec in declared(preset)]
    assert names == sorted(set(names))
    assert [InstanceSpec.parse(name) for name in names] == list(declared(preset))


def test_presets_nest() -> None:
    smoke, serving, full = (set(declared(name)) for name in ("smoke", "serving", "full"))
    assert smoke < serving == full
    assert sum(spec.op is KernelOp.ATTN for spec in smoke) == 12
    attention = [spec for spec in serving if spec.op is KernelOp.ATTN]
    assert len(attention) == len(FLASH_SM80_TILES) * 2 * len(Layout) * len(Mask)
    assert {spec.op for spec in smoke} == set(KernelOp)


def test_G4_every_candidate_is_declared_or_refused_with_a_reason() -> None:
    for target in targets.TARGETS:
        refused = {refusal.spec for refusal in refusals("full", (target,))}
        built = set(declared("full", (target,)))
        assert refused.isdisjoint(built)
        assert refused | built == set(matrix.candidates("full"))
    assert {refusal.rule for refusal in refusals()} == {"kv-dtype"}
    assert all(rule.reason for rule in RULES)


def test_G4_rules_refuse_what_they_name() -> None:
    spec = next(spec for spec in declared("smoke") if spec.op is KernelOp.ATTN)
    big = replace(spec, tile=replace(spec.tile, n=512), head_dim=256, head_dim_v=256)
    found = matrix.refusal(big, "sm_80")
    assert found is not None and found.rule == "shared-memory"
    assert matrix.refusal(spec, "sm_75") is not None
    quantised = matrix.refusal(replace(spec, kv_dtype=DType.INT8), "sm_80")
    assert quantised is not None and quantised.rule == "kv-dtype"


@pytest.mark.parametrize("sm", [80, 86, 87, 89, 90, 100, 103, 120, 121])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
def test_declared_targets_serve_every_sm_from_80_on(sm: int, dtype: str, head_dim: int) -> None:
    entries = [Entry.declared(spec, t) for t in targets.DECLARED_TARGETS for spec in declared("full", (t,))]
    problem = Problem(op="paged_attention", dtype=dtype, head_dim=head_dim)
    entry = select_entry(entries, problem, Capability.of_sm(sm)).entry
    assert entry.spec.head_dim == min(tile for tile in FLASH_SM80_TILES if tile >= head_dim)
    assert entry.target == targets.target_of_sm(sm)


@pytest.mark.parametrize(
    ("word", "target"),
    [("sm_90", "sm_90a"), ("sm_90a", "sm_90a"), ("sm_80", "sm_80"), ("sm_103", "sm_100f"), ("sm_121", "sm_120f")],
)
def test_architecture_words(word: str, target: str) -> None:
    assert targets.resolve(word) == target


@pytest.mark.parametrize("word", ["sm_75", "90", "sm_90b", ""])
def test_unknown_architecture_words_name_the_known_ones(word: str) -> None:
    with pytest.raises(InvalidArgument, match=r"arch: must be one of sm_80, .*sm_90a"):
        targets.resolve(word)


def test_no_sm_before_80_has_a_target() -> None:
    assert [sm for sm in MODELS if targets.target_of_sm(sm) is None] == [sm for sm in MODELS if sm < 80] + [110]


def test_targets_resolve_once_and_in_order() -> None:
    assert targets.resolve_all(["sm_120", "sm_90", "sm_80", "sm_90a"]) == ("sm_80", "sm_90a", "sm_120f")


def digester(**changes: object) -> Digester:
    fields: dict[str, object] = {
        "renderer": Renderer(TOY),
        "compile_sources": (Path(__file__),),
        "toolchain": {"dsl": "4.8.1"},
        "flags": ("-a",),
    }
    return Digester(**{**fields, **changes})  # type: ignore[arg-type]


def test_digest_changes_with_every_input_and_with_nothing_else() -> None:
    spec, other = declared("smoke")[:2]
    base = digester().digest(spec, "sm_80", "source")
    assert base == digester().digest(spec, "sm_80", "source")
    changed = [
        digester().digest(other, "sm_80", "source"),
        digester().digest(spec, "sm_90a", "source"),
        digester().digest(spec, "sm_80", "another source"),
        digester(toolchain={"dsl": "4.8.2"}).digest(spec, "sm_80", "source"),
        digester(flags=("-b",)).digest(spec, "sm_80", "source"),
        digester(compile_sources=(TOY / "device" / "scale.py",)).digest(spec, "sm_80", "source"),
    ]
    assert len({base, *changed}) == 7


def test_rendering_binds_the_spec_and_hides_its_statements() -> None:
    for spec in declared("smoke"):
        source = Renderer(TOY).render(spec)
        assert f'NAME = "{spec.name}"' in source and "# %" not in source
        assert ("BFloat16" in source) == (spec.dtype is DType.BF16)
        compile(source, spec.name, "exec")


def test_a_missing_template_names_instance_and_file(tmp_path: Path) -> None:
    spec = declared("smoke")[0]
    with pytest.raises(BuildError, match=r"append\.py\.j2") as caught:
        Renderer(tmp_path).template_text(spec)
    assert caught.value.instance == spec.name


def test_ninja_text_escapes_what_ninja_would_read() -> None:
    edge = ninja.Edge("link", "a $b", "c", (Path("/x y"),), (Path("/p:q"),), (Path("/r"),), (Path("/s t"), "u"))
    text = ninja.text_of([edge], Path("/log dir"))
    assert "command = a $$b\n" in text and "build /x$ y: link /p$:q | /r\n" in text and "rspfile = /s$ t\n" in text


def test_the_dsl_sees_no_stray_settings() -> None:
    kept = ninja.clean_environment({"CUTE_DSL_ARCH": "sm_75", "CUTLASS_X": "1", "PATH": "/bin"})
    assert kept == {"PATH": "/bin", "CUTE_DSL_DISABLE_FILE_CACHING": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(60), b"no image here"])
def test_an_object_without_device_code_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no device code"):
        read_facts(data)


def image(flags: int, abi: int, info: bytes) -> bytes:
    """A cubin of two sections: names, and `info` as .nv.info."""
    names = b"\0.shstrtab\0.nv.info\0"
    table = 64 + len(names) + len(info)
    head = b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, table, flags, 64, 0, 0, 64, 2, 0)
    first = struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    second = struct.pack("<IIQQQQIIQQ", 11, 0x70000000, 0, 0, 64 + len(names), len(info), 0, 0, 4, 0)
    return head + names + info + first + second


INFO = (
    struct.pack("<BBH", 3, 0x37, 130)  # a value in place of a size: nothing follows it
    + struct.pack("<BBHII", 4, 0x2F, 8, 1, 168)
    + struct.pack("<BBHII", 4, 0x2F, 8, 2, 96)
    + struct.pack("<BBHII", 4, 0x11, 8, 1, 24)
)


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
def test_facts_of_an_image_inside_an_object(flags: int, abi: int, target: str) -> None:
    cubin = image(flags, abi, INFO)
    (facts,) = read_facts(b"\x7fELF" + bytes(60) + cubin + b"after")
    assert (facts.target, facts.registers, facts.frame_bytes) == (target, 168, 24)
    assert facts.image_bytes == len(cubin)
