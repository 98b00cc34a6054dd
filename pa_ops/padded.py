"""Turns a call of `attention` on CUDA tensors into one of paged attention, a page a sequence, or into a masked launch.

Keys and values of a padded batch are a pool of pages as they lie: page b holds those of sequence b, whatever the order
of axes, and lengths say how many are seen. So every paged family serves it, those for few query rows included. A mask
tensor, and positions that lengths cannot tell, go to kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pa_ops import reference, scratch
from pa_ops.calls import REFERENCE_DECISIONS, TENSORS, known, launched, plan_of
from pa_ops.checked import check_values
from pa_ops.checks import INT32_MAX, Arguments, Sizes, validate
from pa_ops.environment import Settings, settings
from pa_ops.errors import InvalidArgument, NoInstance
from pa_ops.overrides import REFERENCE, policy, token
from pa_ops.padded_steps import mask_aligned
from pa_ops.padding import LAYOUTS, first_position, handed_over, mask_rows, padding_of, present_of, row_results, turned
from pa_ops.schema import NAMESPACE, signature
from pa_ops.trace import record

OP = "attention"
_SHARED = (
    "softmax_scale",
    "causal",
    "sliding_window",
    "softcap",
    "sinks",
    "k_scale",
    "v_scale",
    "backend",
    "out",
    "lse",
)
_PASTS = (("k", "past_key"), ("v", "past_value"))
_NUMBERS = ("softmax_scale", "causal", "sliding_window", "softcap", "backend", "position")


def attention(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch.ops.pa_ops.attention on CUDA tensors."""
    now, arguments = settings(), signature(OP).bind(tensors, options)
    sizes = validate(OP, arguments)
    if now.checked and not torch.cuda.is_current_stream_capturing():
        check_values(OP, arguments)
    if policy(arguments["backend"]).backend == REFERENCE:
        record(now, REFERENCE_DECISIONS[OP])
        given = {name: value for name, value in arguments.items() if name != "backend"}
        return reference.attention(**given)
    if arguments["q"].dtype is torch.float32:
        raise NoInstance(f"{OP}: no kernel takes float32; CPU tensors, and backend='reference', do")
    if sizes["B"] * sizes["Sq"] > INT32_MAX:
        raise InvalidArgument("q", "B * Sq, the rows of the batch, must fit 32 bits", sizes["B"] * sizes["Sq"])
    order = LAYOUTS[arguments["layout"]]
    key, value = (present_of(arguments[new], arguments[past], order.kv) for new, past in _PASTS)
    out, lse = row_results(arguments["q"], sizes)
    if out.numel() == 0 or sizes["total"] == 0:
        _of_no_keys(out, lse, arguments["sinks"])
    else:
        views = {"q": turned(arguments["q"], order.q), "k": turned(key, order.kv), "v": turned(value, order.kv)}
        _attend({**arguments, **views}, sizes, out, lse, now)
    presents = handed_over(key, value, arguments["past_key"], arguments["need_present"])
    return turned(out, order.q), *presents, lse.transpose(0, 1)


def _of_no_keys(out: Tensor, lse: Tensor, sinks: Tensor | None) -> None:
    """The results of rows that have no key to see."""
    out.zero_()
    lse.fill_(-torch.inf)
    if sinks is not None:
        lse.copy_(sinks[:, None, None].expand_as(lse))


def _attend(arguments: Arguments, sizes: Sizes, out: Tensor, lse: Tensor, now: Settings) -> None:
    """Fills out [B, Sq, Hq, Dv] and lse [Hq, B, Sq]; q, k and v have tokens before heads.

    A mask that may be a padding one has two launches, and the device decides which of them has rows to do.
    """
    steps = torch.arange(sizes["B"] + 1, dtype=torch.int32, device=out.device)
    ends = steps * sizes["Sq"]
    call = {**arguments, "out": out.flatten(0, 1), "lse": lse.flatten(1, 2)}
    seen, mask = _seen(arguments, sizes), arguments["attn_mask"]
    if seen is None and mask is not None and _may_be_padding(arguments, sizes):
        lengths, is_padding = padding_of(mask, sizes["B"])
        _launch_paged(call, sizes, steps, ends * is_padding, lengths)
        ends = ends * ~is_padding
    if seen is None:
        _launch_masked({**call, "cu_seqlens_q": ends}, sizes, now)
    else:
        _launch_paged(call, sizes, steps, ends, steps.new_full(ends[1:].shape, seen) if isinstance(seen, int) else seen)


