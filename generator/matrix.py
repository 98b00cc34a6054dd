"""Turns axes, presets and exclusion rules, all data, into the sorted list of kernels that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import chain, product

from pa_ops.capability import MODELS, Capability, parse_target
from pa_ops.errors import InvalidArgument
from pa_ops.spec import PLAIN_MASKS, DType, Family, InstanceSpec, KernelOp, Layout, Mask, Tile

from .language import OLDEST_CUTE_SM, Language, language_of
from .targets import DECLARED_TARGETS
from .tiles import (
    DECODE_TILES,
    FLASH_SM80_TILES,
    FLASH_SM90_SPLIT_TILES,
    FLASH_SM90_TENSOR_TILES,
    FLASH_SM90_TILES,
    MEA_DECODE_TILES,
    MEA_TILES,
    Cell,
    is_other_tile,
    tiles_of,
)

OLDEST_BF16_SM = 80
RUN_TIME = 0  # a head size or tile extent that the kernel takes as an argument

DECODE_MASKS = (Mask.CAUSAL, Mask.WINDOW)
DTYPES: tuple[DType, ...] = (DType.FP16, DType.BF16)
KV_DTYPES: tuple[DType, ...] = (DType.FP16, DType.BF16, DType.E4M3FN, DType.E5M2, DType.INT8)


@dataclass(frozen=True)
class Preset:
    """A named choice of cells by attention family.

    targets: what it builds when the user names none (empty: the GPU's).
    """

    name: str
    title: str
    cells: Mapping[Family, tuple[Cell, ...]]
    targets: tuple[str, ...] = ()


def _grid(head_dims: Iterable[int], layouts: Iterable[Layout], masks: Iterable[Mask]) -> tuple[Cell, ...]:
    return tuple(Cell(*point) for point in product(head_dims, layouts, masks))


def _split(head_dims: Iterable[tuple[int, int]]) -> tuple[Cell, ...]:
    """Every layout and plain mask of pairs of head sizes, V's the second."""
    return tuple(Cell(k, layout, mask, v) for (k, v), layout, mask in product(head_dims, Layout, PLAIN_MASKS))


_PAGED = (Layout.GATHER,)
_DENSE = (Layout.DENSE,)
_TENSOR = (Mask.TENSOR,)
_SMOKE_PREFILL = (
    *_grid((64,), _DENSE, (Mask.FULL, Mask.CAUSAL)),
    *_grid((64,), _PAGED, (Mask.CAUSAL, Mask.WINDOW)),
    *_grid((128,), Layout, (Mask.CAUSAL,)),
)
_SMOKE: dict[Family, tuple[Cell, ...]] = {
    Family.FLASH_SM80: _SMOKE_PREFILL,
    Family.FLASH_SM90: _SMOKE_PREFILL,
    Family.DECODE: (*_grid((64,), _PAGED, DECODE_MASKS), *_grid((128,), _PAGED, (Mask.CAUSAL,))),
    Family.MEA: _grid((64,), Layout, (Mask.CAUSAL,)),
    Family.MEA_DECODE: _grid((64,), _PAGED, (Mask.CAUSAL,)),
}
_SERVING: dict[Family, tuple[Cell, ...]] = {
    Family.FLASH_SM80: (
        *_grid(FLASH_SM80_TILES, Layout, PLAIN_MASKS),
        *_grid(FLASH_SM80_TILES, _DENSE, _TENSOR),
    ),
    Family.FLASH_SM90: (
        *_grid(FLASH_SM90_TILES, Layout, PLAIN_MASKS),
        *_split(FLASH_SM90_SPLIT_TILES),
        *_grid(FLASH_SM90_TENSOR_TILES, _DENSE, _TENSOR),
    ),
    Family.DECODE: _grid(DECODE_TILES, _PAGED, DECODE_MASKS),
    Family.MEA: (*_grid(MEA_TILES, Layout, PLAIN_MASKS), *_grid(MEA_TILES, _DENSE, _TENSOR)),
    Family.MEA_DECODE: _grid(MEA_DECODE_TILES, _PAGED, DECODE_MASKS),
}
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("smoke", "head sizes 64 and 128, the masks that the demo and a first test need", _SMOKE),
        Preset("serving", "every head size, layout and mask, for the GPU that is here", _SERVING),
        Preset("full", "serving, for every architecture", _SERVING, DECLARED_TARGETS),
    )
}
DEFAULT_PRESET = "serving"


@dataclass(frozen=True)
class Rule:
    """One exclusion: the candidates that it refuses, and the sentence that says why."""

    name: str
    refuses: Callable[[InstanceSpec, str], bool]
    reason: str


@dataclass(frozen=True, order=True)
class Refusal:
    """A candidate that no build makes for `target`, with the rule's name and reason."""

    spec: InstanceSpec
    target: str
    rule: str
    reason: str


