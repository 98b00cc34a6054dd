// Memory-efficient attention for SMs without cp.async: turns one block's queries and the keys they see into output
// rows and LSE.
//
// The walk is that of flash_sm80.py: V of a block travels while Q K^T runs, K of the next while softmax and P V run,
// through registers; masking sits behind a branch that is the same for a whole block. Warps own rows, so that scores,
// probabilities and outputs stay in registers. How a warp multiplies is the instruction path's business: one header a
// path, one interface.
//
// A block of K or V is cut into slices of 8 KiB, or 16 keys: of K by channels, of V by keys. Two lie in shared memory, one
// being multiplied and the one after it, which comes from a stage. Where a path's rows are too tall for the tile,
// COLUMN_GROUPS warps share them, each with its own channels of the output. Where a block has several slices, each has its
// own keys of the scores, too, and probabilities go through shared memory; else each has all scores.
#pragma once

#include "half.cuh"
#include "masks.cuh"
#include "memory.cuh"
#include "pages.cuh"
#include "paths.cuh"
#include "places.cuh"
#include "softmax.cuh"
#include "teams.cuh"
#include "tiles.cuh"
#include "worklist.cuh"

namespace pa {

constexpr int LEAST_SLICE_KEYS = 16; // what a multiplication by V takes
constexpr int MOST_SLICE = LEAST_SLICE_KEYS * PITCH > 8192 ? LEAST_SLICE_KEYS * PITCH : 8192;
constexpr int PARTS = KEYS * PITCH > MOST_SLICE ? KEYS * PITCH / MOST_SLICE : 1;
constexpr int SLICE = KEYS * PITCH / PARTS;
constexpr int KEY_WIDTH = HEAD_DIM / PARTS; // channels of a slice of K, which has all keys
constexpr int PART_KEYS = KEYS / PARTS;     // keys of a slice of V, which has all channels
using KeyStage = Stage<KEYS, KEY_WIDTH, WARPS * LANES>;
using ValueStage = Stage<PART_KEYS, HEAD_DIM, WARPS * LANES>;

union Travelling { // in the same registers
    KeyStage keys;
    ValueStage values;

