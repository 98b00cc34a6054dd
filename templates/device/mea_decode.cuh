// Attention of few query rows over many paged keys on every SM: turns equal shares of a batch's key tiles into output
// rows and LSE.
//
// The scheme of decode.py: the rows of a block are the query heads that share a KV head, times the new tokens of a
// sequence, and each warp takes its own keys of every tile with its own running softmax. Without cp.async a warp's keys
// and values take turns in one tile of its own, each on its way through registers while the other is multiplied. Where
// a path's accumulators are too many for one warp, COLUMN_GROUPS warps take the same keys, and each its own channels.
#pragma once

#include "half.cuh"
#include "masks.cuh"
#include "memory.cuh"
#include "pages.cuh"
#include "paths.cuh"
#include "shares.cuh"
#include "softmax.cuh"
#include "states.cuh"
#include "tiles.cuh"

namespace pa {

constexpr int WARP_KEYS = KEYS / WARPS;
constexpr int MOST_ACCUMULATORS = 64; // of outputs, a thread: as many again wait in a stage
constexpr int ACCUMULATORS = HEAD_DIM / 8 * Path::REGISTERS;
constexpr int COLUMN_GROUPS = ACCUMULATORS > MOST_ACCUMULATORS ? ACCUMULATORS / MOST_ACCUMULATORS : 1;
constexpr int KEY_GROUPS = WARPS / COLUMN_GROUPS;
constexpr int STEP_KEYS = WARP_KEYS * KEY_GROUPS; // of a block, a step
constexpr int CHANNELS = HEAD_DIM / COLUMN_GROUPS;
constexpr int OUTPUT_TILES = CHANNELS / 8;
constexpr int KEY_TILES = WARP_KEYS / 8;

static_assert(ROWS <= Path::PIECE_ROWS, "a warp has one piece of rows");

using Scores = float[1][KEY_TILES][Path::REGISTERS];
using Outputs = float[1][OUTPUT_TILES][Path::REGISTERS];
using Statistics = Softmax<Path, 1, KEY_TILES>;
using KeyStage = Stage<WARP_KEYS, HEAD_DIM, LANES>;
using QueryStage = Stage<ROWS, HEAD_DIM, WARPS * LANES>;

struct Source {
    Address base;
    long long page_stride, token_stride;
};

// Tiles [tile, tile + count) of a sequence, for one head and row block, and how the band of keys lies: [low, k_len)
// are seen by some row, [safe_low, safe_high) by every row.
struct Segment {
    Lines lines;
    Address table;
    int shift, key_first, count, low, k_len, safe_low, safe_high;
};

__device__ inline void fetch_keys(KeyStage &stage, const Arguments &args, const Source &source,
                                  const Pages<WARP_KEYS> &pages)
{
#pragma unroll
    for (int i = 0; i < stage.PASSES; i++) {
        const Slot slot = pages.slot_of(stage.row(), i * stage.ROWS_A_PASS);
        const Address from = source.base + strides(slot.page, source.page_stride) + strides(slot.offset, source.token_stride);
        stage.template fetch_row<true>(i, from, slot.page >= 0, args.head_dim);
    }
}

// Issue the loads of the segment's queries; rows that are not there become zeros.
__device__ inline void fetch_queries(QueryStage &stage, const Arguments &args, const Lines &lines)
{
#pragma unroll
    for (int i = 0; i < stage.PASSES; i++) {
        const int row = stage.row() + i * stage.ROWS_A_PASS;
        const Address from =
            args.q + lines.token(args, row) * args.q_token_stride + lines.head(args, row) * args.q_head_stride;
        stage.template fetch_row<false>(i, from, row < lines.live, args.head_dim);
    }
}

// -inf where a row does not see a key; `key_first` is the warp's first.
__device__ inline void mask(Scores &s, const Arguments &args, const Segment &segment, int key_first,
                            const Pages<WARP_KEYS> &pages)
{
    const int lane = threadIdx.x % LANES, column = key_first + Path::column(lane);
    unsigned holes[1];
    pages.holes(holes, Path::column(lane));
#pragma unroll
    for (int slot = 0; slot < 2; slot++) {
        const int here = segment.shift + (segment.lines.first + Path::row(lane) + slot * Path::ROW_STEP) / args.group;
        const int end = args.causal ? min(segment.k_len, here + 1) : segment.k_len;
        hide(s[0], slot, here - args.window + 1 - column, end - column, holes);
    }
}

// Add up the warps' states of `live` rows, key group after key group, in shared memory; the block's other tiles are no
// longer needed.
__device__ inline void publish(float *state, const Outputs &o, const Statistics &softmax, float log2_scale, int live)
{
    __shared__ float2 all[KEY_GROUPS][ROWS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int group = warp / COLUMN_GROUPS, first = warp % COLUMN_GROUPS * CHANNELS;
#pragma unroll
    for (int slot = 0; slot < 2; slot++) {
        const int row = Path::row(lane) + slot * Path::ROW_STEP;
        const float total = softmax.total(0, slot);
        if (Path::column(lane) == 0 && first == 0 && row < ROWS)
            all[group][row] = {softmax.top[0][slot] * log2_scale, total};
    }
    __syncthreads();
#pragma unroll 1
    for (int turn = 0; turn < KEY_GROUPS; turn++) {
        if (group == turn)
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const int row = Path::row(lane) + slot * Path::ROW_STEP;
                if (row >= live)
                    continue;
                float top = PA_NOTHING, sum = 0.0f;
#pragma unroll
                for (int i = 0; i < KEY_GROUPS; i++)
                    top = fmaxf(top, all[i][row].x);
                const float base = top == PA_NOTHING ? 0.0f : top;
#pragma unroll
                for (int i = 0; i < KEY_GROUPS; i++)
                    sum += exp2_fast(all[i][row].x - base) * all[i][row].y;
                const float weight = exp2_fast(all[group][row].x - base);
#pragma unroll
                for (int out = 0; out < OUTPUT_TILES; out++)
#pragma unroll
                    for (int half = 0; half < Path::REGISTERS / 4; half++) {
                        const float *pair = &o[0][out][half * 4 + slot * 2];
                        float2 &at = *reinterpret_cast<float2 *>(state + row * HEAD_DIM + first +
                                                                 Path::channel(lane, out, half));
                        const float2 before = turn == 0 ? float2{0.0f, 0.0f} : at;
                        at = {before.x + weight * pair[0], before.y + weight * pair[1]};
                    }
                if (turn == 0 && Path::column(lane) == 0 && first == 0)
                    *reinterpret_cast<float2 *>(state + ROWS * HEAD_DIM + row * 2) = {top, sum};
            }
        __syncthreads();
    }
}

// Attend over the segment's tiles and leave the block's state in shared memory.
__device__ inline void walk(const Arguments &args, const Segment &segment, unsigned char *room)
{
    const Shared q = shared_address(room);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const Shared tile = q + ROWS * PITCH + warp * (WARP_KEYS * PITCH);
    const int first_channel = warp % COLUMN_GROUPS * CHANNELS;
    const int kv_head = segment.lines.kv_head;
    const Source keys = {args.k + kv_head * args.k_head_stride, args.k_page_stride, args.k_token_stride};
    const Source values = {args.v + kv_head * args.v_head_stride, args.v_page_stride, args.v_token_stride};
    Pages<WARP_KEYS> pages, next; // of this tile, and of the one after it
    KeyStage stage;
    int key = segment.key_first + warp / COLUMN_GROUPS * WARP_KEYS;
    {
        // All that the first tile needs is on its way at once, in the registers of the outputs to come.
        QueryStage queries;
        KeyStage first;
        fetch_queries(queries, args, segment.lines);
        pages.look_up(args, segment.table, key, segment.low, segment.k_len);
        fetch_keys(first, args, keys, pages);
        fetch_keys(stage, args, values, pages);
        next.look_up(args, segment.table, key + STEP_KEYS, segment.low, segment.k_len);
        queries.store(q);
        first.store(tile);
    }
    __syncthreads();
    Statistics softmax;
    Scores s;
    Outputs o;
    clear(o);
#pragma unroll 1
    for (int i = 0; i < segment.count; i++, key += STEP_KEYS) {
        clear(s);
        Path::scores<HEAD_DIM>(s, q, tile, lane);
        if (args.softcap_in > 0.0f)
            softmax.cap(s, args.softcap_in);
        bool edge = key + WARP_KEYS > segment.safe_high || pages.has_hole();
        if constexpr (WINDOW)
            edge |= key < segment.safe_low;
        if (edge)
            mask(s, args, segment, key, pages);
        __syncwarp(); // every lane has read the keys
        stage.store(tile);
        __syncwarp();
        pages = next;
        if (i + 1 < segment.count)
            fetch_keys(stage, args, keys, pages);
        if (__any_sync(ALL_LANES, softmax.outgrown(s, args.log2_scale))) {
            float most[1][2];
            softmax.maxima(s, most);
            softmax.rescale(most, o, args.log2_scale);
        }
        softmax.exponentiate(s, args.log2_scale);
        Path::accumulate<WARP_KEYS>(o, s, tile, first_channel, lane);
        __syncwarp(); // every lane has read the values
        if (i + 1 < segment.count) {
            stage.store(tile);
            fetch_keys(stage, args, values, pages);
            next.look_up(args, segment.table, key + 2 * STEP_KEYS, segment.low, segment.k_len);
        }
        __syncwarp();
    }
    publish(reinterpret_cast<float *>(room), o, softmax, args.log2_scale, segment.lines.live);
}

// Tiles [tile, tile + count) of `sequence`, whose tiles begin at `base`, for the head and row block `place`.
__device__ inline void run_segment(const Arguments &args, unsigned char *room, const Share &share,
                                   const Sequence &sequence, int place, int tile, int count)
{
    const int kv_head = place / sequence.blocks, row_first = (place - kv_head * sequence.blocks) * ROWS;
    const int live = min(sequence.q_len * args.group - row_first, ROWS), shift = sequence.k_len - sequence.q_len;
    const Lines lines = {sequence.q_start, kv_head, row_first, live};
    const Address table = args.block_table + share.sequence * args.table_stride;
    Segment segment = {lines, table, shift, (sequence.first + tile) * STEP_KEYS, count, 0, sequence.k_len,
                       0,     sequence.k_len};
    if (args.causal)
        segment.safe_high = min(sequence.k_len, shift + row_first / args.group + 1);
    if constexpr (WINDOW) {
        segment.low = max(shift - args.window + 1, 0);
        segment.safe_low = shift + (row_first + live - 1) / args.group - args.window + 1;
    }
    walk(args, segment, room);
    const float *state = reinterpret_cast<const float *>(room);
    if (count == sequence.tiles) {
        finish(args, state, lines);
    } else {
        const int start = share.base + place * sequence.tiles;
        settle(args, state, lines, share.total, start, start + sequence.tiles);
    }
    __syncthreads(); // the state has been read
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
    pa::Share share = pa::find_share<ROWS, pa::STEP_KEYS, WINDOW>(args);
    for (int unit = share.begin; unit < share.end;) {
        const pa::Sequence sequence = pa::sequence_at<ROWS, pa::STEP_KEYS, WINDOW>(args, share.sequence);
        const int whole = sequence.tiles * sequence.blocks * args.kv_heads;
        if (unit >= share.base + whole) {
            share.base += whole;
            share.sequence++;
            continue;
        }
        const int place = (unit - share.base) / sequence.tiles, tile = unit - share.base - place * sequence.tiles;
        const int count = min(sequence.tiles - tile, share.end - unit);
        pa::run_segment(args, room, share, sequence, place, tile, count);
        unit += count;
    }
#endif
}
