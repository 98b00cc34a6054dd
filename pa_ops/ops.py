"""Turns the operators into torch.ops.pa_ops.*, for CPU, CUDA and meta tensors.

CUDA tensors are served by Python until a product is loaded, then by its kernels (`pa_ops.native`), but for `attention`,
whose own part stays Python. PyTorch replaces no kernel without a word, but prefers one for CUDA to one for whatever has
none, so that is what Python's is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from pa_ops import cuda, native
from pa_ops.calls import REFERENCE_DECISIONS, REFERENCES
from pa_ops.checked import check_values
from pa_ops.checks import Sizes, validate
from pa_ops.environment import settings
from pa_ops.errors import InvalidArgument
from pa_ops.overrides import REFERENCE, policy
from pa_ops.padding import padded_results
from pa_ops.schema import NAMESPACE, SCHEMAS, base_of, signature, writes_buffers
from pa_ops.selection import AUTO
from pa_ops.trace import record

Arguments = dict[str, Any]


def _on_cpu(op: str) -> Callable[..., Any]:
    """The CPU kernel of an operator: the reference, behind the checks that every backend shares."""
    function = REFERENCES[base_of(op)]

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(op).bind(args, kwargs)
        validate(op, arguments)
        if "backend" in arguments:
            _require_reference(arguments.pop("backend"))
        if settings().checked:
            check_values(op, arguments)
        results = function(**arguments)
        record(settings(), REFERENCE_DECISIONS[op])
        return None if writes_buffers(op) else results

    return run


def _require_reference(backend: str) -> None:
    """CPU tensors know no kernel family: a choice of one is refused, and never dropped."""
    chosen = policy(backend)
    if chosen.backend not in (AUTO, REFERENCE):
        rule = f"CPU tensors are served by {REFERENCE!r} only, so it must be {REFERENCE!r} or {AUTO!r}"
        raise InvalidArgument("backend", rule, f"{chosen.backend!r} (set by {chosen.backend_source})")


def _on_others(op: str) -> Callable[..., Any]:
    """The first calls of an operator on CUDA tensors, or all where PyTorch lacks what kernels need."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device
        if device.type not in ("cpu", "cuda"):
            raise InvalidArgument(signature(op).names[0], "must be on the CPU or on a CUDA device", device)
        results = cuda.IMPLEMENTATIONS[op](*args, **kwargs)
        native.attach(device.index, cuda.IMPLEMENTATIONS)
        return results

    return run


def _on_meta(op: str) -> Callable[..., Any]:
    """The shapes and dtypes of an operator's results, behind the same checks of shapes, dtypes and scalars."""
    results = _RESULTS[SCHEMAS[op].rpartition(" -> ")[2]]

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = signature(op).bind(args, kwargs)
        sizes = validate(op, arguments)
        return results(arguments, sizes)

    return run


def _out(arguments: Arguments, sizes: Sizes) -> Tensor:
    query: Tensor = arguments["query"]
    return query.new_empty((sizes["T"], sizes["Hq"] * sizes["D"]))


def _out_and_lse(arguments: Arguments, sizes: Sizes) -> tuple[Tensor, Tensor]:
    first: Tensor = arguments["q"] if "q" in arguments else arguments["out_a"]
    out = first.new_empty((sizes["T"], sizes["Hq"], sizes["Dv"]))
    return out, first.new_empty((sizes["Hq"], sizes["T"]), dtype=torch.float32)


_RESULTS: dict[str, Callable[[Arguments, Sizes], Any]] = {
    "()": lambda arguments, sizes: None,
    "Tensor out": _out,
    "(Tensor out, Tensor lse)": _out_and_lse,
    "(Tensor out, Tensor present_key, Tensor present_value, Tensor lse)": padded_results,
}
"""The results of a schema -> new tensors of their shapes and dtypes."""


def _register() -> torch.library.Library:
    library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    for op, schema in SCHEMAS.items():
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, _on_cpu(op), "CPU")
        library.impl(op, _on_others(op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", _on_meta(op), lib=library)
    return cast(torch.library.Library, library)


_LIBRARY = _register()  # the operators live as long as this object does
OPERATORS: Any = getattr(torch.ops, NAMESPACE)
"""torch.ops.pa_ops, everything in it registered."""