def _launch_paged(arguments: Arguments, sizes: Sizes, steps: Tensor, ends: Tensor, lengths: Tensor) -> None:
    """Runs paged attention on pages that are sequences; `steps` counts these, `ends` are prefix sums of their rows."""
    q = arguments["q"]
    getattr(torch.ops, NAMESPACE).paged_attention.out(
        q.reshape(-1, *q.shape[2:]),  # a copy where heads come first: several rows of several sequences
        arguments["k"],
        arguments["v"],
        ends,
        lengths,
        steps[:-1, None],
        max_seqlen_q=sizes["Sq"],
        max_seqlen_k=sizes["total"],
        **{name: arguments[name] for name in _SHARED},
    )


def _may_be_padding(arguments: Arguments, sizes: Sizes) -> bool:
    """Whether the mask is bool and the same for all rows of a sequence, and nothing else hides keys."""
    mask, others = arguments["attn_mask"], (arguments["causal"], arguments["nonpad_kv_seqlen"] is not None)
    alike = all(size == 1 for size in mask.shape[-3:-1]) and mask.shape[-1] == sizes["total"]
    return mask.dtype is torch.bool and alike and not any(others) and arguments["sliding_window"] <= 0


def _seen(arguments: Arguments, sizes: Sizes) -> Tensor | int | None:
    """The keys that each sequence has, where these and positions counted from their end say all that a row sees.

    Without a past row j stands at key j: of more keys than rows the others are seen by none.
    """
    lengths, queries, total = arguments["nonpad_kv_seqlen"], sizes["Sq"], sizes["total"]
    if arguments["attn_mask"] is not None:
        return None
    if not arguments["causal"] and arguments["sliding_window"] <= 0:
        return total if lengths is None else lengths.clamp(0, total).int()
    if lengths is None and (arguments["past_key"] is not None or total >= queries):
        return total if arguments["past_key"] is not None else queries
    return None


def _launch_masked(arguments: Arguments, sizes: Sizes, now: Settings) -> None:
    """Runs the kernel for a mask tensor, by a program that is kept for its kind of call."""
    positional = arguments["causal"] or arguments["sliding_window"] > 0
    past, queries, total = arguments["past_key"] is not None, sizes["Sq"], sizes["total"]
    lengths, mask = arguments["nonpad_kv_seqlen"], arguments["attn_mask"]
    if mask is not None:
        mask = mask_rows(mask, sizes["B"], sizes["Hq"], queries, total)
    views = {
        **arguments,
        "kv_lengths": None if lengths is None else lengths.clamp(0, total).int(),
        "mask": mask.view(torch.uint8) if mask is not None and mask.dtype is torch.bool else mask,
        "position": first_position(queries, total, past) if positional else 0,
        "max_seqlen_q": None,
        "workspace": scratch.workspace_for(arguments["out"]),
    }
    ends = mask is not None and mask_aligned(mask)
    given = tuple(views[name] for name in TENSORS[OP])
    kind = (
        OP,
        *(sizes[name].bit_length() for name in ("B", "Sq")),
        ends,
        *(views[name] for name in _NUMBERS),
        *token(now),
    )
    if not any(launched(plan, given) for plan in known(kind)):
        plan = plan_of(kind, OP, views, sizes, now)
        if not launched(plan, given):
            raise AssertionError(f"{OP}: a program does not fit the call that it was made for")
