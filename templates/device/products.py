"""The two matrix products of attention for one warp: turns operands into scores, and scores and values into outputs.

Accumulators are register tensors in the order of mma.m16n8k16: 16 x 8 tile after tile, four registers a thread.
"""

from cutlass import Float32

from pa_ops.templates.device.ptx import mma_m16n8k16, pack_pair


def scores(dtype, queries, frag_k, head_dim, m_tiles, n_tiles, acc_s):
    """acc_s = Q K^T; `queries(column)` gives the A operand of each 16 rows at columns [column, column + 16)."""
    zero = Float32(0.0)
    s = [[[zero] * 4 for _ in range(n_tiles)] for _ in range(m_tiles)]
    for column in range(0, head_dim, 16):
        a = queries(column)
        for pair in range(n_tiles // 2):
            b = frag_k.load(pair * 16, column)
            for half in range(2):
                nt = pair * 2 + half
                for mt in range(m_tiles):
                    s[mt][nt] = mma_m16n8k16(dtype, a[mt], b[2 * half : 2 * half + 2], s[mt][nt])
    for mt in range(m_tiles):
        for nt in range(n_tiles):
            for i in range(4):
                acc_s[(mt * n_tiles + nt) * 4 + i] = s[mt][nt][i]


def probabilities(dtype, acc_s, step, m_tiles, n_tiles):
    """The A operands of keys [16 step, 16 step + 16): probabilities rounded to the element type."""
    operands = []
    for mt in range(m_tiles):
        at = (mt * n_tiles + step * 2) * 4
        operands.append([pack_pair(dtype, acc_s[at + 2 * i], acc_s[at + 2 * i + 1]) for i in range(4)])
    return operands


def accumulate_step(dtype, a, frag_v, step, d_tiles, acc_o):
    """acc_o += P V for 16 keys, `a` being P; products that share an operand of V follow one another."""
    for pair in range(d_tiles // 2):
        b = frag_v.load(step * 16, pair * 16, transpose=True)
        for half in range(2):
            for mt in range(len(a)):
                at = (mt * d_tiles + pair * 2 + half) * 4
                c = [acc_o[at + i] for i in range(4)]
                c = mma_m16n8k16(dtype, a[mt], b[2 * half : 2 * half + 2], c)
                for i in range(4):
                    acc_o[at + i] = c[i]


def accumulate(dtype, acc_s, frag_v, m_tiles, n_tiles, d_tiles, acc_o):
    """acc_o += P V, P being acc_s rounded to the element type."""
    for step in range(n_tiles // 2):
        accumulate_step(dtype, probabilities(dtype, acc_s, step, m_tiles, n_tiles), frag_v, step, d_tiles, acc_o)
