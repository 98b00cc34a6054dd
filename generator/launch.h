/* One built kernel, and the call that tvm-ffi makes to launch it. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

/* image: a cubin, or PTX with a final 0. Sizes in bytes; smem is dynamic shared memory. prepared: a bit a device. */
struct pa_kernel {
    const void *image;
    const char *entry;
    uint32_t threads, smem, arguments;
    void *handle;
    _Atomic uint64_t prepared;
};

int pa_launch(struct pa_kernel *kernel, const TVMFFIAny *args, int32_t count, TVMFFIAny *result);

#define PA_KERNEL(NAME, FILE, ENTRY, THREADS, SMEM, ARGUMENTS)                                                         \
    __asm__(".section .rodata.pa_images,\"a\"\n.balign 64\npa_image_" #NAME ":\n.incbin \"" FILE                       \
            "\"\n.byte 0\n.previous\n");                                                                               \
    extern const unsigned char pa_image_##NAME[] __attribute__((visibility("hidden")));                                \
    static struct pa_kernel pa_kernel_##NAME = {pa_image_##NAME, ENTRY, THREADS, SMEM, ARGUMENTS, 0, 0};               \
    __attribute__((visibility("default"))) int __tvm_ffi_##NAME(void *self, const TVMFFIAny *args, int32_t count,      \
                                                                TVMFFIAny *result)                                     \
    {                                                                                                                  \
        (void)self;                                                                                                    \
        return pa_launch(&pa_kernel_##NAME, args, count, result);                                                      \
    }
