/* Turns the CUDA error code of a kernel's host wrapper into a raised tvm-ffi error.
 *
 * The DSL defines this one function in its 43 MB shared runtime only; everything else that the wrappers call is in its
 * static library. `raise` is TVMFFIErrorSetRaisedFromCStrParts: kind, parts of the message, their number. */
#include <stddef.h>
#include <stdint.h>

extern const char *cudaGetErrorName(int code);
extern const char *cudaGetErrorString(int code);

typedef void (*raise_fn)(const char *kind, const char **parts, int32_t count);

void CuteDSLRT_TVMFFISetRaisedCudaError(raise_fn raise, int32_t code)
{
    if (raise == NULL)
        return;
    const char *parts[] = {"CUDA error ", cudaGetErrorName(code), ": ", cudaGetErrorString(code)};
    raise("RuntimeError", parts, (int32_t)(sizeof parts / sizeof parts[0]));
}
