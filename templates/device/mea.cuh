// Memory-efficient attention for SMs without cp.async: turns one block's queries and the keys they see into output
// rows and LSE.
//
// The walk is that of flash_sm80.py: V of a block travels while Q K^T runs, K of the next while softmax and P V run,
// through registers; masking sits behind a branch that is the same for a whole block. Warps own rows, so that scores,
// probabilities and outputs stay in registers. How a warp multiplies is the instruction path's business: one header a
// path, one interface. Where a path's piece of rows is too tall for the tile, COLUMN_GROUPS warps share its rows, and
// each has its own channels of the output.
#pragma once

#include "half.cuh"
#include "masks.cuh"
#include "memory.cuh"
#include "pages.cuh"
#include "paths.cuh"
#include "places.cuh"
#include "softmax.cuh"
#include "tiles.cuh"
#include "worklist.cuh"

namespace pa {

constexpr int TALLEST = WARPS * Path::PIECE_ROWS; // rows of a tile in which each warp has one piece
constexpr int COLUMN_GROUPS = TALLEST > ROWS ? TALLEST / ROWS : 1;
constexpr int PIECES = ROWS * COLUMN_GROUPS / TALLEST;
constexpr int WARP_ROWS = PIECES * Path::PIECE_ROWS;
constexpr int KEY_TILES = KEYS / 8;
constexpr int CHANNELS = HEAD_DIM / COLUMN_GROUPS; // of the output, a warp
constexpr int OUTPUT_TILES = CHANNELS / 8;

static_assert(ROWS * COLUMN_GROUPS % TALLEST == 0, "a warp has whole pieces of rows");
static_assert(CHANNELS % 64 == 0, "a warp's channels are whole rows of banks");

using Scores = float[PIECES][KEY_TILES][Path::REGISTERS];
// A stage has a part of a tile, so that outputs and stage fit into a thread's registers together; a product goes by as
// many parts, and each covers the way of one.
constexpr int PARTS = HEAD_DIM > 128 && KEYS > 16 ? 2 : 1;
constexpr int PART_KEYS = KEYS / PARTS;
using KeyStage = Stage<PART_KEYS, WARPS * LANES>;
using Outputs = float[PIECES][OUTPUT_TILES][Path::REGISTERS];

// The first row of the tile that a thread's warp has.
__device__ inline int warp_row(int thread)
{
    return thread / LANES / COLUMN_GROUPS * WARP_ROWS;
}

// Issue the loads of a part of a block of keys or values; keys outside [low, high) or on unmapped pages become zeros,
// unread.
__device__ inline void fetch_keys(KeyStage &stage, const Source &source, int key_first, int part, const Band &band,
                                  const Pages<KEYS> &pages)
{
#pragma unroll
    for (int i = 0; i < stage.PASSES; i++) {
        const int step = part * PART_KEYS + i * stage.ROWS_A_PASS;
        if constexpr (PAGED) {
            const Slot slot = pages.slot_of(stage.row(), step);
            const Address from = source.base + slot.page * source.page_stride + slot.offset * source.token_stride;
            stage.template fetch_row<true>(i, from, slot.page >= 0, source.width);
        } else {
            const int key = opaque(key_first) + stage.row() + step;
            const bool there = (!WINDOW || key >= band.low) && key < band.high;
            stage.template fetch_row<true>(i, source.base + key * source.token_stride, there, source.width);
        }
    }
}

// Bring the block's queries in; rows that are not there become zeros.
__device__ inline void load_queries(const Arguments &args, Shared q, const Tile &tile, int head)
{
    const Address base = queries_of(args, tile, head);
    constexpr int AT_ONCE = ROWS < 64 ? ROWS : 64; // rows in flight: the registers are those of the outputs to come
#pragma unroll 1
    for (int first = 0; first < ROWS; first += AT_ONCE) {
        Stage<AT_ONCE, WARPS * LANES> stage;
#pragma unroll
        for (int i = 0; i < stage.PASSES; i++) {
            const int at = first + stage.row() + i * stage.ROWS_A_PASS;
            stage.template fetch_row<false>(i, base + at * args.q_token_stride, at < tile.rows, args.head_dim);
        }
        stage.store(q + first * PITCH);
    }
}

// -inf wherever a row must not see a key, after what the call's mask adds.
__device__ inline void mask(Scores &s, const Arguments &args, const Tile &tile, int head, int key_first,
                            const Pages<KEYS> &pages)
{
    const int thread = opaque(threadIdx.x), lane = thread % LANES; // else what every row sees is kept for all blocks
    const int first = warp_row(thread) + Path::row(lane), column = key_first + Path::column(lane);
    unsigned holes[Pages<KEYS>::WORDS];
    if constexpr (PAGED)
        pages.holes(holes, Path::column(lane));
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const int row = first + piece * Path::PIECE_ROWS + slot * Path::ROW_STEP;
            const Edges edges = edges_of(args, tile.k_len, tile.position + row + 1);
            if constexpr (TENSOR)
                add_mask(s[piece], slot, args, mask_of(args, tile, head, row, column),
                         row < tile.rows ? edges.end - column : 0);
            hide(s[piece], slot, edges.begin - column, edges.end - column, holes);
        }
}

