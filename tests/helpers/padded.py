"""Padded batches for the operator attention: tensors and options of a call, its check, and SDPA as an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import pa_ops
from helpers.parity import Evidence, error_of
from pa_ops import reference
from pa_ops.padding import BNSH, LAYOUTS

MASKS = ("none", "bool", "additive", "fp32")
LENGTHS = (1, 2, 5, 17, 64, 130, 200)


@dataclass(frozen=True)
class Padded:
    """A batch: sizes, order of axes, how keys are hidden. mask_axes: which of B, Hq, Sq, total the mask really has,
    the leading ones left out where `rank` is below 4."""

    queries: int
    keys: int
    past: int = 0
    batch: int = 2
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: torch.dtype = torch.float16
    layout: str = BNSH
    mask: str = "none"
    mask_axes: tuple[bool, bool, bool, bool] = (True, True, True, True)
    rank: int = 4
    nonpad: tuple[int, ...] | None = None
    poison: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def total(self) -> int:
        """Past and new keys."""
        return self.past + self.keys

    def call(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The arguments, by name. poison: keys behind nonpad are NaN."""
        order, width = LAYOUTS[self.layout], self.head_dim_v or self.head_dim
        generator = torch.Generator().manual_seed(self.seed)

        def rows(tokens: int, heads: int, dim: int, axes: str) -> Tensor:
            shape = (self.batch, heads, tokens, dim) if axes == BNSH else (self.batch, tokens, heads, dim)
            return torch.randn(shape, generator=generator).to(self.dtype)

        made: dict[str, Any] = {"q": rows(self.queries, self.kv_heads * self.group, self.head_dim, order.q)}
        for name, tokens in (("past", self.past), ("new", self.keys)):
            names = ("past_key", "past_value") if name == "past" else ("k", "v")
            if tokens or name == "new":
                for tensor, dim in zip(names, (self.head_dim, width), strict=True):
                    made[tensor] = rows(tokens, self.kv_heads, dim, order.kv)
        if self.nonpad is not None:
            made["nonpad_kv_seqlen"] = torch.tensor(self.nonpad, dtype=torch.int32)
            if self.poison:
                self._poison(made, order.kv)
        if self.mask != "none":
            made["attn_mask"] = self._mask(generator)
        placed = {name: tensor.to(device) for name, tensor in made.items()}
        return {**placed, "layout": self.layout, **self.options}

    def _poison(self, made: dict[str, Any], axes: str) -> None:
        for name in ("k", "v"):
            for b, length in enumerate(self.nonpad or ()):
                rows = made[name][b] if axes != BNSH else made[name][b].transpose(0, 1)
                rows[max(length - self.past, 0) :] = torch.nan

    def _mask(self, generator: torch.Generator) -> Tensor:
        sizes = (self.batch, self.kv_heads * self.group, self.queries, self.total)
        shape = [size if real else 1 for size, real in zip(sizes, self.mask_axes, strict=True)][-self.rank :]
        seen = torch.rand(shape, generator=generator) < 0.7
        if self.mask == "bool":
            return seen
        addends = torch.where(seen, torch.randn(shape, generator=generator), -torch.inf)
        return addends if self.mask == "fp32" else addends.to(self.dtype)


def expected(call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The reference's results in fp32, of the same values."""
    floats = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()}
    floats.pop("backend", None)
    return reference.attention(**floats)


def check(call: dict[str, Any], evidence: Evidence, what: object = "") -> tuple[Tensor, ...]:
    """Runs a call on kernels, compares out and lse with the reference, and present bit by bit; its results."""
    with pa_ops.trace.recording() as made:
        results = pa_ops.attention(**call)
    where = f"attention {what} on {', '.join(one.instance for one in made)}"
    assert made and all(one.family != "reference" for one in made), where
    wanted, dtype = expected(call), call["q"].dtype
    error = error_of(results[0], wanted[0], dtype, f"out of {where}")
    error_of(results[3], wanted[3], dtype, f"lse of {where}")
    if call.get("need_present", True):
        for got, want in zip(results[1:3], wanted[1:3], strict=True):
            assert torch.equal(got.float().nan_to_num(7.0), want.nan_to_num(7.0)), f"present of {where}"
    evidence.add(made, error)
    return results


def sdpa(case: Padded, call: Mapping[str, Any]) -> Tensor:
    """torch's scaled_dot_product_attention in fp32 on the same values: out [B, Hq, Sq, Dv], zeros where no key is seen.

    Masks, positions and lengths become one mask of addends here, by rules of its own.
    """
    order = LAYOUTS[case.layout]

    def heads_first(tensor: Tensor, axes: str) -> Tensor:
        return (tensor if axes == BNSH else tensor.transpose(1, 2)).float()

    q = heads_first(call["q"], order.q)
    parts = [("past_key", "past_value")] * bool(case.past) + [("k", "v")]
    k, v = (torch.cat([heads_first(call[pair[i]], order.kv) for pair in parts], 2) for i in (0, 1))
    seen = torch.ones(case.batch, q.shape[1], case.queries, case.total, dtype=torch.bool, device=q.device)
    if case.nonpad is not None:
        for b, length in enumerate(case.nonpad):
            seen[b, ..., length:] = False
            k[b, :, length:], v[b, :, length:] = 0, 0
    offset, window = (case.total - case.queries if case.past else 0), case.options.get("sliding_window", 0)
    if case.options.get("causal") or window > 0:
        seen = seen.tril(offset)
    if window > 0:
        seen = seen.triu(offset - window + 1)
    addends = torch.zeros(seen.shape, device=q.device)
    if "attn_mask" in call:
        mask = call["attn_mask"]
        addends = addends.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else addends + mask.float()
    addends = addends.masked_fill(~seen, -torch.inf)
    k, v = (tensor.repeat_interleave(case.group, 1) for tensor in (k, v))
    scale = case.options.get("softmax_scale")
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=addends, scale=scale)
    dead = (addends == -torch.inf).all(-1, keepdim=True)
    out = torch.where(dead, 0.0, found)
    return out if order.q == BNSH else out.transpose(1, 2)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], largest: int = 256) -> Padded:
    """Any padded problem that SDPA can be asked, too (it knows no softcap)."""
    tokens = st.sampled_from(LENGTHS)
    queries, keys, past = draw(tokens), draw(tokens), draw(st.sampled_from((0, 0, 1, 31, 100)))
    batch = draw(st.integers(1, 4))
    head_dim = 8 * draw(st.integers(1, largest // 8))
    mask = draw(st.sampled_from(MASKS))
    split = draw(st.integers(0, 4)) == 0
    hidden = draw(st.integers(0, 2)) == 0
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.integers(0, 3)) == 0:
        options["sliding_window"] = draw(st.integers(1, 150))
    if draw(st.booleans()):
        options["softmax_scale"] = draw(st.floats(0.01, 0.5))
    return Padded(
        queries,
        keys,
        past,
        batch,
        kv_heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(st.sampled_from((1, 2, 4, 7))),
        head_dim=head_dim,
        head_dim_v=8 * draw(st.integers(1, largest // 8)) if split else 0,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(tuple(LAYOUTS))),
        mask=mask,
        mask_axes=draw(st.tuples(*[st.booleans()] * 4)),
        rank=draw(st.sampled_from((2, 3, 4))),
        nonpad=tuple(draw(st.lists(st.integers(0, past + keys), min_size=batch, max_size=batch))) if hidden else None,
        poison=hidden,
        options=options,
        seed=draw(st.integers(0, 1 << 20)),
    )
