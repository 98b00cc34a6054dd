"""Turns a code target into whether its grids are chained: launched so that blocks may start before the last grid ends.

From SM 9.0 on every kernel then waits for that end by itself (griddepcontrol), when it has done what need not wait.
What it gains is the start of a grid, 2 to 4 us, beside the end of the one before.
"""

import re

OLDEST_SM = 90


def is_chained(target):
    """The answer for sm_80, sm_90a, compute_75, ...; CUDA C++ asks the same of __CUDA_ARCH__ (memory.cuh)."""
    return int(re.search("[0-9]+", target).group()) >= OLDEST_SM
