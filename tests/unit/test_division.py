"""How a batch goes to one kernel or two, whatever families selection names for few query rows and for many."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import pytest
from core_rows import declared_rows

from pa_ops import steps
from pa_ops.capability import Capability
from pa_ops.gates import attention_families
from pa_ops.heuristics import SPLITTING, few_rows
from pa_ops.manifest import Entry
from pa_ops.problem import Problem
from pa_ops.registry import Registry
from pa_ops.selection import AUTO, Selection, select_entry
from pa_ops.spec import Family

ROWS = tuple(row for row in declared_rows() if row.target == "sm_90a")
SIZES = ((1, 1), (1, 500), (64, 64), (3, 40), (64, 256), (8, 9000))  # sequences, tokens


class Wilful:
    """A registry whose choice is `few` for few query rows and `many` for more, as recorded times may make it."""

    def __init__(self, few: Family, many: Family) -> None:
        self.few, self.many = few, many

    def serve(self, problem: Problem, backend: str) -> Selection:
        return self.find(problem, backend, self.few if few_rows(problem) else self.many)

    select = serve

    def find(self, problem: Problem, backend: str, family: Family) -> Selection:
        rows: list[Entry] = [row for row in ROWS if row.spec.family is family]
        return select_entry(rows, problem, Capability.of_sm(90))


@pytest.mark.parametrize(("few", "many"), list(product(attention_families(), repeat=2)))
def test_A2_a_batch_is_divided_between_a_splitting_family_and_another_alone(few: Family, many: Family) -> None:
    registry = cast(Registry, Wilful(few, many))
    for batch, tokens in SIZES:
        problem = Problem(
            op="paged_attention", dtype="fp16", head_dim=64, num_heads=8, num_kv_heads=2, page_size=16,
            batch=batch, tokens=tokens,
        )  # fmt: skip
        options: dict[str, Any] = {"backend": AUTO}
        first, second = steps._division(problem, options, registry)
        assert first is not None or second is not None, "somebody serves it"
        assert first is None or first.family in SPLITTING
        assert second is None or (second.family not in SPLITTING and second.family in steps.LAUNCHES)
        names = {chosen.family for chosen in (first, second) if chosen is not None}
        assert names <= {few, many}
        if len(names) == 2:
            assert (first is not None and first.family, second is not None and second.family) == (few, many)
