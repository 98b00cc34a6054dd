// Turns paged keys and values into contiguous ones, bit by bit: row t of the results is the token of its sequence that
// stands t - cu_seqlens_k[sequence] tokens from its begin.
//
// One block a token, grid-stride, so that the grid follows from the rows of the results alone; few tokens are cut into
// slices of a block each. Addresses and strides are bytes and 64 bits wide. A token without a page becomes zeros, and
// rows past the last sequence stay as they are.
#pragma once

#include "half.cuh"
#include "memory.cuh"
#include "search.cuh"

namespace pa {

// Where the heads of a token lie, in a cache or in a result.
struct Heads {
    Address first;
    long long stride;
};

// One token's heads of `bytes` each, a Unit an access; units from `first` on, every `step`-th.
template <class Unit>
__device__ inline void copy_heads(const Heads &from, const Heads &to, int heads, int bytes, bool there, int first,
                                  int step)
{
    const int units = bytes / static_cast<int>(sizeof(Unit));
    for (int i = first; i < heads * units; i += step) {
        const int head = i / units;
        const long long at = (i - head * units) * static_cast<int>(sizeof(Unit));
        Unit value = {};
        if (there)
            value = *reinterpret_cast<const Unit *>(from.first + head * from.stride + at);
        *reinterpret_cast<Unit *>(to.first + head * to.stride + at) = value;
    }
}

// Whether every row of heads begins and ends at a multiple of 16 bytes.
__device__ inline bool all_aligned(const Arguments &args)
{
    const Address all = args.k_cache | args.v_cache | args.k | args.v | args.k_page_stride | args.k_token_stride |
                        args.k_head_stride | args.v_page_stride | args.v_token_stride | args.v_head_stride |
                        args.to_k_token_stride | args.to_k_head_stride | args.to_v_token_stride |
                        args.to_v_head_stride | args.head_dim * sizeof(Half) | args.head_dim_v * sizeof(Half);
    return all % sizeof(uint4) == 0;
}

// Where a token is stored; page -1: nowhere.
struct Token {
    int page, offset;
};

// Prefix sums that decrease put tokens before the first.
__device__ inline Token token_of(const Arguments &args, int token, int sequence)
{
    const int position = token - load_int(args.cu_seqlens_k, sequence);
    const int logical = static_cast<unsigned>(position) / static_cast<unsigned>(args.page_size);
    int page = -1;
    if (position >= 0 && logical < args.max_pages)
        page = load_int(args.block_table + sequence * args.table_stride, logical);
    return {page < args.num_pages ? max(page, -1) : -1, position - logical * args.page_size};
}

template <class Unit> __device__ inline void copy_token(const Arguments &args, int token, const Token &from)
{
    const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    const bool there = from.page >= 0;
    const Heads k = {args.k_cache + from.page * args.k_page_stride + from.offset * args.k_token_stride,
                     args.k_head_stride};
    const Heads v = {args.v_cache + from.page * args.v_page_stride + from.offset * args.v_token_stride,
                     args.v_head_stride};
    const Heads to_k = {args.k + token * args.to_k_token_stride, args.to_k_head_stride};
    const Heads to_v = {args.v + token * args.to_v_token_stride, args.to_v_head_stride};
    copy_heads<Unit>(k, to_k, args.kv_heads, args.head_dim * sizeof(Half), there, first, step);
    copy_heads<Unit>(v, to_v, args.kv_heads, args.head_dim_v * sizeof(Half), there, first, step);
}

} // namespace pa

__device__ inline void gather(const Arguments &args)
{
    pa::wait_for_grid();
    pa::start_next_grid();
    const bool aligned = pa::all_aligned(args);
    for (int token = blockIdx.x; token < args.tokens; token += gridDim.x) {
        const int sequence = pa::find_sequence(args.cu_seqlens_k, args.sequences, token);
        if (sequence < 0)
            return;
        const pa::Token from = pa::token_of(args, token, sequence);
        if (aligned)
            pa::copy_token<uint4>(args, token, from);
        else
            pa::copy_token<Half>(args, token, from);
    }
}
