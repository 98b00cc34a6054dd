/* Turns an operator call, as PyTorch's dispatcher makes it, into launches of a program that is kept for its kind.
 *
 * PyTorch's stable C interface hands over a call's arguments as 64-bit words; pa_ops/native.py says what each of them is.
 * Where no kept program fits, the operator's Python twin is called, which keeps one for the next time. So what is
 * checked, chosen and loaded is Python's, and a steady call never gets there: 25 us become 10. */
#include "host.h"
#include "kept.h"

#include <string.h>

enum { OPERATORS = 16, ARGUMENTS = 32, TEXT_WORDS = 3, RESULTS = 2, DTYPES = 8 };
enum { TENSOR, MAYBE_TENSOR, NUMBER, MAYBE_NUMBER, BOUND, TEXT }; /* types of an argument */
#define ABI (UINT64_C(2) << 56 | UINT64_C(10) << 48)              /* of the interface: PyTorch 2.10's */

typedef int64_t word;

struct pa_host pa_host;

static word dtypes[DTYPES][2]; /* DLPack's code and bits, PyTorch's number */
static _Thread_local bool raised;

struct operator {
    const char *name, *overload; /* of the Python twin */
    word index, arguments, tensors, tokens, sequences, workspace, results, made[RESULTS];
    struct {
        word type, place;
    } argument[ARGUMENTS];
};
static struct operator operators[OPERATORS];

/* A call's tensors by their places in a program, and its kind. */
struct given {
    struct pa_view views[PA_TENSORS];
    struct pa_call call;
    struct pa_kind kind;
    void *stream;
};

static word bit_length(word value) { return value == 0 ? 0 : 64 - __builtin_clzll((unsigned long long)value); }

static word elements(const DLTensor *tensor)
{
    word product = 1;
    for (int i = 0; i < tensor->ndim; i++)
        product *= tensor->shape[i];
    return product;
}

static bool look(pa_tensor_handle handle, DLTensor *view, bool grad)
{
    int32_t dtype, type, index;
    word dimensions;
    if (grad && (pa_host.requires_grad == NULL || pa_host.requires_grad(*(void **)handle)))
        return false;
    if (pa_host.get_sizes(handle, &view->shape) || pa_host.get_strides(handle, &view->strides) ||
        pa_host.get_dim(handle, &dimensions) || pa_host.get_dtype(handle, &dtype) ||
        pa_host.get_data_ptr(handle, &view->data) || pa_host.get_device_type(handle, &type) ||
        pa_host.get_device_index(handle, &index))
        return false;
    view->device = (DLDevice){(DLDeviceType)type, index < 0 ? 0 : index}; /* PyTorch does not count CPUs */
    view->ndim = (int32_t)dimensions;
    view->byte_offset = 0;
    for (int i = 0; i < DTYPES; i++)
        if (dtypes[i][1] == dtype) {
            view->dtype = (DLDataType){(uint8_t)(dtypes[i][0] >> 8), (uint8_t)dtypes[i][0], 1};
            return true;
        }
    return false;
}

static bool read_text(pa_value value, word *words)
{
    size_t length;
    const char *characters;
    void *handle = (void *)value;
    if (pa_host.string_length(handle, &length) || pa_host.string_text(handle, &characters) ||
        length >= TEXT_WORDS * sizeof(word))
        return false;
    memset(words, 0, TEXT_WORDS * sizeof(word));
    memcpy(words, characters, length);
    return true;
}

