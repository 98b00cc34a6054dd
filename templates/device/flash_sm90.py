"""FlashAttention forward for SM90: turns a batch's queries and the keys they see into output rows and LSE.

Warp-specialised and persistent: one warp lists the block's tiles and keeps the copy engine busy, two or three
warpgroups compute. In each, Q K^T of one block of keys runs while the softmax of the block before waits for nothing,
and P V of that block behind it; the groups take turns, so that one's softmax hides under another's products. Outputs
go from registers to memory, so that the next tile's queries and keys arrive meanwhile.
The scheme is FlashAttention-3's (Shah et al., arXiv 2407.08608); work list, pages, masks and epilogue are this
project's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import warpgroup

from pa_ops.templates.device import softmax, tma
from pa_ops.templates.device.ptx import (
    ld_global_i32,
    ld_shared_32,
    opaque,
    st_global_128,
    st_global_f32,
    st_global_i32,
    st_shared_32,
)
from pa_ops.templates.device.warpgroup import COLUMN, GROUP_ROWS, GROUP_THREADS, Products
from pa_ops.templates.device.worklist import find_tile, length_at, paged_keys

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
TURNS = 1  # the first of the named barriers by which warpgroups take turns
TAILS = 8  # the first of those at which one has cleared the tail of a tile
SLOTS = 2  # tiles that the copying warp may be ahead of the computing ones
SLOT_WORDS = 8
TOKEN, LIVE, HEAD, STEPS, END, POSITION, KEYS = range(4, 4 * SLOT_WORDS, 4)  # bytes in a slot, after "there is one"
NEAR_BYTES = 24 << 20  # of keys and values that a section of heads may have: half of an H200's L2 cache
REGISTERS = {2: (240, 24), 3: (160, 32)}  # of a computing and of a copying thread, by computing warpgroups


class FlashSm90:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, paged, causal, window, rows, keys, stages):
        self.dtype, self.head_dim, self.paged = dtype, head_dim, paged
        self.causal, self.window = causal, window
        self.rows, self.keys, self.stages = rows, keys, stages
        self.groups = rows // GROUP_ROWS
        self.threads = (self.groups + 1) * GROUP_THREADS
        self.n_tiles, self.d_tiles = keys // 8, head_dim // 8
        self.halves = head_dim // COLUMN
        self.products = Products(dtype, head_dim, self.groups, keys)
        self.q_bytes = rows * head_dim * 2
        self.kv_bytes = keys * head_dim * 2
        self.k_at = self.q_bytes
        self.v_at = self.k_at + stages * self.kv_bytes
        # Barriers of 8 bytes, full and empty: of Q, of each stage of K and of V, of each slot. Then holes, and slots.
        self.barriers_at = self.v_at + stages * self.kv_bytes
        self.q_full, self.q_empty = self.barriers_at, self.barriers_at + 8
        self.k_full, self.k_empty = self.barriers_at + 16, self.barriers_at + 16 + 8 * stages
        self.v_full, self.v_empty = self.barriers_at + 16 + 16 * stages, self.barriers_at + 16 + 24 * stages
        self.slot_full = self.barriers_at + 16 + 32 * stages
        self.slot_empty = self.slot_full + 8 * SLOTS
        self.holes_at = self.slot_empty + 8 * SLOTS
        self.slots_at = self.holes_at + 4 * stages
        self.smem_bytes = self.slots_at + 4 * SLOT_WORDS * SLOTS
        self.near_keys = NEAR_BYTES // (head_dim * 4)

    @cute.jit
    def __call__(self, args):
        maps = [tma.map_argument() for _ in range(3)]
        self.kernel(args, *maps).launch(
            grid=[1, 1, 1],
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
            for barrier, arrivals in self.barriers():
                tma.init_barrier(smem + barrier, arrivals)
            tma.publish_barriers()
        cute.arch.barrier()
        computing, copying = REGISTERS[self.groups]
        if warp < 4:
            cute.arch.setmaxregister_decrease(copying)
            if warp == 0:
                self.copy(args, smem, tma.map_address(q_map), tma.map_address(k_map), tma.map_address(v_map))
        else:
            cute.arch.setmaxregister_increase(computing)
            self.compute(args, pointer, smem, warp)

    def barriers(self):
        """(offset, arrivals a phase) of every barrier; a computing warp arrives once."""
        warps = self.groups * 4
        yield from ((self.q_full, 1), (self.q_empty, warps))
        for stage in range(self.stages):
            yield from ((self.k_full + 8 * stage, 1), (self.k_empty + 8 * stage, warps))
            yield from ((self.v_full + 8 * stage, 1), (self.v_empty + 8 * stage, warps))
        for slot in range(SLOTS):
            yield from ((self.slot_full + 8 * slot, 1), (self.slot_empty + 8 * slot, warps))

    @cute.jit
    def tile_at(self, args, rank: Int32):
        """(sequence, first row in it, head) of the tile of that rank; sequence -1 beyond the last one.

        The heads of a sequence go by sections whose keys and values stay in the L2 cache; in a section the last row
        blocks come first, because in a causal sequence they see most keys.
        """
        place = rank // args.heads
        sequence, block = find_tile(args, self.rows, place)
        row_first, head = Int32(0), rank - place * args.heads
        if sequence >= 0:
            _, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
            _, k_len = self.keys_of(args, sequence, q_len)
            tiles = (q_len + (self.rows - 1)) // self.rows
            section = cutlass.min(args.group * cutlass.max(self.near_keys // cutlass.max(k_len, 1), 1), args.heads)
            within = block * args.heads + head
            first = within // (section * tiles) * section
            rest = within - first * tiles
            width = cutlass.min(section, args.heads - first)
            row_first = (tiles - 1 - rest // width) * self.rows
            head = first + rest % width
        elif block * args.heads + head == cute.arch.grid_dim()[0] - 1:
            # Blocks stop at the first rank beyond the last tile, each at one of its own: this is the last block.
            st_global_i32(args.tickets, Int32(0))
        return sequence, row_first, head

    @cute.jit
    def take_ticket(self, args):
        """In lane 0, the rank of the block's next tile: whoever is done first takes the next."""
        ticket = Int32(0)
        if cute.arch.lane_idx() == 0:
            ticket = cute.arch.grid_dim()[0] + tma.take(args.tickets)
        return ticket

    @cute.jit
    def keys_of(self, args, sequence: Int32, queries: Int32):
        """(first key where they are dense, keys) of a sequence."""
        first, count = Int32(0), Int32(0)
        if cutlass.const_expr(self.paged):
            count = paged_keys(args, sequence, queries)
        else:
            first, count = length_at(args.kv_lengths, sequence, args.keys)
        return first, count

    @cute.jit
    def after(self, stage: Int32, parity: Int32):
        """The stage that follows, and the parity of its phase."""
        wraps = stage == self.stages - 1
        return Int32(cutlass.select_(wraps, Int32(0), stage + 1)), parity ^ Int32(cutlass.select_(wraps, 1, 0))

    @cute.jit
    def copy(self, args, smem: Int32, q_map: Int64, k_map: Int64, v_map: Int64):
        """The copying warp: for each of the block's tiles its slot, its queries, its keys and values."""
        lane = cute.arch.lane_idx()
        if lane == 0:
            tma.prefetch_map(q_map)
            tma.prefetch_map(k_map)
            tma.prefetch_map(v_map)
        turn, queries, stage, parity = Int32(0), Int32(0), Int32(0), Int32(0)
        sequence, row_first, head = self.tile_at(args, cute.arch.block_idx()[0])
        while sequence >= 0:
            ticket = self.take_ticket(args)
            q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
            k_start, k_len = self.keys_of(args, sequence, q_len)
            live = cutlass.min(q_len - row_first, self.rows)
            position = k_len - q_len + row_first
            low, high = Int32(0), k_len
            if cutlass.const_expr(self.causal or self.window):
                high = cutlass.max(cutlass.min(k_len, position + live), 0)
            if cutlass.const_expr(self.window):
                low = cutlass.max(position - args.window + 1, 0)
            first, end = low // self.keys, (high + (self.keys - 1)) // self.keys
            steps = cutlass.max(end - first, 0)

            slot = turn % SLOTS
            tma.wait_for(smem + self.slot_empty + slot * 8, (turn // SLOTS + 1) & 1)
            if lane == 0:
                words = smem + self.slots_at + slot * (SLOT_WORDS * 4)
                for i, word in enumerate((Int32(1), q_start + row_first, live, head, steps, end, position, k_len)):
                    st_shared_32(words + i * 4, word)
                tma.arrive_at(smem + self.slot_full + slot * 8)
            cute.arch.sync_warp()
            kv_head = head // args.group
            if steps > 0:
                tma.wait_for(smem + self.q_empty, (queries + 1) & 1)
                if lane == 0:
                    tma.expect(smem + self.q_full, self.q_bytes)
                    for half in range(self.halves):
                        at = smem + half * (self.rows * COLUMN * 2)
                        row = q_start + row_first
                        tma.load_box(at, q_map, smem + self.q_full, Int32(half * COLUMN), row, head, Int32(0))
                cute.arch.sync_warp()
                where = (sequence, k_start, low, high, end, steps, kv_head)
                stage, parity = self.copy_keys(args, smem, k_map, v_map, *where, stage, parity)
                queries = queries + 1
            turn = turn + 1
            sequence, row_first, head = self.tile_at(args, cute.arch.shuffle_sync(ticket, 0))
        slot = turn % SLOTS
        tma.wait_for(smem + self.slot_empty + slot * 8, (turn // SLOTS + 1) & 1)
        if lane == 0:
            st_shared_32(smem + self.slots_at + slot * (SLOT_WORDS * 4), Int32(0))
            tma.arrive_at(smem + self.slot_full + slot * 8)

    @cute.jit
    def copy_keys(
        self,
        args,
        smem: Int32,
        k_map: Int64,
        v_map: Int64,
        sequence: Int32,
        k_start: Int32,
        low: Int32,
        high: Int32,
        end: Int32,
        steps: Int32,
        kv_head: Int32,
        stage: Int32,
        parity: Int32,
    ):
        """K of each block of keys, from the last to the first, and V one block behind it; the stage that follows."""
        row, page = self.box_of(args, sequence, k_start, (end - 1) * self.keys, low, high)
        last_row, last_page, last_stage, last_parity = row, page, stage, parity
        for i in cutlass.range(steps, unroll=1):
            tma.wait_for(smem + self.k_empty + stage * 8, parity ^ 1)
            if cutlass.const_expr(self.paged):
                missing = cute.arch.vote_ballot_sync((page < 0) & (cute.arch.lane_idx() < self.keys // args.box_rows))
                st_shared_32(smem + self.holes_at + stage * 4, Int32(missing))
            self.copy_tile(args, smem, self.k_at, self.k_full, k_map, stage, row, page, kv_head)
            # The next look-up is under way while V waits for its stage.
            next_row, next_page = self.box_of(args, sequence, k_start, (end - 2 - i) * self.keys, low, high)
            if i > 0:
                tma.wait_for(smem + self.v_empty + last_stage * 8, last_parity ^ 1)
                self.copy_tile(args, smem, self.v_at, self.v_full, v_map, last_stage, last_row, last_page, kv_head)
            last_row, last_page, last_stage, last_parity = row, page, stage, parity
            row, page = next_row, next_page
            stage, parity = self.after(stage, parity)
        tma.wait_for(smem + self.v_empty + last_stage * 8, last_parity ^ 1)
        self.copy_tile(args, smem, self.v_at, self.v_full, v_map, last_stage, last_row, last_page, kv_head)
        return stage, parity

    @cute.jit
    def box_of(self, args, sequence: Int32, k_start: Int32, key_first: Int32, low: Int32, high: Int32):
        """(row, page) of this lane's box of the block of keys; page -1 where no key of the box is live or mapped."""
        row, page = k_start + key_first, Int32(0)
        if cutlass.const_expr(self.paged):
            key = key_first + cute.arch.lane_idx() * args.box_rows
            page = Int32(-1)
            if (key < high) & (key + args.box_rows > low):
                logical = Int32(Uint32(key) // Uint32(args.page_size))
                row = key - logical * args.page_size
                if logical < args.max_pages:
                    table = args.block_table + Int64(sequence) * args.table_stride
                    page = ld_global_i32(table + Int64(logical) * 4)
                    if page >= args.num_pages:
                        page = Int32(-1)
        return row, page

    @cute.jit
    def copy_tile(
        self,
        args,
        smem: Int32,
        tiles_at: cutlass.Constexpr,
        full_at: cutlass.Constexpr,
        tensor_map: Int64,
        stage: Int32,
        row: Int32,
        page: Int32,
        kv_head: Int32,
    ):
        """Start copying a tile of K or V into its stage, a box a lane; boxes without a page become zeros, unread."""
        lane = cute.arch.lane_idx()
        barrier = smem + full_at + stage * 8
        if lane == 0:
            tma.expect(barrier, self.kv_bytes)
        cute.arch.sync_warp()
        target = smem + tiles_at + stage * self.kv_bytes
        boxes = Int32(1)
        if cutlass.const_expr(self.paged):
            boxes = self.keys // args.box_rows
            target = target + lane * (args.box_rows * COLUMN * 2)
            page = Int32(cutlass.select_(page < 0, args.num_pages, page))
        if lane < boxes:
            for half in range(self.halves):
                at = target + half * (self.keys * COLUMN * 2)
                tma.load_box(at, tensor_map, barrier, Int32(half * COLUMN), row, kv_head, page)

    @cute.jit
    def compute(self, args, pointer, smem: Int32, warp: Int32):
        """A computing warpgroup: its 64 rows of each of the block's tiles.

        What a tile is stays in its slot and is read again where it is needed: registers are scarce.
        """
        lane = cute.arch.lane_idx()
        group = warp // 4 - 1
        if group == self.groups - 1:
            self.pass_turn(group)
        turn, queries, stage, parity = Int32(0), Int32(0), Int32(0), Int32(0)
        tma.wait_for(smem + self.slot_full, 0)
        slot = smem + self.slots_at
        while ld_shared_32(slot) != 0:
            acc_o, row_max, row_sum = softmax.fresh_state(1, self.d_tiles)
            if ld_shared_32(slot + STEPS) > 0:
                tma.wait_for(smem + self.q_full, queries & 1)
                stage, parity = self.attend(args, pointer, smem, slot, group, stage, parity, acc_o, row_max, row_sum)
                queries = queries + 1
            self.store(args, slot, acc_o, row_max, row_sum, warp, lane)
            self.release(smem + self.slot_empty + turn % SLOTS * 8, lane)
            turn = turn + 1
            tma.wait_for(smem + self.slot_full + turn % SLOTS * 8, turn // SLOTS & 1)
            slot = smem + self.slots_at + turn % SLOTS * (SLOT_WORDS * 4)

    @cute.jit
    def attend(
        self,
        args,
        pointer,
        smem: Int32,
        slot: Int32,
        group: Int32,
        stage: Int32,
        parity: Int32,
        acc_o,
        row_max,
        row_sum,
    ):
        """Outputs, maxima and sums of the group's rows over the keys of the tile in `slot`; the stage that follows."""
        lane = cute.arch.lane_idx()
        s_q = self.products.tile(pointer, self.rows, self.head_dim)
        s_k = self.products.tile(pointer + self.k_at, self.keys, self.head_dim, self.stages)
        s_v = self.products.tile(pointer + self.v_at, self.keys, self.head_dim, self.stages)
        acc_s = cute.make_rmem_tensor((self.n_tiles * 4,), Float32)
        factors = cute.make_rmem_tensor((2,), Float32)
        probabilities = self.products.probabilities()

        # Every row of the tile sees keys [safe_low, safe_high).
        safe_low, safe_high = Int32(0), ld_shared_32(slot + KEYS)
        if cutlass.const_expr(self.causal or self.window):
            safe_high = cutlass.min(safe_high, ld_shared_32(slot + POSITION) + 1)
        if cutlass.const_expr(self.window):
            safe_low = ld_shared_32(slot + POSITION) + ld_shared_32(slot + LIVE) - args.window
        steps = ld_shared_32(slot + STEPS)
        key_first = (ld_shared_32(slot + END) - 1) * self.keys
        tma.wait_for(smem + self.k_full + stage * 8, parity)
        self.products.start_scores(s_q, s_k, stage, group, acc_s)
        warpgroup.wait_group(0)
        hole = self.take_holes(smem, stage)
        self.release(smem + self.k_empty + stage * 8, lane)
        self.treat(args, acc_s, slot, key_first, safe_low, safe_high, hole)
        softmax.start(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
        self.products.round(acc_s, probabilities)

        for i in cutlass.range(1, steps, unroll=1):
            last, last_parity = stage, parity
            stage, parity = self.after(stage, parity)
            tma.wait_for(smem + self.k_full + stage * 8, parity)
            self.take_turn(group)
            self.products.start_scores(s_q, s_k, stage, group, acc_s)
            tma.wait_for(smem + self.v_full + last * 8, last_parity)
            if i == 1:
                self.clear_tail(smem, slot, last, key_first, group)
            self.products.start_outputs(probabilities, s_v, last, group, acc_o)
            self.pass_turn(group)
            warpgroup.wait_group(1)
            hole = self.take_holes(smem, stage)
            self.release(smem + self.k_empty + stage * 8, lane)
            key_first = key_first - self.keys
            self.treat(args, acc_s, slot, key_first, safe_low, safe_high, hole)
            outgrown = softmax.outgrown(acc_s, row_max, args.log2_scale, self.n_tiles)
            for _ in cutlass.range(opaque(outgrown), unroll=1):
                raised = softmax.raise_maxima(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
                factors[0], factors[1] = raised
            softmax.exponentiate(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
            warpgroup.wait_group(0)
            self.release(smem + self.v_empty + last * 8, lane)
            for _ in cutlass.range(opaque(outgrown), unroll=1):
                softmax.scale_rows(acc_o, [factors[0], factors[1]], self.d_tiles)
            self.products.round(acc_s, probabilities)

        self.release(smem + self.q_empty, lane)
        tma.wait_for(smem + self.v_full + stage * 8, parity)
        if steps == 1:
            self.clear_tail(smem, slot, stage, key_first, group)
        if cutlass.const_expr(self.window):
            self.clear(smem, stage, Int32(0), ld_shared_32(slot + POSITION) - args.window + 1 - key_first, group)
        self.products.start_outputs(probabilities, s_v, stage, group, acc_o)
        warpgroup.wait_group(0)
        self.release(smem + self.v_empty + stage * 8, lane)
        return self.after(stage, parity)

    @cute.jit
    def release(self, barrier: Int32, lane: Int32):
        """This warp no longer reads what the barrier guards."""
        cute.arch.sync_warp()
        if lane == 0:
            tma.arrive_at(barrier)

    @cute.jit
    def take_turn(self, group: Int32):
        """Wait until the group before has started its products."""
        cute.arch.barrier(barrier_id=TURNS + group, number_of_threads=2 * GROUP_THREADS)

    @cute.jit
    def pass_turn(self, group: Int32):
        """Let the next group start its products."""
        following = Int32(cutlass.select_(group == self.groups - 1, Int32(0), group + 1))
        cute.arch.barrier_arrive(barrier_id=TURNS + following, number_of_threads=2 * GROUP_THREADS)

    def take_holes(self, smem, stage):
        """A bit for each box of the stage's keys that has no page."""
        return ld_shared_32(smem + self.holes_at + stage * 4) if self.paged else Int32(0)

    @cute.jit
    def clear_tail(self, smem: Int32, slot: Int32, stage: Int32, key_first: Int32, group: Int32):
        """Zero the values of a stage's keys past the last one."""
        self.clear(smem, stage, ld_shared_32(slot + KEYS) - key_first, Int32(self.keys), group)

    @cute.jit
    def clear(self, smem: Int32, stage: Int32, begin: Int32, stop: Int32, group: Int32):
        """Zero the values of rows [begin, stop) of a stage: whatever lies there, nothing times it is to be nothing.

        Keys past the last and before the window are loaded with their page or block. Each group clears them for
        itself, so that none waits for another.
        """
        thread = cute.arch.thread_idx()[0] % GROUP_THREADS
        if begin < stop:
            base = smem + self.v_at + stage * self.kv_bytes
            for half in cutlass.range_constexpr(self.halves):
                for chunk in cutlass.range(begin * 8 + thread, stop * 8, GROUP_THREADS, unroll=1):
                    tma.st_shared_128(base + half * (self.keys * COLUMN * 2) + chunk * 16, [Int32(0)] * 4)
            tma.fence_async()
            cute.arch.barrier(barrier_id=TAILS + group, number_of_threads=GROUP_THREADS)

    @cute.jit
    def treat(self, args, acc_s, slot: Int32, key_first: Int32, safe_low: Int32, safe_high: Int32, hole: Int32):
        """Cap the scores, and -inf wherever one of this thread's rows must not see a key; nothing for most blocks."""
        for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
            softmax.cap(acc_s, args.softcap_in)
        edge = key_first + self.keys > safe_high
        if cutlass.const_expr(self.window):
            edge = edge | (key_first < safe_low)
        for _ in cutlass.range(opaque(edge), unroll=1):
            self.hide(args, acc_s, slot, key_first)
        if cutlass.const_expr(self.paged):
            for turn in cutlass.range(opaque(hole != 0), unroll=1):
                # The turn is 0; it keeps the divisions inside the loop.
                for nt in cutlass.range_constexpr(self.n_tiles):
                    box = Uint32(nt * 8 + turn) // Uint32(args.box_rows)
                    drop = ((Uint32(hole) >> box) & 1) != 0
                    for i in cutlass.range_constexpr(4):
                        acc_s[nt * 4 + i] = cutlass.select_(drop, Float32(-Float32.inf), acc_s[nt * 4 + i])

    def hide(self, args, acc_s, slot, key_first):
        """-inf for keys past the last, after the row's own position, before its window."""
        thread, _, _ = cute.arch.thread_idx()
        first = ld_shared_32(slot + POSITION) + row_of(thread)
        keys = ld_shared_32(slot + KEYS)
        column = key_first + (thread & 3) * 2
        for r in range(2):
            here = first + r * 8
            stop = (cutlass.min(keys, here + 1) if self.causal or self.window else keys) - column
            begin = here - args.window - column
            for nt in range(self.n_tiles):
                for c in range(2):
                    drop = stop <= nt * 8 + c
                    if self.window:
                        drop = drop | (begin >= nt * 8 + c)
                    at = nt * 4 + r * 2 + c
                    acc_s[at] = cutlass.select_(drop, Float32(-Float32.inf), acc_s[at])

    @cute.jit
    def store(self, args, slot: Int32, acc_o, row_max, row_sum, warp: Int32, lane: Int32):
        """Write this thread's rows: four lanes trade words, so that each stores 16 bytes of one row."""
        head, token, live = ld_shared_32(slot + HEAD), ld_shared_32(slot + TOKEN), ld_shared_32(slot + LIVE)
        sink = Float32(-Float32.inf)
        if args.sinks != 0:
            sink = softmax.sink_of(self.dtype, args, head) * LOG2_E
        scale, lse = softmax.finish(row_max, row_sum, args.log2_scale, sink, 1)
        mine = lane & 3
        first_row = row_of(warp * 32 + lane)
        lse_row = args.lse + Int64(head) * args.lse_head_stride + Int64(token) * 4
        out_row = args.out + Int64(token) * args.out_token_stride + Int64(head) * args.out_head_stride
        for r in cutlass.range_constexpr(2):
            row = first_row + r * 8
            st_global_f32(lse_row + Int64(row) * 4, lse[r] * LN_2, (mine == 0) & (row < live) & (args.lse != 0))
            target = out_row + Int64(row) * args.out_token_stride
            for first in cutlass.range_constexpr(0, self.d_tiles, 4):
                words = []
                for dt in cutlass.range_constexpr(first, first + 4):
                    at = dt * 4 + r * 2
                    words.append(softmax.scaled_pair(self.dtype, acc_o[at], acc_o[at + 1], scale[r]))
                column = (mine + first) * 8
                traded = trade(words, mine)
                st_global_128(target + Int64(column) * 2, traded, (row < live) & (column < args.head_dim))


def row_of(thread):
    """The first of the two rows, eight apart, of the tile that a computing thread holds."""
    return ((thread >> 5) - 4) * 16 + ((thread & 31) >> 2)


def trade(words, mine):
    """Transpose four words of four neighbouring lanes: lane i gets the words i of all, in the order of lanes."""
    odd, upper = (mine & 1) != 0, (mine & 2) != 0
    for first in (0, 2):
        low, high = words[first], words[first + 1]
        got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, low, high), 1)
        words[first] = Int32(cutlass.select_(odd, got, low))
        words[first + 1] = Int32(cutlass.select_(odd, high, got))
    for at in (0, 1):
        low, high = words[at], words[at + 2]
        got = cute.arch.shuffle_sync_bfly(cutlass.select_(upper, low, high), 2)
        words[at] = Int32(cutlass.select_(upper, got, low))
        words[at + 2] = Int32(cutlass.select_(upper, high, got))
    return words
