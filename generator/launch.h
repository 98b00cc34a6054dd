/* A built kernel, and its launch on a device. */
#pragma once

#include "export.h"
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

/* image: a cubin, or PTX with a final 0. Sizes in bytes; smem is dynamic shared memory. chained: blocks may start while
 * the launch before still runs, and wait for its end themselves. cluster: blocks that may reach each other's shared
 * memory. prepared: a bit a device. */
struct pa_kernel {
    const void *image;
    const char *entry;
    uint32_t threads, smem, arguments, chained, cluster;
    void *handle;
    _Atomic uint64_t prepared;
};

/* 0, or -1 with a raised error: the kernel on a grid of x * y blocks, its argument record given as bytes. */
int pa_launch(struct pa_kernel *kernel, int device, void *stream, const void *record, unsigned x, unsigned y);

enum { PA_MAP_BYTES = 128, PA_MAP_RANK = 4 };

/* Half-precision rows in device memory, innermost dimension first; strides in bytes, of all dimensions but that. A copy
 * brings a `box` of elements, 64 or 32, swizzled over their bytes, and of dimensions 1 and 2. type: a
 * CUtensorMapDataType. There is no padding, so that tensors may be compared as bytes. */
struct pa_tensor {
    void *address;
    uint64_t sizes[PA_MAP_RANK], strides[PA_MAP_RANK - 1];
    uint16_t box[PA_MAP_RANK - 1], type;
};
_Static_assert(sizeof(struct pa_tensor) == 9 * sizeof(uint64_t), "compared as bytes");

/* 0, or -1 with a raised error: what the copy engine is told of a tensor, PA_MAP_BYTES of it. */
int pa_encode(void *map, const struct pa_tensor *tensor);

/* Raise an error of a Python kind; returns -1. */
int pa_fail(const char *kind, const char *what, const char *why);

/* __tvm_ffi_NAME() returns the kernel's address, which programs name it by. */
#define PA_KERNEL(NAME, FILE, ENTRY, THREADS, SMEM, ARGUMENTS, CHAINED, CLUSTER)                                       \
    __asm__(".section .rodata.pa_images,\"a\"\n.balign 64\npa_image_" #NAME ":\n.incbin \"" FILE                       \
            "\"\n.byte 0\n.previous\n");                                                                               \
    extern const unsigned char pa_image_##NAME[] __attribute__((visibility("hidden")));                                \
    static struct pa_kernel pa_kernel_##NAME = {pa_image_##NAME, ENTRY,   THREADS, SMEM, ARGUMENTS,                    \
                                                CHAINED,         CLUSTER, 0,       0};                                 \
    PA_EXPORT int __tvm_ffi_##NAME(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)                \
    {                                                                                                                  \
        (void)self, (void)args, (void)count;                                                                           \
        result->type_index = kTVMFFIInt;                                                                               \
        result->v_int64 = (int64_t)(intptr_t)&pa_kernel_##NAME;                                                        \
        return 0;                                                                                                      \
    }
