"""Turns an eligible row and the sizes of a problem into a cost; the cheapest row runs.

Sizes order rows here and nowhere else, and never remove one.
"""

from __future__ import annotations

from pa_ops.capability import Capability
from pa_ops.manifest import Entry
from pa_ops.problem import Problem

# Query rows whose mathematics takes as long as bringing one K/V tile in: what a small tile saves in padding it pays
# again in loads. An estimate; it ranks tiles of one head size, and today each head size has one tile.
LOAD_ROWS = 64

Cost = tuple[int, int, int, int, str]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def query_rows(problem: Problem) -> int:
    """New tokens of the longest sequence as far as the host knows: its bound, else the mean."""
    if problem.max_q is not None:
        return problem.max_q
    return _ceil_div(problem.tokens, max(problem.batch, 1))


def cost(entry: Entry, problem: Problem, capability: Capability) -> Cost:
    """A total order on rows: padded head sizes, then the work of the busiest SM, then how native the code is.

    Padding comes first because it costs shared memory and registers as well as work. The name decides what is left,
    so that the order of the rows carries no meaning.
    """
    spec = entry.spec
    tile_m = max(spec.tile.m, 1)
    blocks = problem.batch * problem.num_heads * _ceil_div(query_rows(problem), tile_m)
    slots = _ceil_div(blocks, capability.num_sms) * (tile_m + LOAD_ROWS)
    ranks = [capability.targets.index(target) for target in entry.code_targets if target in capability.targets]
    native = min(ranks, default=len(capability.targets))
    return (spec.head_dim + spec.head_dim_v, slots, native, entry.smem_bytes, entry.name)
