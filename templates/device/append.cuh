// Turns the new tokens of a batch into cache rows: splits packed QKV, rotates queries and keys, stores keys and values.
//
// One block a token, grid-stride, so that the grid follows from the number of tokens alone; few tokens are cut into
// slices of a block each. A token finds its sequence by a search of cu_seqlens_q, its position from past_lens, its
// slot in slot_mapping or through the block table. Addresses and strides are bytes and 64 bits wide. Arithmetic is fp32,
// rounded once.
#pragma once

#include "half.cuh"
#include "memory.cuh"
#include "search.cuh"

namespace pa {

enum Fault : unsigned { POSITION = 1, SLOT = 2 };

constexpr int VECTOR = 8; // elements of 16 bytes

__device__ inline void raise(const Arguments &args, Fault fault)
{
    if (threadIdx.x == 0)
        atomicOr(reinterpret_cast<unsigned *>(args.faults), fault);
}

// Where a token goes: its row of cos and sin, its slot in the caches (-1: nowhere).
struct Place {
    int position;
    long long page;
    int offset;
};

__device__ inline Place slot_of(const Arguments &args, long long slot, int position)
{
    if (slot < 0 || slot >= static_cast<long long>(args.num_pages) * args.page_size) {
        if (slot != -1)
            raise(args, SLOT);
        return {position, -1, 0};
    }
    const long long page = slot / args.page_size;
    return {position, page, static_cast<int>(slot - page * args.page_size)};
}

__device__ inline Place page_of(const Arguments &args, int sequence, int position)
{
    const int index = position / args.page_size;
    int page = -1;
    if (position >= 0 && index < args.max_pages)
        page = load_int(args.block_table + sequence * args.table_stride, index);
    if (page < 0 || page >= args.num_pages) {
        raise(args, SLOT);
        return {position, -1, 0};
    }
    return {position, page, position - index * args.page_size};
}

__device__ inline int rotary_row(const Arguments &args, int position)
{
    const int row = min(max(position, 0), args.positions - 1);
    if (row != position)
        raise(args, POSITION);
    return row;
}

template <int N> __device__ inline Run<Half, N> load(Address address)
{
    return *reinterpret_cast<const Run<Half, N> *>(address);
}

template <int N> __device__ inline void store(Address address, const Run<Half, N> &run)
{
    *reinterpret_cast<Run<Half, N> *>(address) = run;
}

// N factors of a row of cos or sin, from channel `first` on.
template <int N> __device__ inline Run<float, N> factors(const Arguments &args, Address table, int row, int first)
{
    const Address address = table + row * args.rotary_stride;
    if (args.rotary_fp32)
        return *reinterpret_cast<const Run<float, N> *>(address + first * 4ll);
    const Run<Half, N> narrow = load<N>(address + first * 2ll);
    Run<float, N> wide;
#pragma unroll
    for (int i = 0; i < N; i++)
        wide.at[i] = to_float(narrow.at[i]);
    return wide;
}

// Real parts `a` and imaginary parts `b` become neighbours: the first N elements in `a`, the others in `b`.
template <int N> __device__ inline void interleave(Run<Half, N> &a, Run<Half, N> &b)
{
    const Run<Half, N> real = a, imaginary = b;
#pragma unroll
    for (int i = 0; i < 2 * N; i++) {
        const Half value = i % 2 ? imaginary.at[i / 2] : real.at[i / 2];
        (i < N ? a.at[i % N] : b.at[i % N]) = value;
    }
}

// Rotate N pairs of one head, from pair `first` on. Half-split pairs lie rotary_dim / 2 apart, interleaved ones adjoin.
template <int N>
__device__ inline void rotate(const Arguments &args, Address source, Address target, int row, int first)
{
    const long long left = (args.interleaved ? 2 * first : first) * 2ll;
    const long long right = args.interleaved ? left + N * 2ll : left + args.rotary_dim;
    const Run<Half, N> a = load<N>(source + left), b = load<N>(source + right);
    const Run<float, N> cos = factors<N>(args, args.cos, row, first), sin = factors<N>(args, args.sin, row, first);
    Run<Half, N> c, d;
#pragma unroll
    for (int i = 0; i < N; i++) {
        // Where pair i of an interleaved run lies: 2N elements, of which `a` holds the first N.
        const int at = 2 * i % N;
        const bool first_half = 2 * i < N;
        const Half next = N == 1 ? b.at[0] : first_half ? a.at[(at + 1) % N] : b.at[(at + 1) % N];
        const Half x = args.interleaved ? (first_half ? a.at[at] : b.at[at]) : a.at[i];
        const Half y = args.interleaved ? next : b.at[i];
        const float real = to_float(x), imaginary = to_float(y);
        c.at[i] = to_half(real * cos.at[i] - imaginary * sin.at[i]);
        d.at[i] = to_half(imaginary * cos.at[i] + real * sin.at[i]);
    }
    if (args.interleaved)
        interleave(c, d);
    store<N>(target + left, c);
    store<N>(target + right, d);
}

// All heads of one token, N elements an access: first the pairs to rotate, then channels and values to copy.
template <int N> __device__ inline void store_token(const Arguments &args, int token, const Place &place)
{
    const Address query = args.query + token * args.query_token_stride;
    const Address key = args.key + token * args.key_token_stride;
    const Address value = args.value + token * args.value_token_stride;
    const Address query_row = args.query_out + token * args.out_token_stride;
    const Address key_row = args.k_cache + place.page * args.k_page_stride + place.offset * args.k_token_stride;
    const Address value_row = args.v_cache + place.page * args.v_page_stride + place.offset * args.v_token_stride;
    const int kv_heads = place.page < 0 ? 0 : args.kv_heads;
    const int heads = args.query_heads + kv_heads;
    const int pairs = args.rotary_dim / 2 / N;
    const int copies = (args.head_dim - args.rotary_dim) / N;
    const int values = args.head_dim_v / N;
    const int rotations = heads * pairs, passed = rotations + heads * copies;
    const int row = args.rotary_dim > 0 ? rotary_row(args, place.position) : 0;
    const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    for (int i = first; i < passed + kv_heads * values; i += step) {
        if (i >= passed) {
            const int head = (i - passed) / values, at = (i - passed) % values * N * 2;
            store<N>(value_row + head * args.v_head_stride + at,
                     load<N>(value + head * args.value_head_stride + at));
            continue;
        }
        const bool turn = i < rotations;
        const int unit = turn ? i : i - rotations, width = turn ? pairs : copies;
        const int head = unit / width, run = unit % width * N, kv_head = head - args.query_heads;
        const Address source =
            kv_head < 0 ? query + head * args.query_head_stride : key + kv_head * args.key_head_stride;
        const Address target =
            kv_head < 0 ? query_row + head * args.out_head_stride : key_row + kv_head * args.k_head_stride;
        if (turn)
            rotate<N>(args, source, target, row, run);
        else
            store<N>(target + (args.rotary_dim + run) * 2ll, load<N>(source + (args.rotary_dim + run) * 2ll));
    }
}

} // namespace pa

__device__ inline void append(const Arguments &args)
{
    pa::wait_for_grid();
    pa::start_next_grid();
    for (int token = blockIdx.x; token < args.tokens; token += gridDim.x) {
        int sequence = 0, position = 0;
        if (args.cu_seqlens_q != 0) {
            sequence = pa::find_sequence(args.cu_seqlens_q, args.sequences, token);
            if (sequence < 0)
                return;
            position = pa::load_int(args.past_lens, sequence) + token - pa::load_int(args.cu_seqlens_q, sequence);
        }
        const pa::Place place =
            args.slots != 0 ? pa::slot_of(args, reinterpret_cast<const long long *>(args.slots)[token], position)
                            : pa::page_of(args, sequence, position);
        if (args.aligned)
            pa::store_token<pa::VECTOR>(args, token, place);
        else
            pa::store_token<1>(args, token, place);
    }
}
