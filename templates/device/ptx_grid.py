"""One Python function per PTX instruction about grids, and where a block of one runs: see ptx.py."""

from cutlass import Int32
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.ptx import _asm


@dsl_user_op
def own_sm(*, loc=None, ip=None):
    """The number of the SM that the block runs on."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %smid;", "=r", False, loc, ip))


@dsl_user_op
def wait_for_grid(chained, *, loc=None, ip=None):
    """Nothing after this happens before the grid that was launched before this one has ended.

    Where `chained`: a launch then lets the blocks of a grid start while those before it still run.
    """
    if chained:
        _asm(None, [], "griddepcontrol.wait;", "~{memory}", True, loc, ip)


@dsl_user_op
def start_next_grid(chained, *, loc=None, ip=None):
    """Blocks of the next grid may start, and wait there, once all of this one's have come here or ended."""
    if chained:
        _asm(None, [], "griddepcontrol.launch_dependents;", "~{memory}", True, loc, ip)
