/* Turns a Python error into a C++ exception that passes through PyTorch's dispatcher, with no C++ compiler:
 *
 *     struct error : pybind11::builtin_exception { void set_error() const override { ... } };
 *     throw error(text);
 *
 * laid out by hand as the C++ ABI of Linux has it. PyTorch's bindings are pybind11's, which asks an exception of that
 * class (by name, for it is in every library anew) to set the Python error; to others it is a std::runtime_error. */
#include "host.h"

struct type {
    const void *const *methods;
    const char *name;
    const void *base;
};

struct methods {
    intptr_t offset;
    const void *type;
    void (*end)(void *);
    void (*remove)(void *);
    const char *(*what)(const void *);
    void (*set_error)(const void *);
};

struct error {
    const void *methods;
    const char *text; /* of std::runtime_error, counted */
};

enum { FIRST_METHOD = 2 }; /* of a table that begins with an offset and a type */

static struct type base = {.name = "N8pybind1117builtin_exceptionE"}, own = {.name = "15pa_python_error"};
static struct methods methods;
static pa_object raiser;

static void set_error(const void *error)
{
    (void)error;
    pa_host.call_nothing(raiser);
}

void pa_prepare_to_throw(pa_object raise)
{
    raiser = raise;
    base.methods = own.methods = pa_host.single_inheritance + FIRST_METHOD;
    base.base = pa_host.runtime_error;
    own.base = &base;
    methods = (struct methods){0, &own, pa_host.end_runtime_error, pa_host.end_runtime_error, pa_host.what, set_error};
}

void pa_throw(const char *text)
{
    struct error *error = pa_host.allocate_exception(sizeof *error);
    pa_host.make_runtime_error(error, text);
    error->methods = &methods.end;
    pa_host.throw(error, &own, pa_host.end_runtime_error);
    __builtin_unreachable();
}
