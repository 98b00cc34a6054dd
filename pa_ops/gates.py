"""Turns a kernel family into what all its rows ask for: operator, features, layouts, masks, head sizes, options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pa_ops.capability import Feature
from pa_ops.spec import DType, Family, KernelOp, Layout, Mask, TensorMask


@dataclass(frozen=True)
class Gates:
    """What every row of a family asks for.

    needs: features by dtype of the query. masks: which masks of a problem a row of each mask serves. head_multiple and
    head_max bind both head sizes. split_heads: K and V may differ in head size. aligned: pointers and strides must be
    multiples of 16 bytes. quantised: the cache may have another type than the query. invariant: what a row makes of a
    sequence depends on nothing else in the batch, always or where that is asked for. page_multiple: of which the tokens
    of a page must be a multiple. mask_aligned: the rows of a mask tensor must start and end at multiples of 16 bytes.
    tensor_masks: what it may hold.
    """

    op: KernelOp
    needs: Mapping[DType, frozenset[Feature]]
    layouts: frozenset[Layout]
    masks: Mapping[Mask, frozenset[Mask]]
    head_multiple: int = 8
    head_max: int = 256
    split_heads: bool = False
    softcap: bool = True
    sinks: bool = True
    aligned: bool = True
    quantised: bool = False
    invariant: bool = True
    page_multiple: int = 1
    mask_aligned: bool = False
    tensor_masks: frozenset[TensorMask] = frozenset(TensorMask)


_OWN_MASK = {mask: frozenset({mask}) for mask in Mask}
_FULL_BY_FLAG = {
    Mask.FULL: frozenset(),
    Mask.CAUSAL: frozenset({Mask.CAUSAL, Mask.FULL}),
    Mask.WINDOW: frozenset({Mask.WINDOW}),
}
_ANY_MASK = {mask: frozenset(Mask) for mask in Mask}
_ANY_LAYOUT = frozenset(Layout)
_PAGED = frozenset({Layout.GATHER})
NOTHING: frozenset[Feature] = frozenset()


def _both(*features: Feature) -> dict[DType, frozenset[Feature]]:
    """The same features for both dtypes."""
    return {dtype: frozenset(features) for dtype in (DType.FP16, DType.BF16)}


_MMA_SYNC = {
    DType.FP16: frozenset({Feature.CP_ASYNC, Feature.MMA_F16}),
    DType.BF16: frozenset({Feature.CP_ASYNC, Feature.MMA_BF16}),
}
_MEA = {DType.FP16: frozenset({Feature.HALF2}), DType.BF16: frozenset({Feature.MMA_BF16})}


def _of_rows(op: KernelOp, feature: Feature, layout: Layout) -> Gates:
    """The gates of a family that moves or merges rows of any size and alignment, and has no mask to ask for."""
    return Gates(
        op,
        _both(feature),
        frozenset({layout}),
        _ANY_MASK,
        head_multiple=1,
        head_max=1024,
        split_heads=True,
        aligned=False,
    )


GATES: dict[Family, Gates] = {
    Family.FLASH_SM80: Gates(KernelOp.ATTN, _MMA_SYNC, _ANY_LAYOUT, _OWN_MASK, mask_aligned=True),
    Family.FLASH_SM90: Gates(
        KernelOp.ATTN,
        _both(Feature.TMA, Feature.WGMMA),
        _ANY_LAYOUT,
        _OWN_MASK,
        split_heads=True,
        page_multiple=8,
        mask_aligned=True,
        tensor_masks=frozenset({TensorMask.NONE, TensorMask.BOOL, TensorMask.ADDITIVE}),
    ),
    Family.DECODE: Gates(KernelOp.ATTN, _MMA_SYNC, _PAGED, _FULL_BY_FLAG),
    Family.MEA: Gates(KernelOp.ATTN, _MEA, _ANY_LAYOUT, _OWN_MASK, head_max=512, split_heads=True),
    Family.MEA_DECODE: Gates(KernelOp.ATTN, _MEA, _PAGED, _FULL_BY_FLAG, invariant=False),
    Family.APPEND: _of_rows(KernelOp.APPEND_KV, Feature.HALF2, Layout.GATHER),
    Family.GATHER: _of_rows(KernelOp.GATHER_KV, Feature.HALF2, Layout.GATHER),
    Family.MERGE: _of_rows(KernelOp.MERGE_STATES, Feature.CP_ASYNC, Layout.DENSE),
}


def attention_families() -> tuple[Family, ...]:
    """Families that answer attention problems."""
    return tuple(family for family, gates in GATES.items() if gates.op is KernelOp.ATTN)


def families_of(op: KernelOp) -> tuple[Family, ...]:
    """Families that compute `op`."""
    return tuple(family for family, gates in GATES.items() if gates.op is op)