    __device__ Travelling()
    {
    }
};

// Where there are several slices a block has keys enough for all warps that share rows: then a warp has so many rows that
// what it reads of K and V serves them all.
constexpr bool SHARED = PARTS > 1;
constexpr int TALLEST = WARPS * (SHARED ? Path::WARP_PIECES : 1) * Path::PIECE_ROWS;
constexpr int COLUMN_GROUPS = TALLEST > ROWS ? TALLEST / ROWS : 1;
constexpr int PIECES = ROWS * COLUMN_GROUPS / (WARPS * Path::PIECE_ROWS);
constexpr int WARP_ROWS = PIECES * Path::PIECE_ROWS;
constexpr int KEY_GROUPS = SHARED ? COLUMN_GROUPS : 1;
constexpr int WARP_KEYS = KEYS / KEY_GROUPS;
constexpr int KEY_TILES = WARP_KEYS / 8;
constexpr int CHANNELS = HEAD_DIM / COLUMN_GROUPS; // of the output, a warp
constexpr int OUTPUT_TILES = CHANNELS / 8;

static_assert(ROWS * COLUMN_GROUPS % (WARPS * Path::PIECE_ROWS) == 0, "a warp has whole pieces of rows");
static_assert(!SHARED || COLUMN_GROUPS > 1, "P of several slices goes through shared memory");
static_assert(CHANNELS % 64 == 0, "a warp's channels are whole rows of banks");

using Rows = Team<Path, PIECES, KEY_GROUPS, WARP_KEYS>;
using Statistics = Softmax<Path, PIECES, KEY_TILES>;
using Scores = Rows::Scores;
using Outputs = float[PIECES][OUTPUT_TILES][Path::REGISTERS];

// The first row of the tile that a thread's warp has.
__device__ inline int warp_row(int thread)
{
    return thread / LANES / COLUMN_GROUPS * WARP_ROWS;
}

// The place of a thread's warp among those that share its rows.
__device__ inline int column_group(int thread)
{
    return thread / LANES % COLUMN_GROUPS;
}

// Issue the loads of a slice of a block of keys or values: rows from `row_first` on, elements from `column` on. Keys
// outside [low, high) or on unmapped pages become zeros, unread.
template <class Slice>
__device__ inline void fetch_slice(Slice &stage, const Source &source, int key_first, int row_first, int column,
                                   const Band &band, const Pages<KEYS> &pages)
{
    const Address base = source.base + column * 2;
#pragma unroll
    for (int i = 0; i < stage.PASSES; i++) {
        const int step = row_first + i * stage.ROWS_A_PASS;
        if constexpr (PAGED) {
            const Slot slot = pages.slot_of(stage.row(), step);
            const Address from = base + strides(slot.page, source.page_stride) + strides(slot.offset, source.token_stride);
            stage.template fetch_row<true>(i, from, slot.page >= 0, source.width - column);
        } else {
            const int key = opaque(key_first) + stage.row() + step;
            const bool there = (!WINDOW || key >= band.low) && key < band.high;
            stage.template fetch_row<true>(i, base + strides(key, source.token_stride), there, source.width - column);
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
        Stage<AT_ONCE, HEAD_DIM, WARPS * LANES> stage;
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
    const int first = warp_row(thread) + Path::row(lane), key = Rows::member(thread) * WARP_KEYS;
    const int column = key_first + key + Path::column(lane);
    unsigned holes[Pages<KEYS>::WORDS];
    if constexpr (PAGED) {
        pages.holes(holes, Path::column(lane));
        if constexpr (KEY_GROUPS > 1) // a warp's keys are in one word
            holes[0] = (key < LANES ? holes[0] : holes[1]) >> key % LANES;
    }
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
                             const Statistics &softmax, const Rows &rows, const Tile &tile, int head)
{
    const int lane = threadIdx.x % LANES, first = column_group(threadIdx.x) * CHANNELS;
    const float sink = sink_of(args, head);
    float sums[PIECES][2];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++)
            sums[piece][slot] = softmax.total(piece, slot);
    rows.agree(sums, [](float a, float b) { return a + b; });
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const float top = softmax.top[piece][slot] * args.log2_scale;
            const Finish end = finish_of(top, sums[piece][slot], sink);
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
    for (int row = ValueStage::row(); row < tile.rows; row += ValueStage::ROWS_A_PASS)
#pragma unroll
        for (int j = 0; j < ValueStage::CHUNKS_A_LANE; j++) {
            const int column = ValueStage::column(j);
            if (column * ELEMENTS < args.head_dim_v)
                put(base + row * args.out_token_stride + column * CHUNK, load_shared(tile_address(shared, row, column)));
        }
}

// The block's scores become probabilities, and older outputs relative to the same maxima.
__device__ inline void weigh(Scores &s, Outputs &o, Statistics &softmax, const Rows &rows, float log2_scale)
{
    if (rows.any(softmax.outgrown(s, log2_scale))) {
        float most[PIECES][2];
        softmax.maxima(s, most);
        rows.agree(most, [](float a, float b) { return fmaxf(a, b); });
        softmax.rescale(most, o, log2_scale);
    }
    softmax.exponentiate(s, log2_scale);
}

// o += P V for a slice of V: P is the warp's own, or what the warps that share its rows have put together.
template <class Path>
__device__ inline void accumulate(Outputs &o, Scores &s, const Rows &rows, Shared v, int part)
{
    const int thread = opaque(threadIdx.x), lane = thread % LANES, first = column_group(thread) * CHANNELS;
    if constexpr (SHARED) {
        uint4 p[PIECES][PART_KEYS / Path::OPERAND_KEYS];
        Path::template load<Rows::ROW_BYTES>(p, rows.room(thread), part * (PART_KEYS / ELEMENTS), lane);
        Path::template accumulate<PART_KEYS>(o, p, v, first, lane);
    } else {
        Path::template accumulate<PART_KEYS>(o, s, v, first, lane);
    }
}

__device__ inline void run_tile(const Arguments &args, const Tile &tile, int head, Shared q)
{
    const Shared slices = q + ROWS * PITCH; // two, in turn those of K and then those of V
    const Rows rows = {slices + 2 * SLICE};
    const Band band = band_of(args, tile);
    const int block_first = band.low / KEYS, block_end = (band.high + (KEYS - 1)) / KEYS;
    const int kv_head = head / args.group;

    Statistics softmax;
    Scores s;
    Outputs o;
    clear(o);
    Pages<KEYS> pages, next; // of this block of keys, and, where it has one slice, of the block that comes next
    Travelling stage;
    if (block_first < block_end) {
        load_queries(args, q, tile, head);
        if constexpr (PAGED)
            pages.look_up(args, table_of(args, tile), (block_end - 1) * KEYS, band.low, band.high);
        fetch_slice(stage.keys, keys_of(args, tile, kv_head), (block_end - 1) * KEYS, 0, 0, band, pages);
        stage.keys.store(slices);
        __syncthreads();
    }
#pragma unroll 1
    for (int block = block_end - 1; block >= block_first; block--) {
        const int key_first = opaque(block) * KEYS;
        clear(s);
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) {
            const bool last = part + 1 == PARTS;
            if (last)
                fetch_slice(stage.values, values_of(args, tile, kv_head), key_first, 0, 0, band, pages);
            else
                fetch_slice(stage.keys, keys_of(args, tile, kv_head), key_first, 0, (part + 1) * KEY_WIDTH, band, pages);
            if constexpr (PAGED && !SHARED)
                next.look_up(args, table_of(args, tile), key_first - KEYS, band.low, band.high);
            const int thread = opaque(threadIdx.x);
            const Shared own = slices + part % 2 * SLICE + Rows::member(thread) * WARP_KEYS * KEY_WIDTH * 2;
            Path::scores<KEY_WIDTH>(s, q + warp_row(thread) * PITCH + part * KEY_WIDTH * 2, own, thread % LANES);
            if (last) {
                if (args.softcap_in > 0.0f)
                    softmax.cap(s, args.softcap_in);
                bool edge = has_mask(args) || key_first + KEYS > band.safe_high;
                if constexpr (WINDOW)
                    edge |= key_first < band.safe_low;
                if constexpr (PAGED)
                    edge |= pages.has_hole();
                if (edge)
                    mask(s, args, tile, head, key_first, pages);
                stage.values.store(slices + PARTS % 2 * SLICE);
            } else {
                stage.keys.store(slices + (part + 1) % 2 * SLICE);
            }
            __syncthreads(); // the next slice is there, and this one has been read
        }
        const auto fetch_next = [&](int part) {
            if (part + 1 < PARTS) {
                fetch_slice(stage.values, values_of(args, tile, kv_head), key_first, (part + 1) * PART_KEYS, 0, band,
                            pages);
                if constexpr (PAGED)
                    if (part + 2 == PARTS) // nobody asks for this block's pages any more
                        pages.look_up(args, table_of(args, tile), key_first - KEYS, band.low, band.high);
            } else if (block > block_first) {
                if constexpr (!SHARED)
                    pages = next;
                fetch_slice(stage.keys, keys_of(args, tile, kv_head), key_first - KEYS, 0, 0, band, pages);
            }
        };
        const auto store_next = [&](int part) {
            if (part + 1 < PARTS)
                stage.values.store(slices + (PARTS + part + 1) % 2 * SLICE);
            else if (block > block_first)
                stage.keys.store(slices);
            __syncthreads(); // the next slice is there, and this one and, at the end, Q have been read
        };
        fetch_next(0);
        weigh(s, o, softmax, rows, args.log2_scale);
        if constexpr (SHARED) {
            rows.share(s);
            rows.meet();
        }
        accumulate<Path>(o, s, rows, slices + PARTS % 2 * SLICE, 0);
        store_next(0);
#pragma unroll 1
        for (int part = 1; part < PARTS; part++) {
            fetch_next(part);
            accumulate<Path>(o, s, rows, slices + (PARTS + part) % 2 * SLICE, part);
            store_next(part);
        }
    }
    store(args, q, o, softmax, rows, tile, head);
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
