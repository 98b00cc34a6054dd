"""Turns the SMs of a device into the grids that share a batch's tiles out: clusters of eight, and pairs on the rest.

Which tiles are whose is found on the device, by templates/device/portions.py; here it is how many grids there are, and
what each is told of the other.
"""

from __future__ import annotations

from typing import NamedTuple

from pa_ops.scratch import PARTS_AN_SM, second_tiles_at, tiles_at
from pa_ops.spec import EIGHT, PAIR

QUARTERS = EIGHT // PAIR


class Portion(NamedTuple):
    """One grid's part of a batch's tiles: `clusters` clusters of `cluster` blocks.

    Where two grids share them out, `at_once` of the first one's tiles run at a time in both together, and every
    `every`-th of those is the second's, which takes it by quarters; 0: there is one grid. The second's states of parts
    of tiles begin at `first_state`, after the first's.
    """

    cluster: int
    clusters: int
    at_once: int
    every: int = 0
    first_state: int = 0

    @property
    def blocks(self) -> int:
        """Those of the grid."""
        return self.cluster * self.clusters

    @property
    def second(self) -> bool:
        """Whether the other grid comes before this one."""
        return self.first_state > 0

    def fields(self) -> dict[str, int]:
        """What the record tells the grid of it."""
        return {
            "at_once": self.at_once,
            "every": self.every,
            "unit_bits": QUARTERS.bit_length() - 1 if self.second else 0,
            "first_state": self.first_state,
        }

    def tickets_at(self, num_sms: int) -> int:
        """Where the grid's counter of tiles lies in the workspace, in bytes."""
        return second_tiles_at(num_sms) if self.second else tiles_at(num_sms)


def whole(num_sms: int, cluster: int = 1) -> Portion:
    """All tiles, for clusters of so many blocks on every SM that there are enough of."""
    return Portion(cluster, num_sms // cluster, num_sms // cluster)


def shared_out(num_sms: int, eights: int) -> tuple[Portion, ...]:
    """The portions where a device holds so many clusters of eight at a time, and pairs on its other SMs.

    Eight blocks take as long for a tile as two for a quarter of it, so a share of the tiles is one of the SMs.
    """
    pairs = (num_sms - eights * EIGHT) // PAIR
    if eights == 0:
        return (whole(num_sms, PAIR),)
    if pairs == 0:
        return (whole(eights * EIGHT, EIGHT),)
    at_once, every = eights + pairs // QUARTERS, max(round(eights * QUARTERS / pairs), 1) + 1
    return (
        Portion(EIGHT, eights, at_once, every),
        Portion(PAIR, pairs, at_once, every, eights * EIGHT * PARTS_AN_SM),
    )
