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

OLDEST_BF16_SM = 80
RUN_TIME = 0  # a head size or tile extent that the kernel takes as an argument

# Tile of each head size, by how keys are found: the fastest on an H200 of those that neither spill for sm_80 and sm_90a
# (for sm_100f and sm_120f, 128 spills 16 to 80 B a thread) nor, at 256, exceed the 99 KiB that a block may have on SM
# 8.6, 8.9 and 12.x (docs/performance.md has the others). A page look-up serves 32 keys a word, so gather tiles have a
# multiple of 32 keys.
FLASH_SM80_TILES: dict[int, dict[Layout, Tile]] = {
    64: {Layout.DENSE: Tile(128, 64, 1, 4), Layout.GATHER: Tile(128, 64, 1, 4)},
    96: {Layout.DENSE: Tile(128, 32, 1, 4), Layout.GATHER: Tile(128, 32, 1, 4)},
    128: {Layout.DENSE: Tile(128, 32, 1, 4), Layout.GATHER: Tile(128, 32, 1, 4)},
    256: {Layout.DENSE: Tile(64, 64, 1, 4), Layout.GATHER: Tile(64, 64, 1, 4)},
}
# Those of dense keys without a window where a target has room for more: registers at 128, and at 256 shared memory,
# for eight warps, two of which share 32 rows.
FLASH_SM80_LARGE_TILES: dict[str, dict[int, Tile]] = {
    "sm_80": {128: Tile(128, 48, 1, 4)},
    "sm_90a": {128: Tile(128, 64, 1, 4), 256: Tile(128, 96, 1, 8)},
}
# Tile of each head size for wgmma: 64 query rows a computing warpgroup beside one that copies,
# and as many keys and stages as shared memory and registers hold. Keys are a multiple of 16, the rows of a copy's box
# for the smallest usual page.
FLASH_SM90_TILES: dict[int, Tile] = {
    64: Tile(192, 128, 2, 16),
    128: Tile(128, 128, 3, 12),
    192: Tile(128, 96, 2, 12),
    256: Tile(128, 80, 2, 12),
}
# A second one for long sequences, without a window: 12% faster on 16k tokens, 20% slower on 512.
FLASH_SM90_TALL_TILES: dict[int, Tile] = {128: Tile(192, 80, 4, 16)}
# Those whose groups of 64 rows leave out blocks of keys that only the other groups see: 6% faster with grouped heads
# and with pages; other tiles lose 5% or gain nothing (docs/performance.md).
FLASH_SM90_SKIPPING_TILES: frozenset[Tile] = frozenset(FLASH_SM90_TALL_TILES.values())
# The tile with a mask tensor: threads load spans of 32 keys of it, and hold them beside the scores.
FLASH_SM90_TENSOR_TILES: dict[int, Tile] = {
    64: Tile(128, 128, 3, 12),
    128: Tile(128, 128, 3, 12),
    192: Tile(128, 96, 2, 12),
    256: Tile(128, 64, 2, 12),
}
# Tile of each head size for few query rows: as many stages as let two blocks share an SM, or else one.
DECODE_TILES: dict[int, Tile] = {
    64: Tile(16, 128, 3, 4),
    96: Tile(16, 64, 4, 4),
    128: Tile(16, 64, 3, 4),
    192: Tile(16, 64, 2, 4),
    256: Tile(16, 64, 3, 4),
}
# Tiles of each head size in CUDA C++ by the oldest SM that gets them, newest first: the fastest on an H200 through the
# PTX of sm_75, or as sm_90a, of those that never spill there (docs/performance.md). Before SM 7.0 a block may have no
# more than 48 KiB, and no path has use for a tall one.
MEA_TILES: dict[int, dict[int, Tile]] = {
    64: {53: Tile(128, 64, 1, 4)},
    128: {70: Tile(128, 32, 1, 4), 53: Tile(64, 32, 1, 4)},
    256: {75: Tile(64, 64, 1, 4), 53: Tile(64, 16, 1, 4)},
    512: {80: Tile(32, 16, 1, 4), 75: Tile(32, 16, 1, 8), 70: Tile(32, 16, 1, 4), 53: Tile(16, 16, 1, 4)},
}
# Few query rows: each warp has 16 keys a step.
MEA_DECODE_TILES: dict[int, Tile] = dict.fromkeys((64, 128, 256), Tile(16, 64, 1, 4))
DECODE_MASKS = (Mask.CAUSAL, Mask.WINDOW)
DTYPES: tuple[DType, ...] = (DType.FP16, DType.BF16)
KV_DTYPES: tuple[DType, ...] = (DType.FP16, DType.BF16, DType.E4M3FN, DType.E5M2, DType.INT8)


