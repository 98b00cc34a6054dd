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
#include "memory.cuh"
#include "pages.cuh"
#include "softmax.cuh"
#include "tiles.cuh"
#include "worklist.cuh"

#if __CUDA_ARCH__ >= 750
#include "products_sm75.cuh"
#elif __CUDA_ARCH__ >= 700
#include "products_sm70.cuh"
#else
#include "products_sm53.cuh"
#endif

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
using KeyStage = Stage<KEYS, WARPS * LANES>;
using Outputs = float[PIECES][OUTPUT_TILES][Path::REGISTERS];

// Where K or V lies for one KV head: dense rows from `base` on, or rows of pages.
struct Source {
    Address base;
    long long page_stride, token_stride;
    int width; // elements of a row that are there
};

// Keys that some row of a block sees, [low, high), and those that every row sees, [safe_low, safe_high).
struct Band {
    int low, high, safe_low, safe_high;
};

// One block's place in the batch: rows [row_first, row_first + rows) of a sequence whose row 0 stands at key `shift`.
struct Tile {
    int token, rows, position, k_start, k_len, sequence;
};

__device__ inline Tile tile_of(const Arguments &args, const Work &work)
{
    const Span q = span_at(args.cu_seqlens_q, work.sequence, args.tokens);
    Span k = {0, 0};
    if constexpr (PAGED) {
        const int stored = load_int(args.kv_lengths, work.sequence);
        k.length = min(max(stored + args.past_lengths * q.length, 0), args.keys);
    } else {
        k = span_at(args.kv_lengths, work.sequence, args.keys);
    }
    // The last blocks of a causal sequence see most keys: start them first.
    const int first = ((q.length + (ROWS - 1)) / ROWS - 1 - work.block) * ROWS;
    const int rows = min(ROWS, q.length - first);
    return {q.start + first, rows, k.length - q.length + first, k.start, k.length, work.sequence};
}

__device__ inline Band band_of(const Arguments &args, const Tile &tile)
{
    Band band = {0, tile.k_len, 0, tile.k_len};
    if constexpr (CAUSAL || WINDOW) {
        band.high = max(min(tile.k_len, tile.position + tile.rows), 0);
        band.safe_high = min(tile.k_len, tile.position + 1);
    }
    if constexpr (WINDOW) {
        band.low = max(tile.position - args.window + 1, 0);
        band.safe_low = tile.position + tile.rows - args.window;
    }
    return band;
}

// Issue the loads of a block of keys or values; keys outside [low, high) or on unmapped pages become zeros, unread.
__device__ inline void fetch_keys(KeyStage &stage, const Source &source, int key_first, const Band &band,
                                  const Pages<KEYS> &pages)
{
#pragma unroll
    for (int i = 0; i < stage.PASSES; i++) {
        if constexpr (PAGED) {
            const Slot slot = pages.slot_of(stage.row(), i * stage.ROWS_A_PASS);
            const Address from = source.base + slot.page * source.page_stride + slot.offset * source.token_stride;
            stage.template fetch_row<true>(i, from, slot.page >= 0, source.width);
        } else {
            const int key = key_first + stage.row() + i * stage.ROWS_A_PASS;
            const bool there = (!WINDOW || key >= band.low) && key < band.high;
            stage.template fetch_row<true>(i, source.base + key * source.token_stride, there, source.width);
        }
    }
}

// Bring the block's queries in; rows that are not there become zeros.
__device__ inline void load_queries(const Arguments &args, Shared q, const Tile &tile, int head)
{
    const Address base = args.q + tile.token * args.q_token_stride + head * args.q_head_stride;
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

__device__ inline void cap(Scores &s, float scale)
{
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile++)
#pragma unroll
            for (int i = 0; i < Path::REGISTERS; i++)
                s[piece][tile][i] = capped(s[piece][tile][i], scale);
}

// -inf wherever a row (this thread's first at `position`) must not see a key (its first column at `column`).
__device__ inline void mask(Scores &s, const Arguments &args, int position, int column, int k_len,
                            const Pages<KEYS> &pages)
{
    unsigned holes[KEYS / LANES];
    if constexpr (PAGED)
#pragma unroll
        for (int w = 0; w < KEYS / LANES; w++)
            holes[w] = pages.holes(w) >> Path::column(threadIdx.x % LANES);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const int here = position + piece * Path::PIECE_ROWS + slot * Path::ROW_STEP;
            const int end = (CAUSAL || WINDOW ? min(k_len, here + 1) : k_len) - column;
            const int begin = here - args.window + 1 - column;
#pragma unroll
            for (int tile = 0; tile < KEY_TILES; tile++)
#pragma unroll
                for (int i = 0; i < Path::REGISTERS; i++) {
                    if (slot_of(i) != slot)
                        continue;
                    const int key = tile * 8 + i / 4 * 4 + i % 2;
                    bool drop = end <= key;
                    if constexpr (WINDOW)
                        drop |= begin > key;
                    if constexpr (PAGED)
                        drop |= (holes[key / LANES] & 1u << key % LANES) != 0;
                    s[piece][tile][i] = drop ? PA_NOTHING : s[piece][tile][i];
                }
        }
}

