// Turns what a row must not see into scores of -inf.
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

} // namespace pa
