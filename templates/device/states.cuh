// Partial attention states of a row block: turns what warps and blocks found over parts of the keys into output rows.
//
// A state is rows of fp32 outputs relative to a maximum, then (maximum, sum) a row, in base 2. The warps of a block add
// theirs up one after the other in shared memory; a block whose share was cut leaves the sum in the workspace, and the
// last to arrive adds up all parts in their order, so that results depend on no timing.
#pragma once

#include "half.cuh"
#include "memory.cuh"
#include "shares.cuh"
#include "softmax.cuh"

namespace pa {

// Rows of one head group: `live` of them, from line `first` on, a line being a query head of a token.
struct Lines {
    int q_start, kv_head, first, live;

    __device__ int token(const Arguments &args, int row) const
    {
        return q_start + (first + row) / args.group;
    }

    __device__ int head(const Arguments &args, int row) const
    {
        return kv_head * args.group + (first + row) % args.group;
    }
};

// What was written by other blocks of this launch: past the first cache, which does not hear of it.
__device__ inline float4 load_fresh(Address address)
{
    float4 run;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(run.x), "=f"(run.y), "=f"(run.z), "=f"(run.w)
                 : "l"(address));
    return run;
}

__device__ inline float2 load_fresh_pair(Address address)
{
    float2 pair;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(address));
    return pair;
}

// Writes of this thread, and of those that it has met at a barrier, come before what it does next, for the whole device.
// __threadfence() also puts all fences in one order, which costs as much again from SM 7.0 on and serves nobody here.
__device__ inline void fence()
{
#if __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
    __threadfence();
#endif
}

constexpr int STATE_FLOATS = ROWS * (HEAD_DIM + 2);
constexpr int QUADS = HEAD_DIM / 4; // of a row: four neighbouring outputs that move in one access
constexpr int PARTS_AT_ONCE = 8;    // on their way from the workspace, a thread

// Four outputs of a row, with the row's maximum and sum.
struct Quad {
    float4 values;
    float2 stats;
};

// Where a quad lies: its row, its first channel.
struct Place {
    int row, column;

    __device__ explicit Place(int quad) : row(quad / QUADS), column(quad % QUADS * 4)
    {
    }

    __device__ int values() const
    {
        return row * HEAD_DIM + column;
    }

    __device__ int stats() const
    {
        return ROWS * HEAD_DIM + row * 2;
    }
};

__device__ inline Quad quad_of(const float *state, const Place &place)
{
    return {*reinterpret_cast<const float4 *>(state + place.values()),
            *reinterpret_cast<const float2 *>(state + place.stats())};
}

__device__ inline Address slot_at(const Arguments &args, long long slot)
{
    return args.partials + slot * (STATE_FLOATS * 4);
}

// The sum of a row's parts, which lie in the workspace from `opener` on: PARTS_AT_ONCE are asked for before any is
// waited for. Past the last part stands the last again, with no weight.
__device__ inline Quad merged(const Arguments &args, const Place &place, int opener, int parts)
{
    Quad sum = {{0.0f, 0.0f, 0.0f, 0.0f}, {PA_NOTHING, 0.0f}};
#pragma unroll 1
    for (int first = 0; first < parts; first += PARTS_AT_ONCE) {
        Quad part[PARTS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++) {
            const int index = min(first + i, parts - 1);
            const Address state = slot_at(args, (opener + index) * 2ll + (index == 0));
            part[i] = {load_fresh(state + place.values() * 4), load_fresh_pair(state + place.stats() * 4)};
        }
        float peak = sum.stats.x;
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++)
            peak = fmaxf(peak, part[i].stats.x);
        const float base = peak == PA_NOTHING ? 0.0f : peak, keep = exp2_fast(sum.stats.x - base);
        sum = {{sum.values.x * keep, sum.values.y * keep, sum.values.z * keep, sum.values.w * keep},
               {peak, sum.stats.y * keep}};
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++) {
            const float gain = first + i < parts ? exp2_fast(part[i].stats.x - base) : 0.0f;
            sum.values.x += part[i].values.x * gain;
            sum.values.y += part[i].values.y * gain;
            sum.values.z += part[i].values.z * gain;
            sum.values.w += part[i].values.w * gain;
            sum.stats.y += part[i].stats.y * gain;
        }
    }
    return sum;
}

// Write four outputs of a row, and its LSE. A row that sees no key gives zeros by select, whatever its accumulator holds.
__device__ inline void write_quad(const Arguments &args, const Lines &lines, const Place &place, const Quad &quad)
{
    const int token = lines.token(args, place.row), head = lines.head(args, place.row);
    const Finish end = finish_of(quad.stats.x, quad.stats.y, sink_of(args, head));
    if (args.lse != 0 && place.column == 0)
        reinterpret_cast<float *>(args.lse + head * args.lse_head_stride)[token] = end.lse * LN_2;
    const float4 &value = quad.values;
    uint2 words = {pair_of(value.x * end.scale, value.y * end.scale),
                   pair_of(value.z * end.scale, value.w * end.scale)};
    if (end.scale == 0.0f)
        words = {0, 0};
    const Address target = args.out + token * args.out_token_stride + head * args.out_head_stride;
    if (place.column < args.head_dim)
        *reinterpret_cast<uint2 *>(target + place.column * 2) = words;
}

// Do `work` for this thread's quads of the rows that are there.
template <class Work> __device__ inline void each_quad(const Lines &lines, const Work &work)
{
#pragma unroll 1
    for (int quad = threadIdx.x; quad < lines.live * QUADS; quad += WARPS * LANES)
        work(Place(quad));
}

// The state in shared memory is that of whole rows: write them.
__device__ inline void finish(const Arguments &args, const float *state, const Lines &lines)
{
    each_quad(lines, [&](const Place &place) { write_quad(args, lines, place, quad_of(state, place)); });
}

// Leave this block's part, in shared memory, in the workspace; the last part of tiles [start, stop) merges them all.
__device__ inline void settle(const Arguments &args, const float *state, const Lines &lines, int total, int start,
                              int stop)
{
    __shared__ int arrived;
    const Cut cut(total);
    const int block = blockIdx.x, opener = cut.owner(start), parts = cut.owner(stop - 1) - opener + 1;
    const Address target = slot_at(args, block * 2ll + (block == opener));
    each_quad(lines, [&](const Place &place) {
        const Quad quad = quad_of(state, place);
        *reinterpret_cast<float4 *>(target + place.values() * 4) = quad.values;
        if (place.column == 0)
            *reinterpret_cast<float2 *>(target + place.stats() * 4) = quad.stats;
    });
    fence();
    __syncthreads();
    unsigned *const counter = reinterpret_cast<unsigned *>(args.counters) + opener;
    if (threadIdx.x == 0)
        arrived = atomicAdd(counter, 1u);
    __syncthreads();
    if (arrived != parts - 1)
        return;
    fence();
    if (threadIdx.x == 0)
        *counter = 0;
    each_quad(lines, [&](const Place &place) { write_quad(args, lines, place, merged(args, place, opener, parts)); });
}

} // namespace pa