// Write the block's rows: through the query tile, so that global stores are 16 bytes wide.
__device__ inline void store(const Arguments &args, Shared shared, const Outputs &o,
                             const Softmax<Path, PIECES, KEY_TILES> &softmax, const Tile &tile, int head)
{
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int warp_row = warp / COLUMN_GROUPS * WARP_ROWS, first = warp % COLUMN_GROUPS * CHANNELS;
    float sink = PA_NOTHING;
    if (args.sinks != 0)
        sink = LOG2_E * (args.sinks_fp32 ? reinterpret_cast<const float *>(args.sinks)[head]
                                         : to_float(reinterpret_cast<const Half *>(args.sinks)[head]));
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            const Finish end = softmax.finish(piece, slot, args.log2_scale, sink);
            const int row = warp_row + piece * Path::PIECE_ROWS + Path::row(lane) + slot * Path::ROW_STEP;
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
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int warp_row = warp / COLUMN_GROUPS * WARP_ROWS, first_channel = warp % COLUMN_GROUPS * CHANNELS;
    const Band band = band_of(args, tile);
    const int block_first = band.low / KEYS, block_end = (band.high + (KEYS - 1)) / KEYS;
    const int kv_head = head / args.group;
    Source keys = {args.k + kv_head * args.k_head_stride, args.k_page_stride, args.k_token_stride,
                   args.head_dim};
    Source values = {args.v + kv_head * args.v_head_stride, args.v_page_stride, args.v_token_stride,
                     args.head_dim_v};
    if constexpr (!PAGED) {
        keys.base += tile.k_start * args.k_token_stride;
        values.base += tile.k_start * args.v_token_stride;
    }
    const Address table = args.block_table + tile.sequence * args.table_stride;

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
            pages.look_up(args, table, (block_end - 1) * KEYS, band.low, band.high);
        fetch_keys(stage, keys, (block_end - 1) * KEYS, band, pages);
        stage.store(k);
        __syncthreads();
    }
#pragma unroll 1
    for (int block = block_end - 1; block >= block_first; block--) {
        const int key_first = block * KEYS;
        fetch_keys(stage, values, key_first, band, pages);
        if constexpr (PAGED)
            next.look_up(args, table, key_first - KEYS, band.low, band.high);
        Path::scores(s, q + warp_row * PITCH, k, lane);
        if (args.softcap_in > 0.0f)
            cap(s, args.softcap_in);
        bool edge = key_first + KEYS > band.safe_high;
        if constexpr (WINDOW)
            edge |= key_first < band.safe_low;
        if constexpr (PAGED)
            edge |= pages.has_hole();
        if (edge)
            mask(s, args, tile.position + warp_row + Path::row(lane), key_first + Path::column(lane), tile.k_len, pages);
        stage.store(v);
        __syncthreads(); // V is there, and K has been read
        if (block > block_first) {
            pages = next;
            fetch_keys(stage, keys, key_first - KEYS, band, pages);
        }
        if (softmax.outgrown(s, args.log2_scale))
            softmax.rescale(s, o, args.log2_scale);
        softmax.exponentiate(s, args.log2_scale);
        Path::accumulate(o, s, v, first_channel, lane);
        if (block > block_first)
            stage.store(k);
        __syncthreads(); // K is there, and V and, at the end, Q have been read
    }
    store(args, q, o, softmax, tile, head);
}

} // namespace pa

__device__ inline void attend(const Arguments &args)
{
#if __CUDA_ARCH__ < 530 || (PA_BF16 && __CUDA_ARCH__ < 800)
    __trap(); // fp16 begins at SM 5.3, bf16 at SM 8.0: never a wrong answer in silence
#else
    extern __shared__ __align__(1024) unsigned char room[];
    const pa::Work work = pa::find_tile(args, ROWS, blockIdx.x);
    if (work.sequence >= 0)
        pa::run_tile(args, pa::tile_of(args, work), blockIdx.y, pa::shared_address(room));
#endif
}
