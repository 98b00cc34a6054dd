"""Turns query rows, keys and values of one sequence into output rows and log-sums, in plain fp32 PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pa_ops.arguments import HIDING

SCORES_PER_CHUNK = 1 << 25  # 128 MiB of fp32 scores at a time
INFINITY = float("inf")


@dataclass(frozen=True)
class Scores:
    """How a product of Q and K becomes a probability: the options shared by the attention operators."""

    scale: float
    causal: bool
    window: int
    softcap: float
    sinks: Tensor | None

    def of(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled, softcapped scores [Hkv, G, n, m] of q [n, Hq, D] and k [m, Hkv, D], both fp32."""
        n, heads, dim = q.shape
        m, kv_heads, _ = k.shape
        grouped = q.reshape(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        scores = (grouped @ k.permute(1, 2, 0)).reshape(kv_heads, heads // kv_heads, n, m) * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap > 0 else scores

    def visible(self, positions: Tensor, mapped: Tensor) -> Tensor:
        """Which keys [n, m] queries at the signed `positions` [n] see; `mapped` [m] says which keys exist."""
        keys = torch.arange(mapped.shape[0], device=mapped.device)
        seen = mapped.expand(positions.shape[0], -1)
        if self.causal or self.window > 0:
            seen = seen & (keys <= positions[:, None])
        if self.window > 0:
            seen = seen & (keys > positions[:, None] - self.window)
        return seen


@dataclass(frozen=True)
class Keys:
    """Keys k [m, Hkv, D] and values v [m, Hkv, Dv] of one sequence in fp32, and which of them exist [m]."""

    k: Tensor
    v: Tensor
    mapped: Tensor


def dequantise(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The fp32 values [..., Hkv, D] that a cache means: stored * scale, scale [1] or [Hkv]."""
    return stored.float() if scale is None else stored.float() * scale.float().reshape(-1, 1)


def attend(
    q: Tensor, keys: Keys, rows: range, first: int, scores: Scores, out: Tensor, lse: Tensor, mask: Tensor | None = None
) -> None:
    """Writes `rows` of q [T, Hq, D], which belong to one sequence, into out [T, Hq, Dv] and lse [Hq, T].

    first: where the first row stands among the keys, signed. mask: a row each, [Hq or 1, rows, keys], bool (True = the
    row sees the key) or addends of the score.
    """
    step = max(1, SCORES_PER_CHUNK // max(1, q.shape[1] * keys.k.shape[0]))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        positions = torch.arange(start - rows.start + first, stop - rows.start + first, device=q.device)
        part_mask = None if mask is None else mask[:, start - rows.start : stop - rows.start]
        part, part_lse = _attend_rows(q[start:stop].float(), keys, positions, scores, part_mask)
        out[start:stop] = part.to(out.dtype)
        lse[:, start:stop] = part_lse


def _attend_rows(
    q: Tensor, keys: Keys, positions: Tensor, scores: Scores, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [n, Hq, Dv] and lse [Hq, n] of query rows q [n, Hq, D] that stand at `positions`."""
    seen, raw = scores.visible(positions, keys.mapped), scores.of(q, keys.k)
    if mask is not None:
        grouped = mask.expand(q.shape[1], -1, -1).reshape(raw.shape)
        seen = seen & (grouped if grouped.dtype == torch.bool else ~(grouped <= HIDING))
        raw = raw if grouped.dtype == torch.bool else raw + grouped.float()
    masked = torch.where(seen, raw, -INFINITY)
    lse = torch.logsumexp(masked, -1)
    if scores.sinks is not None:
        lse = torch.logaddexp(lse, scores.sinks.float().reshape(*lse.shape[:2], 1).expand_as(lse))
    weights = torch.exp(masked - subtractable(lse).unsqueeze(-1))
    mixed = _mix(weights, keys.v, seen)
    return mixed.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


def _mix(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """weights [Hkv, G, n, m] times v [m, Hkv, Dv], where a key that a row does not see adds nothing, NaN included.

    0 * NaN is NaN, so a product cannot mask: keys that hold a NaN or an infinity are left out of it and
    selected in one by one for the rows that do see them. seen: [n, m], or [Hkv, G, n, m].
    """
    wild = ~torch.isfinite(v).flatten(1).all(-1)
    tame = torch.where(wild[:, None, None], 0.0, v)
    mixed = (weights.flatten(1, 2) @ tame.transpose(0, 1)).reshape(*weights.shape[:3], v.shape[-1])
    for key in (wild & seen.flatten(0, -2).any(0)).nonzero().flatten().tolist():
        term = weights[..., key, None] * v[key][:, None, None, :]
        mixed += torch.where(seen[..., key, None], term, 0.0)
    return mixed


def subtractable(lse: Tensor) -> Tensor:
    """A log-sum to subtract: -inf (an empty row) becomes 0, so that exp(-inf - 0) is an exact zero."""
    return torch.where(lse == -INFINITY, 0.0, lse)
