"""Turns the declared matrix into the rows that the selection and coverage tests ask questions of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pa_ops.capability import Capability
from pa_ops.generator import matrix
from pa_ops.generator.targets import DECLARED_TARGETS
from pa_ops.manifest import Entry
from pa_ops.spec import InstanceSpec

ROOT = Path(__file__).resolve().parent.parent


@cache
def declared_pairs() -> tuple[tuple[InstanceSpec, str], ...]:
    """Every kernel of a full build with each target that it is made for."""
    pairs = ((spec, target) for spec in matrix.declared() for target in DECLARED_TARGETS)
    return tuple((spec, target) for spec, target in pairs if matrix.refusal(spec, target) is None)


@cache
def declared_rows() -> tuple[Entry, ...]:
    """A row for each of them."""
    return tuple(Entry.declared(spec, target) for spec, target in declared_pairs())


@cache
def loaded_by(sm: int) -> tuple[Entry, ...]:
    """The rows whose code a device of that SM loads: a tenth of them, and all that it could choose."""
    capability = Capability.of_sm(sm)
    return tuple(row for row in declared_rows() if capability.loads(row.code_targets))
