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

constexpr int STATE_FLOATS = ROWS * (HEAD_DIM + 2);
constexpr int ROW_THREADS = WARPS * LANES / ROWS; // that share out a row's outputs, four neighbours each at a time
constexpr int ROW_STEP = 4 * ROW_THREADS;
constexpr int ROW_RUNS = HEAD_DIM / ROW_STEP;

// One thread's part of a row's outputs, with the row's maximum and sum.
struct RowState {
    float4 values[ROW_RUNS];
    float top, sum;

    __device__ RowState() : top(PA_NOTHING), sum(0.0f)
    {
#pragma unroll
        for (int i = 0; i < ROW_RUNS; i++)
            values[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }

    // Add a part of which `load` brings four outputs at a time.
    template <class Load> __device__ void add(float2 stats, const Load &load)
    {
        const float peak = fmaxf(top, stats.x), base = peak == PA_NOTHING ? 0.0f : peak;
        const float keep = exp2_fast(top - base), gain = exp2_fast(stats.x - base);
#pragma unroll
        for (int i = 0; i < ROW_RUNS; i++) {
            const float4 part = load(i);
            values[i].x = values[i].x * keep + part.x * gain;
            values[i].y = values[i].y * keep + part.y * gain;
            values[i].z = values[i].z * keep + part.z * gain;
            values[i].w = values[i].w * keep + part.w * gain;
        }
        top = peak;
        sum = sum * keep + stats.y * gain;
    }
};

__device__ inline int state_row()
{
    return threadIdx.x / ROW_THREADS;
}

__device__ inline int state_column(int run)
{
    return threadIdx.x % ROW_THREADS * 4 + run * ROW_STEP;
}

__device__ inline int stats_at()
{
    return ROWS * HEAD_DIM + state_row() * 2;
}

// Add the state in shared memory, or the one at `slot` of the workspace.
__device__ inline void add_shared(RowState &row, const float *state)
{
    const float2 stats = *reinterpret_cast<const float2 *>(state + stats_at());
    row.add(stats, [=](int run) {
        return *reinterpret_cast<const float4 *>(state + state_row() * HEAD_DIM + state_column(run));
    });
}

__device__ inline Address slot_at(const Arguments &args, long long slot)
{
    return args.partials + slot * (STATE_FLOATS * 4);
}

__device__ inline void add_part(RowState &row, Address state)
{
    row.add(load_fresh_pair(state + stats_at() * 4), [=](int run) {
        return load_fresh(state + (state_row() * HEAD_DIM + state_column(run)) * 4);
    });
}

// Write output rows and LSE. A row that sees no key gives zeros by select, whatever its accumulator holds.
__device__ inline void write_row(const Arguments &args, const Lines &lines, const RowState &row)
{
    const int line = state_row();
    if (line >= lines.live)
        return;
    const int token = lines.token(args, line), head = lines.head(args, line);
    const float sink = sink_of(args, head);
    const Finish end = finish_of(row.top, row.sum, sink);
    if (args.lse != 0 && state_column(0) == 0)
        reinterpret_cast<float *>(args.lse + head * args.lse_head_stride)[token] = end.lse * LN_2;
    const Address target = args.out + token * args.out_token_stride + head * args.out_head_stride;
#pragma unroll
    for (int i = 0; i < ROW_RUNS; i++) {
        const float4 &value = row.values[i];
        uint2 words = {pair_of(value.x * end.scale, value.y * end.scale),
                       pair_of(value.z * end.scale, value.w * end.scale)};
        if (end.scale == 0.0f)
            words = {0, 0};
        if (state_column(i) < args.head_dim)
            *reinterpret_cast<uint2 *>(target + state_column(i) * 2) = words;
    }
}

// Leave this block's part, in shared memory, in the workspace; the last part of tiles [start, stop) merges them all.
__device__ inline void settle(const Arguments &args, const float *state, const Lines &lines, int total, int start,
                              int stop)
{
    __shared__ unsigned arrived;
    const int block = blockIdx.x, opener = owner_of(start, total);
    const unsigned parts = owner_of(stop - 1, total) - opener + 1;
    const Address target = slot_at(args, block * 2ll + (block == opener));
#pragma unroll
    for (int i = 0; i < ROW_RUNS; i++) {
        const int at = state_row() * HEAD_DIM + state_column(i);
        *reinterpret_cast<float4 *>(target + at * 4) = *reinterpret_cast<const float4 *>(state + at);
    }
    if (state_column(0) == 0)
        *reinterpret_cast<float2 *>(target + stats_at() * 4) = *reinterpret_cast<const float2 *>(state + stats_at());
    __threadfence();
    __syncthreads();
    unsigned *const counter = reinterpret_cast<unsigned *>(args.counters) + opener;
    if (threadIdx.x == 0)
        arrived = atomicAdd(counter, 1u);
    __syncthreads();
    if (arrived != parts - 1)
        return;
    __threadfence();
    if (threadIdx.x == 0)
        *counter = 0;
    RowState row;
    for (unsigned part = 0; part < parts; part++)
        add_part(row, slot_at(args, (opener + static_cast<long long>(part)) * 2 + (part == 0)));
    write_row(args, lines, row);
}

} // namespace pa