@lru_cache(maxsize=64)
def _smem_limit(target: str) -> int:
    """The least opt-in shared memory, in bytes, of the devices that `target` code loads on."""
    loads = [c for sm in MODELS if target in (c := Capability.of_sm(sm)).targets]
    return min((c.smem_optin_bytes for c in loads), default=0)


RULES: tuple[Rule, ...] = (
    Rule(
        "hopper-alone",
        lambda spec, target: spec.family is Family.FLASH_SM90 and target != "sm_90a",
        "wgmma is an instruction of SM 9.0 alone",
    ),
    Rule(
        "kv-dtype",
        lambda spec, _: spec.kv_dtype is not spec.dtype,
        "kernels read K and V in the query's dtype; quantised caches are served by the reference only",
    ),
    Rule(
        "before-sm80",
        lambda spec, target: language_of(spec) is Language.CUTE and parse_target(target) < OLDEST_CUTE_SM,
        "cp.async and mma.sync m16n8k16 begin at SM 8.0, and so does the DSL that compiles this template",
    ),
    Rule(
        "bf16-before-sm80",
        lambda spec, target: (
            spec.op is KernelOp.ATTN and spec.dtype is DType.BF16 and parse_target(target) < OLDEST_BF16_SM
        ),
        "the tensor cores' bf16 begins at SM 8.0",
    ),
    Rule(
        "other-tile",
        is_other_tile,
        "one tile a target: the larger ones where tensor cores want fewer loads, and where they do not spill",
    ),
    Rule(
        "shared-memory",
        lambda spec, target: spec.smem_bytes > _smem_limit(target),
        "the tiles need more shared memory than a block may have on some device that loads this target",
    ),
)


def _attention(family: Family, cells: Sequence[Cell]) -> Iterator[InstanceSpec]:
    tiled = ((cell, tile) for cell in cells for tile in tiles_of(family, cell))
    for (cell, tile), dtype, kv_dtype in product(tiled, DTYPES, KV_DTYPES):
        yield InstanceSpec(
            op=KernelOp.ATTN,
            family=family,
            dtype=dtype,
            kv_dtype=kv_dtype,
            head_dim=cell.head_dim,
            head_dim_v=cell.head_dim_v or cell.head_dim,
            layout=cell.layout,
            mask=cell.mask,
            tile=tile,
        )


_HELPERS = (
    (KernelOp.APPEND_KV, Family.APPEND, Layout.GATHER, Tile(0, 0, 0, 4)),
    (KernelOp.GATHER_KV, Family.GATHER, Layout.GATHER, Tile(0, 0, 0, 4)),
    (KernelOp.MERGE_STATES, Family.MERGE, Layout.DENSE, Tile(0, 0, 0, 4)),
)


def _helpers() -> Iterator[InstanceSpec]:
    for (op, family, layout, tile), dtype in product(_HELPERS, DTYPES):
        yield InstanceSpec(op, family, dtype, dtype, RUN_TIME, RUN_TIME, layout, Mask.FULL, tile)


def preset_of(name: str) -> Preset:
    """The preset called `name`; raises InvalidArgument listing those that exist."""
    if name not in PRESETS:
        raise InvalidArgument("preset", "must be one of " + ", ".join(PRESETS), repr(name))
    return PRESETS[name]


@lru_cache(maxsize=len(PRESETS))
def candidates(preset: str) -> tuple[InstanceSpec, ...]:
    """The whole product of a preset's axes, sorted by name, before any rule."""
    chosen = preset_of(preset)
    attention = chain.from_iterable(_attention(family, cells) for family, cells in chosen.cells.items())
    specs = (*attention, *_helpers())
    return tuple(sorted(specs, key=lambda spec: spec.name))


def matches(name: str, pattern: str) -> bool:
    """Whether an instance's name is one that a filter means: a glob, or several with commas between."""
    return any(fnmatchcase(name, glob) for glob in pattern.split(","))


def refusal(spec: InstanceSpec, target: str) -> Refusal | None:
    """The first rule that excludes `spec` from `target`, None when it is built."""
    for rule in RULES:
        if rule.refuses(spec, target):
            return Refusal(spec, target, rule.name, rule.reason)
    return None


def declared(preset: str = "full", archs: Sequence[str] = DECLARED_TARGETS) -> tuple[InstanceSpec, ...]:
    """The kernels that a preset builds for at least one of the targets `archs`, sorted by name."""
    return tuple(spec for spec in candidates(preset) if any(refusal(spec, target) is None for target in archs))


def refusals(preset: str = "full", archs: Sequence[str] = DECLARED_TARGETS) -> tuple[Refusal, ...]:
    """Every candidate that some target of `archs` does not get, with the reason."""
    pairs = product(candidates(preset), archs)
    return tuple(found for spec, target in pairs if (found := refusal(spec, target)) is not None)
