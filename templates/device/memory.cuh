// Turns byte addresses into accesses: words and 16-byte runs of global memory, 16-byte runs and pairs of shared memory.
//
// Addresses of global memory are 64 bits wide. Loads stand where they are written (volatile): what is fetched ahead of
// its use must not sink to it.
#pragma once

namespace pa {

constexpr int LANES = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

using Address = unsigned long long;
using Shared = unsigned; // bytes from the start of the block's shared memory

// The same number, of which the compiler knows nothing: what is computed from it inside a loop stays there, and takes no
// register around it.
__device__ inline int opaque(int value)
{
    asm volatile("" : "+r"(value));
    return value;
}

// Nothing after this happens before the grid launched before this one has ended (chaining.py).
__device__ inline void wait_for_grid()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Blocks of the next grid may start, and wait there, once all of this one's have come here or ended.
__device__ inline void start_next_grid()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What lies `index` strides on, neither being negative: half of the instructions that signs take.
__device__ inline Address strides(int index, long long stride)
{
    return static_cast<unsigned>(index) * static_cast<Address>(stride);
}

__device__ inline int load_int(Address base, long long index)
{
    return reinterpret_cast<const int *>(base)[index];
}

// 16 bytes, or zeros where nothing may be read. CONSTANT: nobody writes them while the kernel runs.
template <bool CONSTANT> __device__ inline uint4 fetch(Address address, bool there)
{
    uint4 run = {0, 0, 0, 0};
    if constexpr (CONSTANT)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
                     : "+r"(run.x), "+r"(run.y), "+r"(run.z), "+r"(run.w)
                     : "l"(address), "r"(static_cast<int>(there)));
    else
        asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
                     : "+r"(run.x), "+r"(run.y), "+r"(run.z), "+r"(run.w)
                     : "l"(address), "r"(static_cast<int>(there)));
    return run;
}

__device__ inline void put(Address address, const uint4 &run)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(run.x), "r"(run.y), "r"(run.z),
                 "r"(run.w));
}

__device__ inline Shared shared_address(const void *pointer)
{
    Shared address;
    asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(pointer));
    return address;
}

__device__ inline uint4 load_shared(Shared address)
{
    uint4 run;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(run.x), "=r"(run.y), "=r"(run.z), "=r"(run.w)
                 : "r"(address));
    return run;
}

__device__ inline void store_shared(Shared address, const uint4 &run)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(run.x), "r"(run.y), "r"(run.z),
                 "r"(run.w));
}

__device__ inline float load_shared_float(Shared address)
{
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
    return value;
}

__device__ inline void store_shared(Shared address, unsigned pair)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pair));
}

} // namespace pa
