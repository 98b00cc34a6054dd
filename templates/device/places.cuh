// Turns a block's place in the work list into addresses of its queries, keys and values, and which keys its rows see.
//
// Sequences are packed, rows and keys of one after those of another, or paged; with TENSOR they are padded: each has as
// many rows, found by a stride of its own, and a mask beside them. What a record does not have is not named outside of
// `if constexpr`, for which these are templates.
#pragma once

#include "memory.cuh"
#include "worklist.cuh"

namespace pa {

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

// Keys that one row sees, [begin, end).
struct Edges {
    int begin, end;
};

// One block's place in the batch: rows [first, first + rows) of a sequence, `token` being the first's row in all, and
// `position` where it stands among the sequence's keys.
struct Tile {
    int token, first, rows, position, k_start, k_len, sequence;
};

template <class Args> __device__ inline Tile tile_of(const Args &args, const Work &work)
{
    const Span q = span_at(args.cu_seqlens_q, work.sequence, args.tokens);
    Span k = {0, 0};
    if constexpr (PAGED) {
        const int stored = load_int(args.kv_lengths, work.sequence);
        k.length = min(max(stored + args.past_lengths * q.length, 0), args.keys);
    } else if constexpr (TENSOR) {
        k.length = args.kv_lengths == 0 ? args.keys : min(max(load_int(args.kv_lengths, work.sequence), 0), args.keys);
    } else {
        k = span_at(args.kv_lengths, work.sequence, args.keys);
    }
    // The last blocks of a causal sequence see most keys: start them first.
    const int first = ((q.length + (ROWS - 1)) / ROWS - 1 - work.block) * ROWS;
    const int rows = min(ROWS, q.length - first);
    int position = k.length - q.length + first;
    if constexpr (TENSOR)
        position = args.position + first;
    return {q.start + first, first, rows, position, k.start, k.length, work.sequence};
}

// What the row that stands just before key `next` sees of `k_len`; with TENSOR, causal and window are decided at run time.
template <class Args> __device__ inline Edges edges_of(const Args &args, int k_len, int next)
{
    Edges edges = {0, k_len};
    if constexpr (TENSOR) {
        edges.end = args.causal ? min(k_len, next) : k_len;
        edges.begin = args.window > 0 ? next - args.window : 0;
    } else {
        if constexpr (CAUSAL || WINDOW)
            edges.end = min(k_len, next);
        if constexpr (WINDOW)
            edges.begin = next - args.window;
    }
    return edges;
}

__device__ inline Band band_of(const Arguments &args, const Tile &tile)
{
    const Edges first = edges_of(args, tile.k_len, tile.position + 1);
    const Edges last = edges_of(args, tile.k_len, tile.position + tile.rows);
    return {WINDOW ? max(first.begin, 0) : 0, CAUSAL || WINDOW ? max(last.end, 0) : tile.k_len, last.begin, first.end};
}

template <class Args> __device__ inline Address queries_of(const Args &args, const Tile &tile, int head)
{
    const Address base = args.q + head * args.q_head_stride;
    if constexpr (TENSOR)
        return base + tile.sequence * args.q_sequence_stride + tile.first * args.q_token_stride;
    else
        return base + tile.token * args.q_token_stride;
}

// K and V of one KV head. They are asked for anew for every block of keys, by opaque numbers: an address that is kept
// takes two registers around the loop, of which there are none to spare, a number one.
__device__ inline Source source_of(const Tile &tile, int kv_head, Address base, long long head_stride,
                                   long long page_stride, long long token_stride, int width)
{
    base += opaque(kv_head) * head_stride;
    if constexpr (TENSOR)
        base += opaque(tile.sequence) * page_stride;
    else if constexpr (!PAGED)
        base += opaque(tile.k_start) * token_stride;
    return {base, page_stride, token_stride, width};
}

__device__ inline Source keys_of(const Arguments &args, const Tile &tile, int kv_head)
{
    return source_of(tile, kv_head, args.k, args.k_head_stride, args.k_page_stride, args.k_token_stride, args.head_dim);
}

__device__ inline Source values_of(const Arguments &args, const Tile &tile, int kv_head)
{
    return source_of(tile, kv_head, args.v, args.v_head_stride, args.v_page_stride, args.v_token_stride,
                     args.head_dim_v);
}

__device__ inline Address table_of(const Arguments &args, const Tile &tile)
{
    return args.block_table + opaque(tile.sequence) * args.table_stride;
}

// Whether the call brought a mask: then every block of keys has an edge.
template <class Args> __device__ inline bool has_mask(const Args &args)
{
    if constexpr (TENSOR)
        return args.mask != 0;
    else
        return false;
}

// The mask's element of a row of the tile and a key.
template <class Args>
__device__ inline Address mask_of(const Args &args, const Tile &tile, int head, int row, int key)
{
    return args.mask + opaque(tile.sequence) * args.mask_sequence_stride + opaque(head) * args.mask_head_stride +
           (tile.first + row) * args.mask_row_stride + static_cast<long long>(key) * args.mask_bytes;
}

} // namespace pa
