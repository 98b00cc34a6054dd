/* Functions of PyTorch, Python and C++ that kernels use where they find them: a product links none of the three. */
#pragma once

#include "export.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t pa_value; /* an argument or a result: a number, or a pointer that its holder owns */
typedef void *pa_tensor_handle;
typedef void *pa_object; /* of Python */

/* In the order of the tables of pa_ops/native.py. */
struct pa_host {
    int (*get_sizes)(pa_tensor_handle, int64_t **);
    int (*get_strides)(pa_tensor_handle, int64_t **);
    int (*get_dim)(pa_tensor_handle, int64_t *);
    int (*get_dtype)(pa_tensor_handle, int32_t *);
    int (*get_data_ptr)(pa_tensor_handle, void **);
    int (*get_device_type)(pa_tensor_handle, int32_t *);
    int (*get_device_index)(pa_tensor_handle, int32_t *);
    int (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, pa_tensor_handle *);
    int (*delete_tensor)(pa_tensor_handle);
    int (*string_length)(void *, size_t *);
    int (*string_text)(void *, const char **);
    int (*delete_string)(void *);
    int (*call_dispatcher)(const char *, const char *, pa_value *, uint64_t);
    bool (*grad_mode)(void);
    int (*current_stream)(int32_t, void **);
    bool (*requires_grad)(const void *); /* or null */
    void (*hold_object)(const void *);   /* or null */
    void (*empty_here)(void *, const int64_t *, size_t, const int64_t *, size_t, int8_t, uint32_t); /* or null */
    int (*take_gil)(void);
    void (*leave_gil)(int);
    pa_object (*dict_item)(pa_object, pa_object);
    int (*variable_value)(pa_object, pa_object, pa_object *);
    pa_object (*list_item)(pa_object, int64_t);
    int64_t (*list_size)(pa_object);
    pa_object (*call)(pa_object, pa_object);
    pa_object (*call_nothing)(pa_object);
    void (*drop)(pa_object);
    void (*clear_error)(void);
    void *(*new)(size_t);
    void (*delete)(void *);
    void *(*allocate_exception)(size_t);
    void (*throw)(void *, const void *, void (*)(void *));
    void (*make_runtime_error)(void *, const char *);
    void (*end_runtime_error)(void *);
    const char *(*what)(const void *);
    const void *runtime_error;
    const void *const *single_inheritance;
};
extern struct pa_host pa_host;

/* Throw what PyTorch's bindings take for a Python error, the one that `raise()` raises; to others it says `text`. */
void pa_prepare_to_throw(pa_object raise);
_Noreturn void pa_throw(const char *text);
