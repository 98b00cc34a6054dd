// Turns what a row must not see into scores of -inf, and adds what a mask tensor says.
#pragma once

#include "pages.cuh"
#include "paths.cuh"
#include "softmax.cuh"

namespace pa {

// Of one row, keys outside [begin, end) and those without a page. All count from this thread's first column of the
// block of keys, bits of `holes` too; `begin` counts where there is a window, `holes` where there are pages.
template <int TILES, int WORDS>
__device__ inline void hide(float (&s)[TILES][Path::REGISTERS], int slot, int begin, int end,
                            const unsigned (&holes)[WORDS])
{
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
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
            s[tile][i] = drop ? PA_NOTHING : s[tile][i];
        }
}

constexpr float HIDING = -1e30f; // an addend at or below it hides, as -inf does: scaled, lower ones overflow

__device__ inline float masked(float score, unsigned char seen, float)
{
    return seen ? score : PA_NOTHING;
}

__device__ inline float masked(float score, float addend, float factor)
{
    return addend <= HIDING ? PA_NOTHING : fmaf(addend, factor, score);
}

__device__ inline float masked(float score, Half addend, float factor)
{
    return masked(score, to_float(addend), factor);
}

// The mask of one row: elements from `row` on are those of this thread's first column and the next; keys from `end` on
// are not read. Elements one by one, so that a row may begin anywhere: a mask's total is whatever the caller has.
template <class Element, int TILES>
__device__ inline void add_row(float (&s)[TILES][Path::REGISTERS], int slot, Address row, int end, float factor)
{
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < Path::REGISTERS; i++) {
            const int key = tile * 8 + i / 4 * 4 + i % 2;
            if (slot_of(i) == slot && key < end)
                s[tile][i] = masked(s[tile][i], reinterpret_cast<const Element *>(row)[key], factor);
        }
}

// The same, by the size of the call's elements; nothing where there is no mask.
template <int TILES, class Args>
__device__ inline void add_mask(float (&s)[TILES][Path::REGISTERS], int slot, const Args &args, Address row, int end)
{
    if (args.mask == 0)
        return;
    if (args.mask_bytes == 1)
        add_row<unsigned char>(s, slot, row, end, args.mask_factor);
    else if (args.mask_bytes == 2)
        add_row<Half>(s, slot, row, end, args.mask_factor);
    else
        add_row<float>(s, slot, row, end, args.mask_factor);
}

} // namespace pa
