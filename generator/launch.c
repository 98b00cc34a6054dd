/* Turns (argument bytes, grid x, grid y, device, stream) into a kernel launch through the driver, which is opened at
 * the first call: a product needs no CUDA library to be loaded, and runs with any CUDA of its driver's generation.
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

static struct {
    int (*cuGetErrorName)(int, const char **);
    int (*cuGetErrorString)(int, const char **);
    int (*cuDevicePrimaryCtxRetain)(handle *, int);
    int (*cuCtxGetCurrent)(handle *);
    int (*cuCtxSetCurrent)(handle);
    int (*cuLibraryLoadData)(handle *, const void *, handle, handle, unsigned, handle, handle, unsigned);
    int (*cuLibraryGetKernel)(handle *, handle, const char *);
    int (*cuKernelSetAttribute)(int, int, handle, int);
    int (*cuLaunchKernel)(handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void **,
                          void **);
} driver;
static handle contexts[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int opened;

static int fail(const char *kind, const char *what, const char *entry, const char *why)
{
    char text[512];
    snprintf(text, sizeof text, "%s%s%s: %s", what, entry ? " " : "", entry ? entry : "", why);
    TVMFFIErrorSetRaisedFromCStr(kind, text);
    return -1;
}

static int check(int code, const char *call, const char *entry)
{
    if (code == 0)
        return 0;
    const char *name = "unknown", *text = "";
    char why[256];
    driver.cuGetErrorName(code, &name);
    driver.cuGetErrorString(code, &text);
    snprintf(why, sizeof why, "CUDA error %d, %s: %s", code, name, text);
    return fail("RuntimeError", call, entry, why);
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
        "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute",     "cuLaunchKernel"};
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == NULL)
        return fail("RuntimeError", "no NVIDIA driver", NULL, dlerror());
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *symbol = dlsym(library, names[i]);
        if (symbol == NULL)
            return fail("RuntimeError", "the driver is too old (CUDA 12 is needed), it lacks", names[i], "not found");
        memcpy((char *)&driver + i * sizeof symbol, &symbol, sizeof symbol);
    }
    opened = 1;
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

static int launch(struct pa_kernel *kernel, void *bytes, size_t size, unsigned x, unsigned y, handle stream)
{
    void *extra[] = {BUFFER, bytes, BUFFER_SIZE, &size, BUFFER_END};
    if (x == 0 || y == 0)
        return 0;
    CHECK(cuLaunchKernel(kernel->handle, x, y, 1, kernel->threads, 1, 1, kernel->smem, stream, NULL, extra),
          kernel->entry);
    return 0;
}

int pa_launch(struct pa_kernel *kernel, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    result->type_index = kTVMFFINone;
    int fits = count == 5 && args[0].type_index == kTVMFFIBytes;
    for (int i = 1; fits && i < 5; i++)
        fits = args[i].type_index == kTVMFFIInt;
    if (!fits)
        return fail("TypeError", kernel->entry, NULL, "takes (bytes, grid x, grid y, device, stream)");
    /* A bytes object keeps its array behind its header. */
    const TVMFFIByteArray *bytes = (const void *)((const char *)args[0].v_ptr + sizeof(TVMFFIObject));
    int64_t device = args[3].v_int64;
    if (bytes->size != kernel->arguments)
        return fail("ValueError", kernel->entry, NULL, "the argument bytes are not as long as its record");
    if (device < 0 || device >= DEVICES)
        return fail("ValueError", kernel->entry, NULL, "the device must be in [0, 64)");
    if (!(atomic_load(&kernel->prepared) >> device & 1)) {
        pthread_mutex_lock(&lock);
        int status = prepare(kernel, (int)device);
        pthread_mutex_unlock(&lock);
        if (status)
            return status;
    }
    handle current;
    CHECK(cuCtxGetCurrent(&current), kernel->entry);
    if (current != contexts[device])
        CHECK(cuCtxSetCurrent(contexts[device]), kernel->entry);
    int status = launch(kernel, (void *)bytes->data, bytes->size, (unsigned)args[1].v_int64, (unsigned)args[2].v_int64,
                        (handle)args[4].v_int64);
    if (current != contexts[device] && current != NULL)
        CHECK(cuCtxSetCurrent(current), kernel->entry);
    return status;
}