@dataclass(frozen=True)
class Cell:
    """What a preset asks of an attention family: head size, layout of K and V, mask."""

    head_dim: int
    layout: Layout
    mask: Mask


# At 128 x 32 the window's two edges need six registers too many. Those with a mask tensor have both edges, too, and a
# tile of the mask, which leaves 256 fewer keys in 99 KiB.
TILE_EXCEPTIONS: dict[Cell, Tile] = {
    Cell(128, Layout.DENSE, Mask.WINDOW): Tile(64, 48, 1, 4),
    Cell(256, Layout.DENSE, Mask.TENSOR): Tile(64, 32, 1, 4),
}


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


def _mea_tile(head_dim: int, target: str) -> Tile:
    """The tile of the family `mea` that a target gets."""
    return next(tile for oldest, tile in MEA_TILES[head_dim].items() if parse_target(target) >= oldest)


def _flash_sm80_tile(cell: Cell, target: str) -> Tile:
    """The tile of the family `flash_sm80` that a target gets."""
    usual = TILE_EXCEPTIONS.get(cell, FLASH_SM80_TILES[cell.head_dim][cell.layout])
    if cell.layout is Layout.GATHER or cell.mask not in (Mask.FULL, Mask.CAUSAL):
        return usual
    return FLASH_SM80_LARGE_TILES.get(target, {}).get(cell.head_dim, usual)


def _is_other_tile(spec: InstanceSpec, target: str) -> bool:
    """Whether `target` gets another tile for what `spec` serves."""
    if spec.family is Family.FLASH_SM80:
        return spec.tile != _flash_sm80_tile(Cell(spec.head_dim, spec.layout, spec.mask), target)
    return spec.family is Family.MEA and spec.tile != _mea_tile(spec.head_dim, target)


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
        _is_other_tile,
        "one tile a target: the larger ones where tensor cores want fewer loads, and where they do not spill",
    ),
    Rule(
        "shared-memory",
        lambda spec, target: spec.smem_bytes > _smem_limit(target),
        "the tiles need more shared memory than a block may have on some device that loads this target",
    ),
)


TILES = {  # of the families with one tile a head size, or one for most calls
    Family.FLASH_SM90: FLASH_SM90_TILES,
    Family.DECODE: DECODE_TILES,
    Family.MEA_DECODE: MEA_DECODE_TILES,
}


def _tiles(family: Family, cell: Cell) -> tuple[Tile, ...]:
    """The tiles of an attention family's kernels for `cell`: a rule leaves a target one, or sizes choose."""
    if family is Family.FLASH_SM80:
        return tuple(dict.fromkeys(_flash_sm80_tile(cell, target) for target in DECLARED_TARGETS))
    if family is Family.FLASH_SM90 and cell.mask is Mask.TENSOR:
        return (FLASH_SM90_TENSOR_TILES[cell.head_dim],)
    if family is Family.FLASH_SM90 and cell.mask is not Mask.WINDOW and cell.head_dim in FLASH_SM90_TALL_TILES:
        return (FLASH_SM90_TILES[cell.head_dim], FLASH_SM90_TALL_TILES[cell.head_dim])
    if family is Family.MEA:
        return tuple(dict.fromkeys(MEA_TILES[cell.head_dim].values()))
    return (TILES[family][cell.head_dim],)


def _attention(family: Family, cells: Sequence[Cell]) -> Iterator[InstanceSpec]:
    tiled = ((cell, tile) for cell in cells for tile in _tiles(family, cell))
    for (cell, tile), dtype, kv_dtype in product(tiled, DTYPES, KV_DTYPES):
        yield InstanceSpec(
            op=KernelOp.ATTN,
            family=family,
            dtype=dtype,
            kv_dtype=kv_dtype,
            head_dim=cell.head_dim,
            head_dim_v=cell.head_dim,
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
