"""Turns queries and paged or ragged keys and values into attention, with kernels generated from one declared matrix.

Importing this registers torch.ops.pa_ops.*; the functions below are the same operators, typed and documented.
"""

from __future__ import annotations

from pa_ops import reference, trace
from pa_ops.capability import Capability, Feature
from pa_ops.errors import BuildError, InvalidArgument, NoInstance, PaOpsError
from pa_ops.faults import Fault, take_faults
from pa_ops.functions import (
    append_kv,
    attention,
    gather_kv,
    merge_states,
    paged_attention,
    paged_attention_,
    varlen_attention,
)
from pa_ops.overrides import backend, batch_invariant
from pa_ops.problem import Problem
from pa_ops.selecting import explain, families, select
from pa_ops.selection import Selection

__all__ = [
    "BuildError",
    "Capability",
    "Fault",
    "Feature",
    "InvalidArgument",
    "NoInstance",
    "PaOpsError",
    "Problem",
    "Selection",
    "append_kv",
    "attention",
    "backend",
    "batch_invariant",
    "explain",
    "families",
    "gather_kv",
    "merge_states",
    "paged_attention",
    "paged_attention_",
    "reference",
    "select",
    "take_faults",
    "trace",
    "varlen_attention",
]
