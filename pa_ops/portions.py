"""Turns the SMs of a device into the grids that share a batch's tiles out: clusters of four, and pairs on what is left.

Which tiles are whose is found on the device, by templates/device/portions.py; here it is how many grids there are, and
what each is told of the other.
"""

from __future__ import annotations

from typing import NamedTuple

from pa_ops.scratch import PARTS_AN_SM, second_tiles_at, tiles_at
from pa_ops.spec import FOUR, PAIR


class Portion(NamedTuple):
    """One grid's part of a batch's tiles: `clusters` clusters of `cluster` blocks.

    Where two grids share them out, `at_once` of the first one's tiles run at a time in both together, and every
    `every`-th of those is the second's, which takes it by halves; 0: there is one grid. The second's states of parts of
    tiles begin at `first_state`, after the first's.
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
            "halves": int(self.second),
            "first_state": self.first_state,
        }

    def tickets_at(self, num_sms: int) -> int:
        """Where the grid's counter of tiles lies in the workspace, in bytes."""
        return second_tiles_at(num_sms) if self.second else tiles_at(num_sms)


def whole(num_sms: int, cluster: int = 1) -> Portion:
    """All tiles, for clusters of so many blocks on every SM that there are enough of."""
    return Portion(cluster, num_sms // cluster, num_sms // cluster)


def shared_out(num_sms: int, fours: int) -> tuple[Portion, ...]:
    """The portions where a device holds so many clusters of four at a time, and pairs on its other SMs.

    Four blocks take as long for a tile as two for half of it, so a share of the tiles is one of the SMs.
    """
    pairs = (num_sms - fours * FOUR) // PAIR
    if fours == 0:
        return (whole(num_sms, PAIR),)
    if pairs < PAIR:  # less than a tile that runs at a time
        return (whole(fours * FOUR, FOUR),)
    at_once, every = fours + pairs // PAIR, max(round(fours * PAIR / pairs), 1) + 1
    return (
        Portion(FOUR, fours, at_once, every),
        Portion(PAIR, pairs, at_once, every, fours * FOUR * PARTS_AN_SM),
    )
