"""FlashAttention forward for SM90: turns a batch's queries and the keys they see into output rows and LSE.

Warp-specialised and persistent: one warp lists the block's tiles, two keep the copy engine busy, two or three
warpgroups compute. A warpgroup starts Q K^T of a block of keys and, behind it, P V of the block before, whose time the
maxima then have; the groups take turns, so that one's exponentials hide under the others' products. Outputs go from
registers to memory, so that the next tile's queries and keys arrive meanwhile.
The scheme is FlashAttention-3's (Shah et al., arXiv 2407.08608); work list, pages, masks and epilogue are this
project's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from pa_ops.templates.device import softmax, tma, trust
from pa_ops.templates.device.again import Again
from pa_ops.templates.device.cluster import Cluster
from pa_ops.templates.device.copier import Copier
from pa_ops.templates.device.group_store import GroupStore
from pa_ops.templates.device.hiding import WINDOW_OFF, Hiding
from pa_ops.templates.device.lister import Lister
from pa_ops.templates.device.mask_words import MaskWords
from pa_ops.templates.device.part_states import PartStates
from pa_ops.templates.device.portions import Portions
from pa_ops.templates.device.ptx import ld_shared_32, ld_shared_32_where, opaque, st_shared_32, st_shared_128
from pa_ops.templates.device.ptx_grid import start_next_grid, wait_for_grid
from pa_ops.templates.device.shared_sm90 import (
    AGAIN,
    BARRIER,
    END,
    GROUP_WARPS,
    HEAD,
    KEYS,
    LIVE,
    POSITION,
    SEQUENCE,
    SLOT,
    SLOTS,
    STEPS,
    TURN,
    Shared,
    columns_of,
)
from pa_ops.templates.device.sight import OwnRows, Sight, WholeTile
from pa_ops.templates.device.turns import Turns
from pa_ops.templates.device.warpgroup import GROUP_ROWS, GROUP_THREADS, Products, row_of

TAILS = 8  # the first of the named barriers at which one has cleared the tail of a tile
REGISTERS = {2: (232, 40), 3: (160, 32)}  # of a computing and of a copying thread, by computing warpgroups


class FlashSm90:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(
        self,
        dtype,
        head_dim,
        head_dim_v,
        paged,
        causal,
        window,
        masked,
        rows,
        keys,
        stages,
        blocks,
        skipping,
        alone_skipping,
        shared_out,
        chained,
    ):
        self.dtype, self.head_dim, self.head_dim_v = dtype, head_dim, head_dim_v
        self.paged, self.chained = paged, chained
        self.causal, self.window, self.masked = causal, window, masked
        self.rows, self.keys, self.stages = rows, keys, stages
        self.groups = rows // GROUP_ROWS
        self.threads = (self.groups + 1) * GROUP_THREADS
        self.n_tiles, self.d_tiles = keys // 8, head_dim_v // 8
        self.products = Products(dtype, head_dim, head_dim_v, self.groups, keys)
        self.cluster = Cluster(blocks)
        self.trusts = trust.is_safe(dtype) and not masked
        tiles = rows * head_dim * 2, keys * head_dim * 2, keys * head_dim_v * 2
        self.shared = Shared(*tiles, stages, self.groups, blocks, self.trusts)
        self.again = Again(self.shared, self.cluster, self.trusts)
        # At 256 the products are three quarters of the work: waiting for turns costs 4%, but keeps two blocks in step.
        self.turns = Turns(self.groups, taken=head_dim <= 192 or blocks > 1)
        sight = Sight(causal, window, masked, keys, self.trusts)
        # Whose maxima are found is seen in the bits: of blocks that share keys it is as of one by itself.
        whole = self.trusts and not alone_skipping
        self.walk = OwnRows(self.shared, sight, self.turns, self.cluster, whole) if skipping else WholeTile()
        portions = Portions(self.cluster, taken=shared_out)
        self.lister = Lister(
            self.shared, self.cluster, portions, sight, self.again, head_dim, head_dim_v, paged, rows, chained
        )
        self.copier = Copier(self.shared, self.cluster, self.again, head_dim, head_dim_v, paged, masked, keys)
        self.hiding = Hiding(causal, window, masked, keys)
        self.mask_words = MaskWords(dtype, keys)
        self.part_states = PartStates(self.d_tiles, self.shared.warps, taken=not masked)
        self.row_store = GroupStore(dtype, self.d_tiles, masked)
        self.smem_bytes = self.shared.bytes

    @cute.jit
    def __call__(self, args):
        maps = [tma.map_argument() for _ in range(3)]
        self.kernel(args, *maps).launch(
            grid=[self.cluster.blocks, 1, 1],
            cluster=self.cluster.shape(),
            block=[self.threads, 1, 1],
            smem=self.smem_bytes,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, args, q_map: cute.CopyAtom, k_map: cute.CopyAtom, v_map: cute.CopyAtom):
        pointer = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        smem = Int32(pointer.toint())
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if tid == 0:
            for barrier, arrivals in self.shared.barriers():
                tma.init_barrier(smem + barrier, arrivals)
            for number in range(SLOTS):
                st_shared_32(smem + self.shared.lost + number * 4, Int32(0))
            tma.publish_barriers()
        if args.beside == 0:  # else the grid before this one has waited for what this one reads
            wait_for_grid(self.chained)
        start_next_grid(self.chained)
        self.cluster.meet()
        computing, copying = REGISTERS[self.groups]
        if warp < GROUP_WARPS:
            cute.arch.setmaxregister_decrease(copying)
            if warp == 0:
                self.copier.run(args, smem, self.copier.k_ring, tma.map_address(k_map))
            elif warp == 1:
                self.copier.run(args, smem, self.copier.v_ring, tma.map_address(v_map))
            elif warp == 2:
                self.lister.run(args, smem, tma.map_address(q_map))
        else:
            cute.arch.setmaxregister_increase(computing)
            self.compute(args, pointer, smem, warp)
        self.cluster.leave()

    @cute.jit
    def compute(self, args, pointer, smem: Int32, warp: Int32):
        """A computing warpgroup: its 64 rows of each of the block's tiles.

        What a tile is stays in its slot and is read again where it is needed: registers are scarce.
        """
        lane = cute.arch.lane_idx()
        group = warp // GROUP_WARPS - 1
        self.turns.begin(group)
        turn, stage, parity = Int32(0), Int32(0), Int32(0)
        tma.wait_for(smem + self.shared.slot_full, 0)
        slot = smem + self.shared.slots
        while ld_shared_32(slot) != 0:
            acc_o, row_max, row_sum = softmax.fresh_state(1, self.d_tiles)
            self.silence(slot, row_max, warp * 32 + lane)
            unseen = self.walk.unseen(args, slot, group)
            stage, parity = self.walk.give_back(smem, slot, group, unseen, stage, parity)
            tma.wait_for(smem + self.shared.q_full + group * BARRIER, turn & 1)
            if ld_shared_32(slot + STEPS) > unseen:
                stage, parity = self.attend(
                    args, pointer, smem, slot, group, unseen, stage, parity, acc_o, row_max, row_sum
                )
            else:
                tma.release(smem + self.shared.q_empty + group * BARRIER)
            thread, _, _ = cute.arch.thread_idx()  # not `warp` and `lane`, of which 256 columns leave room for one
            if self.again.settle(smem, slot, acc_o, row_max, row_sum) != 0:
                self.give(args, slot, acc_o, row_max, row_sum, thread)
            if cutlass.const_expr(self.head_dim > 192):  # no register is left to keep it in
                turn = ld_shared_32(slot + TURN)
            self.again.leave(smem, turn)
            turn = turn + 1
            tma.wait_for(smem + self.shared.slot_full + turn % SLOTS * BARRIER, turn // SLOTS & 1)
            slot = smem + self.shared.slots + turn % SLOTS * SLOT

    @cute.jit
    def give(self, args, slot: Int32, acc_o, row_max, row_sum, thread: Int32):
        """Give a warp's state away: to the other parts of its tile, or to memory."""
        if self.part_states.join(args, slot, acc_o, row_max, row_sum, thread) != 0:
            self.row_store.store(args, slot, acc_o, row_max, row_sum, thread)

    def silence(self, slot, row_max, thread):
        """Rows past the tile's last hold another sequence's queries, or NaN. No score outgrows +inf: they have no say
        in when the others' outputs are scaled, and so none in their bits."""
        live = ld_shared_32(slot + LIVE)
        for r in range(2):
            there = row_of(thread) + r * 8 < live
            row_max[r] = Float32(cutlass.select_(there, Float32(-Float32.inf), Float32(Float32.inf)))

    @cute.jit
    def attend(
        self,
        args,
        pointer,
        smem: Int32,
        slot: Int32,
        group: Int32,
        unseen,
        stage: Int32,
        parity: Int32,
        acc_o,
        row_max,
        row_sum,
    ):
        """Outputs, maxima and sums of the group's rows over the blocks of keys in `slot`, a tile's or a part's, but for
        those that it leaves out; the stage that follows."""
        s_q = self.products.tile(pointer, self.rows, self.head_dim)
        s_k = self.products.tile(pointer + self.shared.k, self.keys, self.head_dim, self.stages)
        s_v = self.products.tile(pointer + self.shared.v, self.keys, self.head_dim_v, self.stages)
        acc_s = cute.make_rmem_tensor((self.n_tiles * 4,), Float32)
        factors = cute.make_rmem_tensor((2,), Float32)
        limits = cute.make_rmem_tensor((2,), Int32)
        probabilities = self.products.probabilities()
        words = self.mask_words.registers() if self.masked else None

        steps = ld_shared_32(slot + STEPS)
        edges, inner = self.walk.edges(args, slot, group)
        if cutlass.const_expr(self.trusts):
            edges = Int32(cutlass.select_(ld_shared_32(slot + AGAIN) != 0, steps, edges))
        tma.wait_for(smem + self.shared.k_full + stage * BARRIER, parity)
        self.products.start_scores(s_q, s_k, stage, group, acc_s)
        if cutlass.const_expr(self.masked):
            self.load_mask(args, slot, Int32(unseen), words)
        warpgroup.wait_group(0)
        hole = self.take_holes(smem, stage)
        self.cluster.release(smem + self.shared.k_empty + stage * BARRIER)
        self.treat(args, acc_s, slot, Int32(unseen), edges, inner, hole, words)
        softmax.start(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
        limits[0], limits[1] = softmax.limits_of(row_max, self.unit(args))
        self.products.round(acc_s, probabilities)
        self.clear_tail(smem, slot, Int32(unseen), stage, parity, group)

        for i in cutlass.range(unseen + 1, steps, unroll=1):
            last, last_parity = stage, parity
            stage, parity = self.shared.after(stage, parity)
            tma.wait_for(smem + self.shared.k_full + stage * BARRIER, parity)
            self.turns.take(group)
            self.products.start_scores(s_q, s_k, stage, group, acc_s)
            tma.wait_for(smem + self.shared.v_full + last * BARRIER, last_parity)
            self.products.start_outputs(probabilities, s_v, last, group, acc_o)
            self.turns.give(group)
            if cutlass.const_expr(self.masked):
                self.load_mask(args, slot, i, words)
            warpgroup.wait_group(1)
            hole = self.take_holes(smem, stage)
            self.cluster.release(smem + self.shared.k_empty + stage * BARRIER)
            outgrown = self.examine(args, acc_s, slot, i, edges, inner, hole, words, limits, row_max)
            if cutlass.const_expr(self.trusts):
                for _ in cutlass.range(opaque(outgrown != 0), unroll=1):
                    warpgroup.wait_group(0)
                    raised = softmax.raise_maxima(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
                    softmax.scale_rows(acc_o, raised, self.d_tiles)
                # The products of the block before run meanwhile, for without maxima nothing else is left to hide them.
                softmax.exponentiate(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
                softmax.done(row_sum)
                warpgroup.wait_group(0)
                self.cluster.release(smem + self.shared.v_empty + last * BARRIER)
            else:
                for _ in cutlass.range(opaque(outgrown != 0), unroll=1):
                    raised = softmax.raise_maxima(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
                    factors[0], factors[1] = raised
                    limits[0], limits[1] = softmax.limits_of(row_max, self.unit(args))
                # Before the exponentials, under which the next products of the other groups run: so they are rounded
                # one by one as they come, where the registers of the last ones are free.
                warpgroup.wait_group(0)
                self.cluster.release(smem + self.shared.v_empty + last * BARRIER)
                for _ in cutlass.range(opaque(outgrown != 0), unroll=1):
                    softmax.scale_rows(acc_o, [factors[0], factors[1]], self.d_tiles)
                softmax.exponentiate(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
            self.products.round(acc_s, probabilities)

        # While the last block's values are still to be multiplied.
        tma.release(smem + self.shared.q_empty + group * BARRIER)
        tma.wait_for(smem + self.shared.v_full + stage * BARRIER, parity)
        if cutlass.const_expr(self.window or self.masked):
            key_first = (ld_shared_32(slot + END) - steps) * self.keys
            window = args.window
            if cutlass.const_expr(self.masked):
                window = Int32(cutlass.select_(window > 0, window, Int32(WINDOW_OFF)))
            self.clear(smem, stage, Int32(0), ld_shared_32(slot + POSITION) - window + 1 - key_first, group)
        self.products.start_outputs(probabilities, s_v, stage, group, acc_o)
        warpgroup.wait_group(0)
        self.cluster.release(smem + self.shared.v_empty + stage * BARRIER)
        return self.shared.after(stage, parity)

    @cute.jit
    def take_holes(self, smem: Int32, stage: Int32):
        """A bit for each box of the stage's keys that has no page: read by the lane that will give the stage back to
        this block, so that who writes the next word can be seen to come after (racecheck asks for that)."""
        hole = Int32(0)
        if cutlass.const_expr(self.paged):
            reader = cute.arch.lane_idx() == self.cluster.mate()
            hole = ld_shared_32_where(smem + self.shared.holes + stage * 4, reader)
            hole = cute.arch.warp_redux_sync(hole, "or")
        return hole

    @cute.jit
    def clear_tail(self, smem: Int32, slot: Int32, i: Int32, stage: Int32, parity: Int32, group: Int32):
        """Zero the values past the last key in block `i`, which come to `stage`."""
        tail = ld_shared_32(slot + KEYS) - (ld_shared_32(slot + END) - 1 - i) * self.keys
        if tail < self.keys:
            tma.wait_for(smem + self.shared.v_full + stage * BARRIER, parity)
            self.clear(smem, stage, tail, Int32(self.keys), group)

    @cute.jit
    def clear(self, smem: Int32, stage: Int32, begin: Int32, stop: Int32, group: Int32):
        """Zero the values of rows [begin, stop) of a stage: whatever lies there, nothing times it is to be nothing.

        Keys past the last and before the window are loaded with their page or block. Each group clears them for
        itself, so that none waits for another.
        """
        thread = cute.arch.thread_idx()[0] % GROUP_THREADS
        if begin < stop:
            base = smem + self.shared.v + stage * self.shared.v_bytes
            columns = columns_of(self.head_dim_v)
            chunks = columns // 8  # of 16 bytes
            for column in cutlass.range_constexpr(0, self.head_dim_v, columns):
                for chunk in cutlass.range(begin * chunks + thread, stop * chunks, GROUP_THREADS, unroll=1):
                    st_shared_128(base + self.keys * column * 2 + chunk * 16, [Int32(0)] * 4)
            tma.fence_async()
            cute.arch.barrier(barrier_id=TAILS + group, number_of_threads=GROUP_THREADS)

    @cute.jit
    def examine(
        self, args, acc_s, slot: Int32, i: Int32, edges: Int32, inner: Int32, hole: Int32, words, limits, row_max
    ):
        """Treat the scores of block `i`; whether some row outgrew its maximum, which is asked of plain blocks only
        where no maximum is taken on trust (trust.py)."""
        self.treat(args, acc_s, slot, i, edges, inner, hole, words)
        outgrown = Int32(0)
        if cutlass.const_expr(self.trusts):
            careful = self.is_edge(i, edges, inner) | (args.softcap_in > 0.0) | (hole != 0)
            for _ in cutlass.range(opaque(careful), unroll=1):
                here = softmax.limits_of(row_max, self.unit(args))
                outgrown = Int32(softmax.outgrown_beyond(here, acc_s, row_max, args.log2_scale, self.n_tiles))
        else:
            outgrown = Int32(softmax.outgrown_beyond(limits, acc_s, row_max, args.log2_scale, self.n_tiles))
        return outgrown

    def unit(self, args):
        """1 / scale; at 256 no register is left to keep it in."""
        return softmax.unit_anew(args.log2_scale) if self.head_dim > 192 else 1.0 / args.log2_scale

    def is_edge(self, i, edges, inner):
        """Whether some row does not see all keys of block `i`."""
        return (i < edges) | (i >= inner) if self.window or self.masked else i < edges

    @cute.jit
    def treat(self, args, acc_s, slot: Int32, i: Int32, edges: Int32, inner: Int32, hole: Int32, words):
        """Cap the scores of block `i`, and -inf where a row must not see a key; nothing in the middle ones.

        One branch for all of it, taken over code that a block in the middle does not run.
        """
        edge = self.is_edge(i, edges, inner)
        if cutlass.const_expr(self.masked):
            for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
                softmax.cap(acc_s, args.softcap_in)
            self.mask_words.apply(args, acc_s, words)
            for _ in cutlass.range(opaque(edge), unroll=1):
                self.hiding.hide(args, acc_s, slot, i)
        else:
            self.treat_plain(args, acc_s, slot, i, edge, hole)

    @cute.jit
    def treat_plain(self, args, acc_s, slot: Int32, i: Int32, edge, hole: Int32):
        """The same where no mask tensor asks for every block's scores."""
        for turn in cutlass.range(opaque(edge | (args.softcap_in > 0.0) | (hole != 0)), unroll=1):
            # The turn is 0; it keeps the divisions inside the loop.
            if args.softcap_in > 0.0:
                softmax.cap(acc_s, args.softcap_in)
            if edge:
                self.hiding.hide(args, acc_s, slot, i)
            if hole != 0:  # never without pages
                self.hiding.hide_holes(args, acc_s, hole, turn)

    @cute.jit
    def load_mask(self, args, slot: Int32, i: Int32, words):
        """Ask for this thread's words of the mask for block `i`, while its scores are computed."""
        row_first = ld_shared_32(slot + POSITION) - args.position
        base = args.mask + Int64(ld_shared_32(slot + SEQUENCE)) * args.mask_sequence_stride
        base = base + Int64(ld_shared_32(slot + HEAD)) * args.mask_head_stride + Int64(row_first) * args.mask_row_stride
        key_first = (ld_shared_32(slot + END) - 1 - i) * self.keys
        live, k_len = ld_shared_32(slot + LIVE), ld_shared_32(slot + KEYS)
        self.mask_words.load(args, words, row_of(cute.arch.thread_idx()[0]), live, base, key_first, k_len)
