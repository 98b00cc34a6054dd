/* Turns a kernel, its argument record and a grid into a launch through the driver, which is opened at the first one:
 * a product needs no CUDA library to be loaded, and runs with any CUDA of its driver's generation.
 *
 * An image is loaded once a process and prepared once a device. Nothing synchronises and nothing is copied. */
#include "launch.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { SHARED_BYTES = 8, SHARED_CARVEOUT = 9 }; /* CUfunction_attribute */
enum { DEVICES = 64, ALL_SHARED = 100 };
#define BUFFER ((void *)1) /* CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END */
#define BUFFER_SIZE ((void *)2)
#define BUFFER_END ((void *)0)

typedef void *handle;

struct attribute { /* CUlaunchAttribute */
    uint64_t id;
    uint64_t value[8];
};

struct config { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    handle stream;
    const struct attribute *attributes;
    unsigned count;
};

static struct {
    int (*cuGetErrorName)(int, const char **);
    int (*cuGetErrorString)(int, const char **);
    int (*cuDevicePrimaryCtxRetain)(handle *, int);
    int (*cuCtxGetCurrent)(handle *);
    int (*cuCtxSetCurrent)(handle);
    int (*cuLibraryLoadData)(handle *, const void *, handle, handle, unsigned, handle, handle, unsigned);
    int (*cuLibraryGetKernel)(handle *, handle, const char *);
    int (*cuKernelSetAttribute)(int, int, handle, int);
    int (*cuLaunchKernelEx)(const struct config *, handle, void **, void **);
    int (*cuOccupancyMaxActiveClusters)(int *, handle, const struct config *);
    int (*cuTensorMapEncodeTiled)(void *, int, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *,
                                  const uint32_t *, int, int, int, int);
} driver;
static handle contexts[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int opened;

int pa_fail(const char *kind, const char *what, const char *why)
{
    char text[1024];
    snprintf(text, sizeof text, "%s: %s", what, why);
    TVMFFIErrorSetRaisedFromCStr(kind, text);
    return -1;
}

static int check(int code, const char *call, const char *entry)
{
    if (code == 0)
        return 0;
    const char *name = "unknown", *text = "";
    char what[256], why[256];
    driver.cuGetErrorName(code, &name);
    driver.cuGetErrorString(code, &text);
    snprintf(what, sizeof what, "%.*s of %s", (int)strcspn(call, "("), call, entry);
    snprintf(why, sizeof why, "CUDA error %d, %s: %s", code, name, text);
    return pa_fail("RuntimeError", what, why);
}

#define CHECK(CALL, ENTRY)                                                                                             \
    do {                                                                                                               \
        if (check(driver.CALL, #CALL, ENTRY))                                                                          \
            return -1;                                                                                                 \
    } while (0)

static int open_driver(void)
{
    static const char *const names[] = {
        "cuGetErrorName",    "cuGetErrorString",   "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent",
        "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute",     "cuLaunchKernelEx",
        "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeTiled"};
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == NULL)
        return pa_fail("RuntimeError", "no NVIDIA driver", dlerror());
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *symbol = dlsym(library, names[i]);
        if (symbol == NULL)
            return pa_fail("RuntimeError", "the driver is too old, CUDA 12 is needed; it lacks", names[i]);
        memcpy((char *)&driver + i * sizeof symbol, &symbol, sizeof symbol);
    }
    atomic_store(&opened, 1);
    return 0;
}

/* Load the image, take the device's context, allow the shared memory; under the lock, once for each device. */
static int prepare(struct pa_kernel *kernel, int device)
{
    if (!opened && open_driver())
        return -1;
    if (contexts[device] == NULL)
        CHECK(cuDevicePrimaryCtxRetain(&contexts[device], device), kernel->entry);
    if (kernel->handle == NULL) {
        handle library;
        CHECK(cuLibraryLoadData(&library, kernel->image, NULL, NULL, 0, NULL, NULL, 0), kernel->entry);
        CHECK(cuLibraryGetKernel(&kernel->handle, library, kernel->entry), kernel->entry);
    }
    if (kernel->smem > 0) {
        CHECK(cuKernelSetAttribute(SHARED_BYTES, (int)kernel->smem, kernel->handle, device), kernel->entry);
        CHECK(cuKernelSetAttribute(SHARED_CARVEOUT, ALL_SHARED, kernel->handle, device), kernel->entry);
    }
    atomic_fetch_or(&kernel->prepared, UINT64_C(1) << device);
    return 0;
}

static int encode(void *map, const struct pa_tensor *tensor)
{
    enum { INTERLEAVE_NONE, SWIZZLE_64_BYTES = 2, SWIZZLE_128_BYTES, PROMOTE_256_BYTES = 3, ZEROS_OUTSIDE = 0 };
    enum { COLUMNS_OF_128_BYTES = 64 }; /* or half as many: no kernel is compiled with others */
    const int swizzle = tensor->box[0] == COLUMNS_OF_128_BYTES ? SWIZZLE_128_BYTES : SWIZZLE_64_BYTES;
    static const uint32_t steps[PA_MAP_RANK] = {1, 1, 1, 1};
    const uint32_t box[PA_MAP_RANK] = {tensor->box[0], tensor->box[1], tensor->box[2], 1};
    _Alignas(64) char made[PA_MAP_BYTES];
    if (!atomic_load(&opened)) {
        pthread_mutex_lock(&lock);
        int status = opened ? 0 : open_driver();
        pthread_mutex_unlock(&lock);
        if (status)
            return status;
    }
    CHECK(cuTensorMapEncodeTiled(made, tensor->type, PA_MAP_RANK, tensor->address, tensor->sizes, tensor->strides, box,
                                 steps, INTERLEAVE_NONE, swizzle, PROMOTE_256_BYTES, ZEROS_OUTSIDE),
          "a tensor map");
    memcpy(map, made, sizeof made);
    return 0;
}

/* The driver takes 60 ns for a map, and steady calls ask for the same ones: of caches, and of what the allocator hands
 * out again. A map follows from nothing but its tensor, so one that is kept is never wrong. */
int pa_encode(void *map, const struct pa_tensor *tensor)
{
    enum { KEPT = 64 };
    static _Thread_local struct {
        struct pa_tensor tensor;
        char map[PA_MAP_BYTES];
    } kept[KEPT];
    uint64_t hash = ((uint64_t)(uintptr_t)tensor->address >> 4) * UINT64_C(0x9E3779B97F4A7C15) >> 58;
    if (memcmp(&kept[hash].tensor, tensor, sizeof *tensor) != 0) {
        kept[hash].tensor.box[0] = 0; /* no tensor's, until the map is there */
        if (encode(kept[hash].map, tensor))
            return -1;
        kept[hash].tensor = *tensor;
    }
    memcpy(map, kept[hash].map, sizeof kept[hash].map);
    return 0;
}

/* The launch of a kernel on a stream, with attributes in the room that is given. */
static struct config configured(const struct pa_kernel *kernel, void *stream, unsigned x, unsigned y,
                                struct attribute attributes[2])
{
    enum { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6 };
    unsigned count = 0;
    if (kernel->chained)
        attributes[count++] = (struct attribute){PROGRAMMATIC_STREAM_SERIALIZATION, {1}};
    if (kernel->cluster > 1) /* three extents of 32 bits */
        attributes[count++] = (struct attribute){CLUSTER_DIMENSION, {kernel->cluster | UINT64_C(1) << 32, 1}};
    return (struct config){{x, y, 1}, {kernel->threads, 1, 1}, kernel->smem, stream, attributes, count};
}

static int check_device(const struct pa_kernel *kernel, int device)
{
    if (device < 0 || device >= DEVICES)
        return pa_fail("ValueError", kernel->entry, "the device must be in [0, 64)");
    return 0;
}

/* Have the kernel ready, and its device's context current; `before` is what leave() makes current again, or null. */
static int enter(struct pa_kernel *kernel, int device, handle *before)
{
    if (!(atomic_load(&kernel->prepared) >> device & 1) || contexts[device] == NULL) {
        pthread_mutex_lock(&lock);
        int status = prepare(kernel, device);
        pthread_mutex_unlock(&lock);
        if (status)
            return status;
    }
    handle current;
    CHECK(cuCtxGetCurrent(&current), kernel->entry);
    *before = NULL;
    if (current == contexts[device])
        return 0;
    *before = current;
    CHECK(cuCtxSetCurrent(contexts[device]), kernel->entry);
    return 0;
}

static int leave(const struct pa_kernel *kernel, handle before)
{
    if (before != NULL)
        CHECK(cuCtxSetCurrent(before), kernel->entry);
    return 0;
}

static int launch(struct pa_kernel *kernel, void *stream, const void *record, unsigned x, unsigned y)
{
    struct attribute attributes[2];
    const struct config config = configured(kernel, stream, x, y, attributes);
    size_t size = kernel->arguments;
    void *extra[] = {BUFFER, (void *)record, BUFFER_SIZE, &size, BUFFER_END};
    CHECK(cuLaunchKernelEx(&config, kernel->handle, NULL, extra), kernel->entry);
    return 0;
}

int pa_launch(struct pa_kernel *kernel, int device, void *stream, const void *record, unsigned x, unsigned y)
{
    if (check_device(kernel, device))
        return -1;
    if (x == 0 || y == 0)
        return 0;
    handle before;
    if (enter(kernel, device, &before))
        return -1;
    int status = launch(kernel, stream, record, x, y), left = leave(kernel, before);
    return status ? status : left;
}

static int most_clusters(const struct pa_kernel *kernel, int *clusters)
{
    struct attribute attributes[2];
    const struct config config = configured(kernel, NULL, kernel->cluster, 1, attributes);
    CHECK(cuOccupancyMaxActiveClusters(clusters, kernel->handle, &config), kernel->entry);
    return 0;
}

/* pa_clusters(kernel's address, device) -> how many of its clusters the device holds at a time. */
PA_EXPORT int __tvm_ffi_pa_clusters(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self;
    if (count != 2 || args[0].type_index != kTVMFFIInt || args[1].type_index != kTVMFFIInt)
        return pa_fail("TypeError", "pa_clusters", "takes a kernel's address and a device");
    struct pa_kernel *kernel = (struct pa_kernel *)(intptr_t)args[0].v_int64;
    handle before;
    int clusters = 0;
    int device = (int)args[1].v_int64;
    if (check_device(kernel, device) || enter(kernel, device, &before))
        return -1;
    int status = most_clusters(kernel, &clusters), left = leave(kernel, before);
    result->type_index = kTVMFFIInt;
    result->v_int64 = clusters;
    return status ? status : left;
}