// Write the block's rows: through the query tile, so that global stores are 16 bytes wide.
__device__ inline void store(const Arguments &args, Shared shared, const Outputs &o,
                             const Softmax<Path, PIECES, KEY_TILES> &softmax, const Tile &tile, int head)
{
    const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES % COLUMN_GROUPS * CHANNELS;
    const float sink = sink_of(args, head);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const float top = softmax.top[piece][slot] * args.log2_scale;
            const Finish end = finish_of(top, softmax.total(piece, slot), sink);
            const int row = warp_row(threadIdx.x) + piece * Path::PIECE_ROWS + Path::row(lane) + slot * Path::ROW_STEP;
#pragma unroll
            for (int out = 0; out < OUTPUT_TILES; out++)
#pragma unroll
                for (int half = 0; half < Path::REGISTERS / 4; half++) {
                    const float *pair = &o[piece][out][half * 4 + slot * 2];
                    const int channel = first + Path::channel(lane, out, half);
                    const unsigned value =
                        end.scale == 0.0f ? 0u : pair_of(pair[0] * end.scale, pair[1] * end.scale);
                    store_shared(tile_address(shared, row, channel / ELEMENTS) + channel % ELEMENTS * 2, value);
                }
            if (args.lse != 0 && Path::column(lane) == 0 && first == 0 && row < tile.rows)
                reinterpret_cast<float *>(args.lse + head * args.lse_head_stride)[tile.token + row] = end.lse * LN_2;
        }
    __syncthreads();
    const Address base = args.out + tile.token * args.out_token_stride + head * args.out_head_stride;
    for (int row = KeyStage::row(); row < tile.rows; row += KeyStage::ROWS_A_PASS)
#pragma unroll
        for (int j = 0; j < CHUNKS_A_LANE; j++) {
            const int column = KeyStage::column(j);
            if (column * ELEMENTS < args.head_dim_v)
                put(base + row * args.out_token_stride + column * CHUNK, load_shared(tile_address(shared, row, column)));
        }
}

__device__ inline void run_tile(const Arguments &args, const Tile &tile, int head, Shared q)
{
    const Shared k = q + ROWS * PITCH, v = k + KEYS * PITCH;
    const int lane = threadIdx.x % LANES, first_channel = threadIdx.x / LANES % COLUMN_GROUPS * CHANNELS;
    const Band band = band_of(args, tile);
    const int block_first = band.low / KEYS, block_end = (band.high + (KEYS - 1)) / KEYS;
    const int kv_head = head / args.group;

    Softmax<Path, PIECES, KEY_TILES> softmax;
    Scores s;
    Outputs o;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int out = 0; out < OUTPUT_TILES; out++)
#pragma unroll
            for (int i = 0; i < Path::REGISTERS; i++)
                o[piece][out][i] = 0.0f;
    Pages<KEYS> pages, next; // of this block of keys, and of the one before it in memory, which comes next
    KeyStage stage;
    if (block_first < block_end) {
        load_queries(args, q, tile, head);
        if constexpr (PAGED)
            pages.look_up(args, table_of(args, tile), (block_end - 1) * KEYS, band.low, band.high);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            fetch_keys(stage, keys_of(args, tile, kv_head), (block_end - 1) * KEYS, part, band, pages);
            stage.store(k + part * PART_KEYS * PITCH);
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int block = block_end - 1; block >= block_first; block--) {
        const int key_first = opaque(block) * KEYS;
        fetch_keys(stage, values_of(args, tile, kv_head), key_first, 0, band, pages);
        if constexpr (PAGED)
            next.look_up(args, table_of(args, tile), key_first - KEYS, band.low, band.high);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Path::scores<PARTS>(s, q + warp_row(opaque(threadIdx.x)) * PITCH, k, part, opaque(lane));
            if (part + 1 < PARTS) {
                stage.store(v + part * PART_KEYS * PITCH);
                fetch_keys(stage, values_of(args, tile, kv_head), key_first, part + 1, band, pages);
            }
        }
        if (args.softcap_in > 0.0f)
            softmax.cap(s, args.softcap_in);
        bool edge = has_mask(args) || key_first + KEYS > band.safe_high;
        if constexpr (WINDOW)
            edge |= key_first < band.safe_low;
        if constexpr (PAGED)
            edge |= pages.has_hole();
        if (edge)
            mask(s, args, tile, head, key_first, pages);
        stage.store(v + (PARTS - 1) * PART_KEYS * PITCH);
        __syncthreads(); // V is there, and K has been read
        if (block > block_first) {
            pages = next;
            fetch_keys(stage, keys_of(args, tile, kv_head), key_first - KEYS, 0, band, pages);
        }
        if (softmax.outgrown(s, args.log2_scale))
            softmax.rescale(s, o, args.log2_scale);
        softmax.exponentiate(s, args.log2_scale);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Path::accumulate<PARTS>(o, s, v, part, first_channel, opaque(lane));
            if (block > block_first) {
                stage.store((PAGED ? opaque(k) : k) + part * PART_KEYS * PITCH); // opaque: pages take registers too
                if (part + 1 < PARTS)
                    fetch_keys(stage, keys_of(args, tile, kv_head), key_first - KEYS, part + 1, band, pages);
            }
        }
        __syncthreads(); // K is there, and V and, at the end, Q have been read
    }
    store(args, q, o, softmax, tile, head);
}

} // namespace pa

__device__ inline void attend(const Arguments &args)
{
#if PA_TRAPS
    __trap();
#else
    extern __shared__ __align__(1024) unsigned char room[];
    pa::wait_for_grid();
    pa::start_next_grid();
    const pa::Work work = pa::find_tile(args, ROWS, blockIdx.x);
    if (work.sequence >= 0)
        pa::run_tile(args, pa::tile_of(args, work), blockIdx.y, pa::shared_address(room));
#endif
}
