"""Turns padded batches, their masks and pasts into outputs in plain fp32 PyTorch: what the operator attention means."""

from __future__ import annotations

import torch
from torch import Tensor

from pa_ops.padding import LAYOUTS, first_position, handed_over, mask_rows, present_of, turned
from pa_ops.reference_rows import INFINITY, Keys, Scores, attend, dequantise


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    layout: str = "bnsh",
    causal: bool = False,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    need_present: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of padded batches: -> (out, present_key, present_value, lse [B, Hq, Sq] fp32).

    Arguments as in `pa_ops.attention`; the max_seqlen bounds change nothing.
    """
    order = LAYOUTS[layout]
    present_key, present_value = (present_of(new, past, order.kv) for new, past in ((k, past_key), (v, past_value)))
    queries, keys, values = turned(q, order.q), turned(present_key, order.kv), turned(present_value, order.kv)
    batch, length, heads, dim = queries.shape
    total = keys.shape[1]
    scores = Scores(dim**-0.5 if softmax_scale is None else softmax_scale, causal, sliding_window, softcap, sinks)
    visible = [total] * batch if nonpad_kv_seqlen is None else nonpad_kv_seqlen.tolist()
    first = first_position(length, total, past_key is not None)
    out = q.new_zeros(batch, length, heads, values.shape[-1])
    lse = q.new_full((heads, batch, length), -INFINITY, dtype=torch.float32).transpose(0, 1)
    for b in range(batch):
        mapped = torch.arange(total, device=q.device) < visible[b]
        found = Keys(dequantise(keys[b], k_scale), dequantise(values[b], v_scale), mapped)
        mask = None if attn_mask is None else mask_rows(attn_mask, batch, heads, length, total)[b]
        attend(queries[b], found, range(length), first, scores, out[b], lse[b], mask)
    return turned(out, order.q), *handed_over(present_key, present_value, past_key, need_present), lse
