"""The listing warp of a persistent block: turns tickets into the tiles of its work list, and copies their queries.

Whoever is nearly done takes the next tile, in an order that keeps a section of heads in the L2 cache and leaves short
tiles for the end. A ticket taken early would be a tile that waits while another block has nothing to do.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device import parts, stretches, tma
from pa_ops.templates.device.mask_tile import keys_of as padded_keys
from pa_ops.templates.device.order import place_of, sections_of
from pa_ops.templates.device.packing import pack_bits, token_of
from pa_ops.templates.device.parts import STATES
from pa_ops.templates.device.ptx import ld_shared_32, st_shared_32
from pa_ops.templates.device.ptx_global import st_global_i32, take
from pa_ops.templates.device.ptx_grid import wait_for_grid
from pa_ops.templates.device.quotients import divided
from pa_ops.templates.device.shared_sm90 import BARRIER, HEAD, SLOT, SLOTS, TOKEN, columns_of
from pa_ops.templates.device.warpgroup import GROUP_ROWS
from pa_ops.templates.device.worklist import end_of, find_tile, length_at, paged_keys, step_of, tiles_of

# Of keys and values that a section of heads may have: blocks of two sections run at a time, and each half of an H200's
# L2 cache of 50 MB holds what its own SMs read. 24 MB are 1% slower without a mask, and equal with one.
NEAR_BYTES = 6 << 20


class Lister:
    """Lists tiles of `rows` query rows a block, the grid's of `portions`, and the blocks of keys that `sight` finds for
    them, in parts."""

    def __init__(self, shared, cluster, portions, sight, again, head_dim, head_dim_v, paged, rows, chained):
        self.shared, self.cluster, self.portions, self.sight, self.again = shared, cluster, portions, sight, again
        self.paged, self.rows, self.chained = paged, rows, chained
        self.causal, self.masked = sight.causal, sight.masked
        self.head_dim, self.columns, self.q_bytes = head_dim, columns_of(head_dim), GROUP_ROWS * head_dim * 2
        # By blocks of 192 rows stretches took 0.4% off D 128, and their lister cost those that compute 8 to 24 B.
        self.cutting = stretches if sight.full and portions.taken else parts
        self.near_keys = NEAR_BYTES // ((head_dim + head_dim_v) * 2)

    @cute.jit
    def run(self, args, smem: Int32, q_map: Int64):
        """Fill slots until the work ends, then one that says so."""
        if cute.arch.lane_idx() == 0:
            tma.prefetch_map(q_map)
        turn, taken, bits = Int32(0), Int32(0), pack_bits(args, self.masked)
        tokens_here = Int32(self.rows) >> bits
        rank = self.cluster.number()
        if args.beside != 0:  # some blocks start when the grid beside this one ends
            rank = self.take_ticket(args, smem, taken)
            taken = taken + 1
        cut = self.cutting.uncut()
        if cutlass.const_expr(not self.masked):
            cluster = self.cluster
            here = tokens_here * cluster.blocks, args.heads >> bits, cluster.count()
            cut = self.cutting.cut_of(args, self.portions, *here)
        second = Int32(0)
        sequence, stop, head, number = self.tile_at(args, cut, rank, second)
        while sequence >= 0:
            q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
            first_key, k_len = self.keys_of(args, sequence, q_len)
            shift = args.position if self.masked else k_len - q_len
            first = cutlass.max(stop - tokens_here * self.cluster.blocks, 0)
            live = cutlass.min(stop, q_len) - first
            low, high, steps, end, edges, inner = self.sight.blocks(args, first + shift, live, k_len)
            part = self.cutting.part_of(cut, rank, second, number, steps)
            there = (stop > 0) & ((part.begin < part.stop) | (part.number == 0))  # a quarter of a unit may have no rows
            stop = stop - (self.cluster.blocks - 1 - self.cluster.mate()) * tokens_here
            first = cutlass.max(stop - tokens_here, 0)
            position, tokens = first + shift, cutlass.min(stop, q_len) - first
            if cutlass.const_expr(self.again.trusts and self.cluster.blocks > 1):
                # Edges are those that the rows would have by themselves: see `FlashSm90.walk`.
                _, _, _, own_end, own_edges, _ = self.sight.blocks(args, position, tokens, k_len)
                edges = end - own_end + own_edges
            state = part.state + self.cluster.mate() * (self.cluster.count() * STATES)
            if cutlass.const_expr(self.portions.taken):
                state = state + args.first_state
            if there:
                rows = (sequence, q_start + first, tokens << bits, head, position, k_len, first_key, low, high)
                blocks = (part.stop - part.begin, *(number - part.begin for number in (end, edges, inner)))
                self.fill(smem, turn, (Int32(1), *rows, *blocks, part.number, part.of, state, Int32(0), turn))
                if cutlass.const_expr(self.masked):
                    self.copy_queries(args, smem, q_map, turn, head, first, sequence)
                else:
                    self.copy_queries(args, smem, q_map, turn, head, q_start + first, Int32(0))
                tma.wait_for(smem + self.shared.asked, turn & 1)
                turn = self.list_lost(args, smem, q_map, turn + 1)
            second = self.cutting.goes_on(cut, rank, second)
            if second == 0:
                rank = self.take_ticket(args, smem, taken)
                taken = taken + 1
            sequence, stop, head, number = self.tile_at(args, cut, rank, second)
        turn = self.list_lost(args, smem, q_map, turn, last=True)
        self.fill(smem, turn, (Int32(0),))
        if args.beside != 0:  # who waits for this grid waits for that one too
            wait_for_grid(self.chained)

    @cute.jit
    def list_lost(self, args, smem: Int32, q_map: Int64, turn: Int32, last: cutlass.Constexpr = False):
        """List again what has been lost by the time that the slot of that turn is empty, or the `last` tile is done;
        the turn that follows."""
        if cutlass.const_expr(self.again.trusts):
            source = turn
            lost = self.again.lost(smem, source)
            if lost == (0 if last else -1):
                source = turn + 1  # the slot of the tile before
                lost = self.again.lost(smem, source)
            while lost != 0:
                slot = smem + self.shared.slots + source % SLOTS * SLOT
                head, token = ld_shared_32(slot + HEAD), ld_shared_32(slot + TOKEN)
                self.again.list(smem, source, turn, lost)
                self.copy_queries(args, smem, q_map, turn, head, token, Int32(0))
                tma.wait_for(smem + self.shared.asked, turn & 1)
                turn = turn + 1
                source = turn
                lost = self.again.lost(smem, source)
        return turn

    @cute.jit
    def copy_queries(self, args, smem: Int32, q_map: Int64, turn: Int32, head: Int32, token: Int32, sequence: Int32):
        """The tile's rows; those past the sequence's last are another's, and nobody looks at what becomes of them."""
        for group in cutlass.range_constexpr(self.rows // GROUP_ROWS):
            full = smem + self.shared.q_full + group * BARRIER
            tma.wait_for(smem + self.shared.q_empty + group * BARRIER, (turn + 1) & 1)
            if cute.arch.lane_idx() == 0:
                tma.expect(full, self.q_bytes)
                first = group * GROUP_ROWS
                for column in range(0, self.head_dim, self.columns):
                    at = smem + self.rows * column * 2 + first * self.columns * 2
                    here = token + token_of(args, self.masked, first)
                    tma.load_box(at, q_map, full, Int32(column), head, here, sequence)
            cute.arch.sync_warp()

    def fill(self, smem, turn, words):
        """Write the first words of the slot of that turn, when it has been read: of what may be lost, `list_lost` has
        seen to that."""
        slot = turn % SLOTS
        if not self.again.trusts:
            tma.wait_for(smem + self.shared.slot_empty + slot * BARRIER, (turn // SLOTS + 1) & 1)
        self.write(smem + self.shared.slots + slot * SLOT, smem + self.shared.slot_full + slot * BARRIER, words)

    @cute.jit
    def write(self, slot: Int32, full: Int32, words):
        if cute.arch.lane_idx() == 0:
            for i, word in enumerate(words):
                st_shared_32(slot + i * 4, word)
            tma.arrive_at(full)
        cute.arch.sync_warp()

    @cute.jit
    def take_ticket(self, args, smem: Int32, taken: Int32):
        """The rank of the cluster's next tile or part, after so many that were taken."""
        ticket = Int32(0)
        if cute.arch.lane_idx() == 0:
            if self.cluster.mate() == 0:
                ticket = take(args.tickets)
                if args.beside == 0:  # each cluster has begun with a rank of its own
                    ticket = ticket + self.cluster.count()
            ticket = self.cluster.agree(smem, self.shared, taken, ticket)
        return cute.arch.shuffle_sync(ticket, 0)

    @cute.jit
    def tile_at(self, args, cut, rank: Int32, second: Int32):
        """(sequence, the token in it that would follow were the tile full, first head) of this grid's tile of that
        rank, or its `second` one, where in it the rank's part begins; sequence -1 beyond the last."""
        bits = pack_bits(args, self.masked)
        tokens = (Int32(self.rows) >> bits) * self.cluster.blocks
        heads = args.heads >> bits  # those that have tiles of their own
        tile, number = self.cutting.tile_of(cut, rank, second)
        unit, quarter = self.portions.unit_of(args, tile)
        unit_tokens = self.portions.tokens_of_unit(args, tokens)
        place = divided(unit, heads)
        sequence, block = find_tile(args, unit_tokens, place)
        stop, head = Int32(0), unit - place * heads
        if sequence >= 0:
            _, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
            _, k_len = self.keys_of(args, sequence, q_len)
            near = cutlass.max(divided(self.near_keys, cutlass.max(k_len, 1)), 1)
            units = tiles_of(q_len, unit_tokens)
            order = sections_of(units, heads, args.group >> bits, near, self.portions.at_once(args), self.causal)
            row_block, head = place_of(block * heads + head, order)
            end = end_of(q_len, step_of(self.rows, bits, self.sight.keys))
            stop = end - (units - row_block) * unit_tokens + (quarter + 1) * tokens
        elif (
            self.cutting.ranks_past(cut, self.portions.past(args, tile, unit, block * heads + head), number)
            == self.cluster.count() - 1
        ):
            # Clusters stop at the first rank beyond the last tile, each at one of its own: this is the last one.
            st_global_i32(args.tickets, Int32(0))
        return sequence, stop, head << bits, number

    @cute.jit
    def keys_of(self, args, sequence: Int32, queries: Int32):
        """(first key where they are dense, keys) of a sequence."""
        first, count = Int32(0), Int32(0)
        if cutlass.const_expr(self.masked):
            count = padded_keys(args, sequence)
        elif cutlass.const_expr(self.paged):
            count = paged_keys(args, sequence, queries)
        else:
            first, count = length_at(args.kv_lengths, sequence, args.keys)
        return first, count