/* Looks at the arguments without taking them; false where they are beyond what is served here. */
static bool read(const struct operator *op, const pa_value *stack, struct given *given)
{
    memset(given->call.tensors, 0, sizeof given->call.tensors);
    bool grad = pa_host.grad_mode();
    word *words = given->kind.words + PA_FIRST_OPTION;
    for (word i = 0; i < op->arguments; i++) {
        word type = op->argument[i].type, place = op->argument[i].place;
        bool optional = type == MAYBE_TENSOR || type == MAYBE_NUMBER || type == BOUND, there = stack[i] != 0;
        pa_value value = optional && there ? *(const pa_value *)stack[i] : stack[i];
        if (type == TENSOR || (type == MAYBE_TENSOR && there)) {
            if (!look((pa_tensor_handle)value, &given->views[place].tensor, grad))
                return false;
            given->call.tensors[place] = &given->views[place].tensor;
        } else if (type == NUMBER) {
            *words++ = (word)value;
        } else if (type == MAYBE_NUMBER) {
            *words++ = there;
            *words++ = (word)value;
        } else if (type == BOUND) {
            if (there && (word)value < 0)
                return false;
            *words++ = there ? bit_length((word)value) : -1;
        } else if (type == TEXT) {
            if (!read_text(value, words))
                return false;
            words += TEXT_WORDS;
        }
    }
    const DLTensor *tokens = &given->views[op->tokens].tensor;
    given->kind.count = (int)(words - given->kind.words);
    given->kind.words[PA_OPERATOR] = op->index;
    given->kind.words[PA_KIND_TOKENS] = bit_length(elements(tokens));
    given->kind.words[PA_KIND_SEQUENCES] = bit_length(elements(&given->views[op->sequences].tensor));
    return pa_host.current_stream(tokens->device.device_id, &given->stream) == 0;
}

/* Leaves the program that fits in `given->call`, the tensors that it needs besides the caller's beside them. */
static enum pa_fit find(const struct operator *op, struct given *given)
{
    DLDevice device = given->views[op->tokens].tensor.device;
    if (op->workspace >= 0) {
        struct pa_view *view = &given->views[op->workspace];
        if (!pa_borrow(view, device, given->stream))
            return PA_MISFIT;
        given->call.tensors[op->workspace] = &view->tensor;
    }
    unsigned made = 0;
    for (word i = 0; i < op->results; i++) {
        struct pa_view *view = &given->views[op->made[i]];
        view->tensor = (DLTensor){.device = device, .shape = view->shape, .strides = view->strides};
        given->call.tensors[op->made[i]] = &view->tensor;
        made |= 1u << op->made[i];
    }
    return pa_find(&given->kind, &given->call, made);
}

static int32_t number_of(DLDataType dtype)
{
    for (int i = 0; i < DTYPES; i++)
        if (dtypes[i][0] == (dtype.code << 8 | dtype.bits))
            return (int32_t)dtypes[i][1];
    return -1;
}

/* The interface asks the dispatcher twice for what `empty_here` does at once, at a quarter of the price; that throws,
 * where there is no memory say. It makes a tensor, a pointer, to which a handle is a pointer of C++. */
static bool make(DLTensor *result, pa_tensor_handle *handle)
{
    enum { ENGAGED = 1 << 16 }; /* of a std::optional<c10::Device>: type, index, whether there is one */
    int32_t dtype = number_of(result->dtype), type = (int32_t)result->device.device_type;
    if (dtype < 0)
        return false;
    if (pa_host.empty_here != NULL) {
        void *tensor;
        uint32_t device = ENGAGED | (uint32_t)(uint8_t)result->device.device_id << 8 | (uint32_t)type;
        size_t dimensions = (size_t)result->ndim;
        pa_host.empty_here(&tensor, result->shape, dimensions, result->strides, dimensions, (int8_t)dtype, device);
        *handle = pa_host.new(sizeof tensor);
        *(void **)*handle = tensor;
    } else if (pa_host.empty_strided(result->ndim, result->shape, result->strides, dtype, type,
                                     result->device.device_id, handle))
        return false;
    return pa_host.get_data_ptr(*handle, &result->data) == 0;
}

/* Where a tensor holds its Python object, whoever leaves it to Python alone takes the GIL: here for all at once. */
static void release(const struct operator *op, const pa_value *stack)
{
    int gil = pa_host.hold_object == NULL ? 0 : pa_host.take_gil();
    for (word i = 0; i < op->arguments; i++) {
        word type = op->argument[i].type;
        void *held = (void *)stack[i];
        if (type == TENSOR)
            pa_host.delete_tensor(held);
        else if (type == TEXT)
            pa_host.delete_string(held);
        else if (type != NUMBER && held != NULL) {
            if (type == MAYBE_TENSOR)
                pa_host.delete_tensor(*(pa_tensor_handle *)held);
            pa_host.delete(held);
        }
    }
    if (pa_host.hold_object != NULL)
        pa_host.leave_gil(gil);
}

