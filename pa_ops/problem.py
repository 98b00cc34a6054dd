"""Turns the arguments of one operator call into facts (which kernels may serve it) and sizes (which is fastest)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pa_ops.errors import InvalidArgument
from pa_ops.spec import DType, KernelOp, Layout, Mask, Op, TensorMask, Word, word

DEFAULT_PAGE_SIZE = 16

_KERNEL_OP: dict[str, KernelOp] = {
    Op.PAGED_ATTENTION: KernelOp.ATTN,
    Op.VARLEN_ATTENTION: KernelOp.ATTN,
    Op.ATTENTION: KernelOp.ATTN,
    Op.APPEND_KV: KernelOp.APPEND_KV,
    Op.GATHER_KV: KernelOp.GATHER_KV,
    Op.MERGE_STATES: KernelOp.MERGE_STATES,
}
_LAYOUT: dict[str, Layout] = {
    Op.PAGED_ATTENTION: Layout.GATHER,
    Op.VARLEN_ATTENTION: Layout.DENSE,
    Op.ATTENTION: Layout.GATHER,  # a page a sequence; dense with the mask `tensor`, see `Problem.mask`
    Op.APPEND_KV: Layout.GATHER,
    Op.GATHER_KV: Layout.GATHER,
    Op.MERGE_STATES: Layout.DENSE,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operator call as selection sees it; words may be given as strings.

    head_dim_v, num_kv_heads, kv_dtype default to their query-side twin, layout to the operator's own, page_size to 16
    where there are pages. `aligned`: every base pointer and stride is a multiple of 16 bytes. Of the op attention,
    attn_mask: what its mask tensor holds; mask_aligned: its rows are multiples of 16 bytes; anchored: lengths do
    not tell positions, so that only a kernel that is told them will do. Sizes only rank kernels:
    batch sequences, tokens query tokens in all, max_q / max_k bounds of one sequence (None = known to the device only).
    Raises InvalidArgument naming the field.
    """

    op: Op | str
    dtype: DType | str
    head_dim: int
    kv_dtype: DType | str = ""
    head_dim_v: int = 0
    num_heads: int = 1
    num_kv_heads: int = 0
    causal: bool = True
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    layout: Layout | str = ""
    page_size: int | None = None
    aligned: bool = True
    attn_mask: TensorMask | str = TensorMask.NONE
    mask_aligned: bool = True
    anchored: bool = False
    batch: int = 1
    tokens: int = 1
    max_q: int | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        self._put("op", word(Op, "op", self.op))
        self._put("dtype", word(DType, "dtype", self.dtype))
        self._put("kv_dtype", word(DType, "kv_dtype", self.kv_dtype or self.dtype))
        self._put("attn_mask", word(TensorMask, "attn_mask", self.attn_mask))
        self._put("layout", word(Layout, "layout", self.layout or self._own_layout))
        for flag in ("causal", "window", "softcap", "sinks", "aligned", "mask_aligned", "anchored"):
            if not isinstance(getattr(self, flag), bool):
                raise InvalidArgument(flag, "must be a bool", repr(getattr(self, flag)))
        self._natural("head_dim", 1)
        self._natural("num_heads", 1)
        for field, twin in (("head_dim_v", "head_dim"), ("num_kv_heads", "num_heads")):
            self._natural(field, 0)
            self._put(field, getattr(self, field) or getattr(self, twin))
        for field in ("batch", "tokens"):
            self._natural(field, 0)
        for field in ("max_q", "max_k"):
            if getattr(self, field) is not None:
                self._natural(field, 0)
        self._check_relations()

    def _put(self, field: str, value: Word | int | None) -> None:
        object.__setattr__(self, field, value)

    def _natural(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidArgument(field, f"must be an integer >= {least}", repr(value))

    def _check_relations(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgument(
                "num_heads", f"must be a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads
            )
        if self.kernel_op is KernelOp.ATTN and self.layout is not self._own_layout:
            raise InvalidArgument("layout", f"{self.op} reads the layout {self._own_layout}", str(self.layout))
        if self.mask is Mask.TENSOR and self.op is not Op.ATTENTION:
            field = "anchored" if self.anchored else "attn_mask"
            raise InvalidArgument(field, "belongs to the operator attention", f"op = {self.op}")
        if self.layout is Layout.GATHER:
            if self.page_size is None:
                self._put("page_size", DEFAULT_PAGE_SIZE)
            self._natural("page_size", 1)
        elif self.page_size is not None:
            raise InvalidArgument("page_size", f"{self.op} has no pages, leave it out", self.page_size)

    @property
    def _own_layout(self) -> Layout:
        """How the operator finds K and V."""
        return Layout.DENSE if self.mask is Mask.TENSOR else _LAYOUT[self.op]

    @property
    def kernel_op(self) -> KernelOp:
        """What a kernel has to compute for this operator."""
        return _KERNEL_OP[self.op]

    @property
    def mask(self) -> Mask:
        """The mask a kernel has to apply; a window is causal whatever `causal` says."""
        if self.anchored or self.attn_mask is not TensorMask.NONE:
            return Mask.TENSOR
        if self.window:
            return Mask.WINDOW
        return Mask.CAUSAL if self.causal else Mask.FULL

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def facts(self) -> tuple[object, ...]:
        """Everything that decides eligibility, hashable: the key that a cache of selections uses."""
        return (
            self.op,
            self.dtype,
            self.kv_dtype,
            self.head_dim,
            self.head_dim_v,
            self.num_heads,
            self.num_kv_heads,
            self.mask,
            self.softcap,
            self.sinks,
            self.layout,
            self.page_size,
            self.aligned,
            self.attn_mask,
            self.mask_aligned,
        )

    def __str__(self) -> str:
        words = [f"{self.op} {self.dtype} kv {self.kv_dtype}, head size {self.head_dim}/{self.head_dim_v}"]
        words.append(f"heads {self.num_heads}/{self.num_kv_heads}, {self.layout}, mask {self.mask}")
        if self.page_size is not None:
            words.append(f"page size {self.page_size}")
        words += [flag for flag in ("softcap", "sinks") if getattr(self, flag)]
        if self.attn_mask is not TensorMask.NONE:
            words.append(f"mask tensor {self.attn_mask}" + ("" if self.mask_aligned else " (unaligned)"))
        if not self.aligned:
            words.append("not 16-byte aligned")
        return ", ".join(words)
