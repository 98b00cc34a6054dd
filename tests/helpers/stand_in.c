/* A stand-in libcuda.so.1 that prints what a launch asks for; FAKE_CUDA_ERROR makes the named call fail with 700.
 * With -DQUIET it does nothing, as fast as it can: what is left of a call is the host's own work. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef QUIET
#define printf(...) 0
#define getenv(name) NULL
#endif

static void *current;

/* As PyTorch tells a device's stream: whichever the test says is the current one. */
void *stand_in_current_stream;
int stand_in_stream(int32_t device, void **stream) { return *stream = stand_in_current_stream, 0; }

static int code(const char *call)
{
    const char *bad = getenv("FAKE_CUDA_ERROR");
    return bad != NULL && strcmp(bad, call) == 0 ? 700 : 0;
}

int cuGetErrorName(int error, const char **text) { return *text = error == 700 ? "CUDA_ERROR_FAKE" : "?", 0; }
int cuGetErrorString(int error, const char **text) { return *text = error == 700 ? "as asked" : "?", 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(intptr_t)(device + 1), 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxSetCurrent(void *context) { return printf("context %d\n", (int)(intptr_t)context), current = context, 0; }
int cuLibraryLoadData(void **library, const void *image, void *a, void *b, unsigned c, void *d, void *e, unsigned f)
{
    printf("load %.3s\n", (const char *)image + 1);
    return *library = (void *)image, code("cuLibraryLoadData");
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name)
{
    printf("kernel %s\n", name);
    return *kernel = library, code("cuLibraryGetKernel");
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device)
{
    return printf("attribute %d = %d on %d\n", attribute, value, device), 0;
}
int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill)
{
    uint64_t words[16] = {(uintptr_t)address};
    memcpy(words + 1, sizes, 4 * sizeof *words);
    memcpy(words + 5, strides, 3 * sizeof *words);
    for (int i = 0; i < 3; i++)
        words[8 + i] = box[i];
    words[11] = (uint64_t)type;
    memcpy(map, words, sizeof words);
    if (box[0] * 2 != 16u << swizzle) /* bytes: the driver takes fewer, and our kernels do not */
        return 1;
    return code("cuTensorMapEncodeTiled");
}
struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    const uint64_t *attributes;
    unsigned count;
};
static void print_attributes(const struct config *config)
{
    for (const uint64_t *each = config->attributes; each < config->attributes + 9 * config->count; each += 9)
        printf(", attribute %d = %d %d %d", (int)each[0], (int)each[1], (int)(each[1] >> 32), (int)each[2]);
    printf("\n");
}
int cuOccupancyMaxActiveClusters(int *clusters, void *kernel, const struct config *config)
{
    printf("clusters of %u x %u, %u B shared", config->grid[0], config->block[0], config->shared);
    print_attributes(config);
    return *clusters = 30, code("cuOccupancyMaxActiveClusters");
}
int cuLaunchKernelEx(const struct config *config, void *kernel, void **parameters, void **extra)
{
    size_t size = *(size_t *)extra[3];
    printf("launch %u %u %u x %u, %u B shared, stream %d, %zu B:", config->grid[0], config->grid[1], config->grid[2],
           config->block[0], config->shared, (int)(intptr_t)config->stream, size);
    for (size_t i = 0; i < size; i += 8)
        printf(" %d", *(const int *)((const char *)extra[1] + i));
    print_attributes(config);
    return code("cuLaunchKernelEx");
}