/* What a call holds while its results are made: its arguments, until they are taken, and the results made so far. */
struct held {
    const struct operator *op; /* null where nothing is held */
    const pa_value *stack;
    pa_tensor_handle made[RESULTS];
};

static void drop_results(const struct held *held)
{
    for (int i = 0; i < RESULTS; i++)
        if (held->made[i] != NULL)
            pa_host.delete_tensor(held->made[i]);
}

/* On the way of an exception out of `served`. */
static void let_go(struct held *held)
{
    if (held->op == NULL)
        return;
    release(held->op, held->stack);
    drop_results(held);
}

/* What fails is left to Python, which meets the same error and can say it; but for an exception, which says it itself. */
static bool served(const struct operator *op, pa_value *stack, struct given *given)
{
    __attribute__((cleanup(let_go))) struct held held = {op, stack, {NULL}};
    int gil = pa_host.take_gil();
    enum pa_fit fit = find(op, given);
    pa_host.leave_gil(gil);
    bool done = fit != PA_MISFIT;
    for (word i = 0; done && i < op->results; i++)
        done = make(given->call.tensors[op->made[i]], &held.made[i]);
    if (done && fit == PA_FITS)
        done = pa_start(&given->call, given->stream) == 0;
    held.op = NULL;
    if (!done) {
        drop_results(&held);
        return false;
    }
    release(op, stack);
    for (word i = 0; i < op->results; i++)
        stack[i] = (pa_value)held.made[i];
    return true;
}

static void serve(const struct operator *op, pa_value *stack)
{
    struct given given;
    bool readable = read(op, stack, &given);
    if (readable && served(op, stack, &given))
        return;
    pa_ask(readable ? &given.kind : NULL);
    raised = false;
    int failed = pa_host.call_dispatcher(op->name, op->overload, stack, ABI);
    pa_ask(NULL);
    if (!failed && !raised)
        return;
    for (word i = 0; !failed && i < op->results; i++)
        pa_host.delete_tensor((pa_tensor_handle)stack[i]);
    pa_throw("pa_ops: an error was raised in Python");
}

/* The dispatcher does not tell a kernel which operator is called, so each has a function of its own. */
#define KERNEL(N)                                                                                                      \
    static void kernel_##N(pa_value *stack, uint64_t arguments, uint64_t results)                                      \
    {                                                                                                                  \
        (void)arguments, (void)results;                                                                                \
        serve(&operators[N], stack);                                                                                   \
    }
KERNEL(0) KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6) KERNEL(7)
KERNEL(8) KERNEL(9) KERNEL(10) KERNEL(11) KERNEL(12) KERNEL(13) KERNEL(14) KERNEL(15)

static void (*const kernels[OPERATORS])(pa_value *, uint64_t, uint64_t) = {
    kernel_0, kernel_1, kernel_2,  kernel_3,  kernel_4,  kernel_5,  kernel_6,  kernel_7,
    kernel_8, kernel_9, kernel_10, kernel_11, kernel_12, kernel_13, kernel_14, kernel_15};

/* The functions below are called by pa_ops/native.py, which holds the GIL and all that it hands over. */

/* 0, or -1 if the caller's tables are those of another version: functions as in host.h, dtypes as above. */
PA_EXPORT int pa_attach(word functions, void *const *addresses, const word *numbers, pa_object sinks, pa_object raise)
{
    if (functions * sizeof(void *) != sizeof pa_host)
        return -1;
    memcpy((void *)&pa_host, addresses, sizeof pa_host);
    memcpy(dtypes, numbers, sizeof dtypes);
    pa_sinks = sinks;
    pa_prepare_to_throw(raise);
    return 0;
}

/* The kernel of an operator, which `words` describe from `index` on; null where there is no room for it. */
PA_EXPORT void *pa_operator(const char *name, const char *overload, const word *words)
{
    if (words[0] >= OPERATORS || words[1] > ARGUMENTS || words[2] > PA_TENSORS)
        return NULL;
    struct operator *op = &operators[words[0]];
    op->name = name;
    op->overload = overload;
    memcpy(&op->index, words, sizeof *op - offsetof(struct operator, index));
    return (void *)kernels[op->index];
}

/* The Python implementation that this thread has called met an error. */
PA_EXPORT void pa_raise(void) { raised = true; }
