/* Turns an operator call, as PyTorch's dispatcher makes it, into launches of a program that is kept for its kind.
 *
 * PyTorch's stable C interface hands over a call's arguments as 64-bit words; pa_ops/native.py says what each of them is.
 * Where no kept program fits, the operator's Python twin is called, which keeps one for the next time. So what is
 * checked, chosen and loaded is Python's, and a steady call never gets there: 25 us become 10. */
#include "host.h"
#include "program.h"

#include <stdlib.h>
#include <string.h>

#define PA_EXPORT __attribute__((visibility("default")))

enum { OPERATORS = 16, ARGUMENTS = 32, KIND_WORDS = 24, TEXT_WORDS = 3, DIMENSIONS = 8, RESULTS = 2 };
enum { HEADS = 1024, WATCHES = 16, STREAMS = 256, DTYPES = 8 };
enum { OPERATOR, TOKENS, SEQUENCES, TOKEN, FIRST_OPTION };                /* words of a kind */
enum { TENSOR, MAYBE_TENSOR, NUMBER, MAYBE_NUMBER, BOUND, TEXT };         /* types of an argument */
#define ABI (UINT64_C(2) << 56 | UINT64_C(10) << 48)                      /* of the interface: PyTorch 2.10's */

typedef int64_t word;

struct pa_host pa_host;

static struct {
    pa_object sinks;
    word dtypes[DTYPES][2]; /* DLPack's code and bits, PyTorch's number */
} world;

struct operator {
    const char *name, *overload; /* of the Python twin */
    word index, arguments, tensors, tokens, sequences, workspace, results, made[RESULTS];
    struct {
        word type, place;
    } argument[ARGUMENTS];
};
static struct operator operators[OPERATORS];

/* What decides which programs may serve a call, besides its tensors; as many words as its operator fills. */
struct kind {
    word words[KIND_WORDS];
    int count;
};

struct entry {
    struct kind kind;
    const word *program;
    pa_object decisions;
    struct entry *next;
};

/* Read and written under the GIL alone. */
static struct entry *heads[HEADS];
static struct {
    word count, token;
    struct {
        word is_variable;
        pa_object owner, key, value;
    } watches[WATCHES];
} state;
static struct {
    word device, words;
    void *stream, *data;
} workspaces[STREAMS];
static int streams;

static _Thread_local struct kind asked; /* the kind of the call that Python is serving on this thread */
static _Thread_local bool asking, raised;

/* A view of a PyTorch tensor, or of one that is still to be made. */
struct view {
    DLTensor tensor;
    word shape[DIMENSIONS], strides[DIMENSIONS];
};

/* A call's tensors by their places in a program, and its kind. */
struct given {
    struct view views[PA_TENSORS];
    struct pa_call call;
    struct kind kind;
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
        if (world.dtypes[i][1] == dtype) {
            view->dtype = (DLDataType){(uint8_t)(world.dtypes[i][0] >> 8), (uint8_t)world.dtypes[i][0], 1};
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
    word *words = given->kind.words + FIRST_OPTION;
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
    given->kind.words[OPERATOR] = op->index;
    given->kind.words[TOKENS] = bit_length(elements(tokens));
    given->kind.words[SEQUENCES] = bit_length(elements(&given->views[op->sequences].tensor));
    return pa_host.current_stream(tokens->device.device_id, &given->stream) == 0;
}

/* Whether overrides and environment are what the token stands for. */
static bool unchanged(void)
{
    for (word i = 0; i < state.count; i++) {
        pa_object value = NULL;
        if (!state.watches[i].is_variable)
            value = pa_host.dict_item(state.watches[i].owner, state.watches[i].key);
        else if (pa_host.variable_value(state.watches[i].owner, NULL, &value) == 0 && value != NULL)
            pa_host.drop(value); /* somebody else holds it */
        if (value != state.watches[i].value)
            return false;
    }
    return state.count > 0;
}

static bool same(const struct kind *a, const struct kind *b)
{
    return a->count == b->count && memcmp(a->words, b->words, (size_t)a->count * sizeof(word)) == 0;
}

static struct entry **head_of(const struct kind *kind)
{
    uint64_t hash = 0;
    for (int i = 0; i < kind->count; i++)
        hash = (hash ^ (uint64_t)kind->words[i]) * UINT64_C(0x9E3779B97F4A7C15);
    return &heads[hash >> 54];
}

static bool lend_workspace(const struct operator *op, struct given *given)
{
    if (op->workspace < 0)
        return true;
    DLDevice device = given->views[op->tokens].tensor.device;
    for (int i = 0; i < streams; i++) {
        if (workspaces[i].stream != given->stream || workspaces[i].device != device.device_id)
            continue;
        struct view *view = &given->views[op->workspace];
        view->shape[0] = workspaces[i].words;
        view->strides[0] = 1;
        view->tensor =
            (DLTensor){workspaces[i].data, device, 1, {kDLInt, 32, 1}, view->shape, view->strides, .byte_offset = 0};
        given->call.tensors[op->workspace] = &view->tensor;
        return true;
    }
    return false;
}

static void record(pa_object decisions)
{
    for (word i = 0; i < pa_host.list_size(world.sinks); i++) {
        pa_object done = pa_host.call(pa_host.list_item(world.sinks, i), decisions);
        if (done != NULL)
            pa_host.drop(done);
        else
            pa_host.clear_error();
    }
}

/* Leaves the program that fits in `given->call`, its launches on record. */
static enum pa_fit find(const struct operator *op, struct given *given)
{
    if (!unchanged() || !lend_workspace(op, given))
        return PA_MISFIT;
    given->kind.words[TOKEN] = state.token;
    unsigned made = 0;
    for (word i = 0; i < op->results; i++) {
        struct view *view = &given->views[op->made[i]];
        view->tensor = (DLTensor){.device = given->views[op->tokens].tensor.device};
        view->tensor.shape = view->shape;
        view->tensor.strides = view->strides;
        given->call.tensors[op->made[i]] = &view->tensor;
        made |= 1u << op->made[i];
    }
    for (struct entry *entry = *head_of(&given->kind); entry != NULL; entry = entry->next) {
        if (!same(&entry->kind, &given->kind))
            continue;
        enum pa_fit fit = pa_match(&given->call, entry->program, made);
        if (fit == PA_FITS)
            record(entry->decisions);
        if (fit != PA_MISFIT)
            return fit;
    }
    return PA_MISFIT;
}

static bool make(DLTensor *result, pa_tensor_handle *handle)
{
    word dtype = result->dtype.code << 8 | result->dtype.bits;
    for (int i = 0; i < DTYPES; i++)
        if (world.dtypes[i][0] == dtype)
            return pa_host.empty_strided(result->ndim, result->shape, result->strides, (int32_t)world.dtypes[i][1],
                                         (int32_t)result->device.device_type, result->device.device_id, handle) == 0 &&
                   pa_host.get_data_ptr(*handle, &result->data) == 0;
    return false;
}

static void release(const struct operator *op, const pa_value *stack)
{
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
}

/* What fails is left to Python, which meets the same error and can say it. */
static bool served(const struct operator *op, pa_value *stack, struct given *given)
{
    pa_tensor_handle made[RESULTS] = {NULL};
    int gil = pa_host.take_gil();
    enum pa_fit fit = find(op, given);
    pa_host.leave_gil(gil);
    bool done = fit != PA_MISFIT;
    for (word i = 0; done && i < op->results; i++)
        done = make(given->call.tensors[op->made[i]], &made[i]);
    if (done && fit == PA_FITS)
        done = pa_start(&given->call, given->stream) == 0;
    if (done)
        release(op, stack);
    for (word i = 0; i < op->results; i++)
        if (done)
            stack[i] = (pa_value)made[i];
        else if (made[i] != NULL)
            pa_host.delete_tensor(made[i]);
    return done;
}

static void serve(const struct operator *op, pa_value *stack)
{
    struct given given;
    bool readable = read(op, stack, &given);
    if (readable && served(op, stack, &given))
        return;
    asking = readable;
    if (readable)
        asked = given.kind;
    raised = false;
    int failed = pa_host.call_dispatcher(op->name, op->overload, stack, ABI);
    asking = false;
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

/* 0, or -1 if the caller's tables are those of another version: functions as in host.h, dtypes as in `world`. */
PA_EXPORT int pa_attach(word functions, void *const *addresses, const word *dtypes, pa_object sinks, pa_object raise)
{
    if (functions * sizeof(void *) != sizeof pa_host)
        return -1;
    memcpy((void *)&pa_host, addresses, sizeof pa_host);
    memcpy(world.dtypes, dtypes, sizeof world.dtypes);
    world.sinks = sinks;
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

/* From now on the token stands for these values; what is kept for another token is not run. */
PA_EXPORT void pa_watch(word token, word count, const word *watches)
{
    state.count = count <= WATCHES ? count : 0;
    state.token = token;
    memcpy(state.watches, watches, (size_t)state.count * sizeof *state.watches);
}

/* Whether the program is newly kept, for the kind of the call that this thread is serving in Python. */
PA_EXPORT int pa_keep(const word *program, pa_object decisions)
{
    if (!asking)
        return 0;
    asked.words[TOKEN] = state.token;
    struct entry **at = head_of(&asked);
    for (; *at != NULL; at = &(*at)->next)
        if ((*at)->program == program && same(&(*at)->kind, &asked))
            return 0;
    struct entry *entry = malloc(sizeof *entry);
    if (entry == NULL)
        return 0;
    *entry = (struct entry){asked, program, decisions, NULL};
    *at = entry;
    return 1;
}

/* A stream's workspace, for good. */
PA_EXPORT void pa_lend(word device, void *stream, void *data, word words)
{
    for (int i = 0; i < streams; i++)
        if (workspaces[i].device == device && workspaces[i].stream == stream)
            return;
    if (streams == STREAMS)
        return;
    workspaces[streams].device = device;
    workspaces[streams].words = words;
    workspaces[streams].stream = stream;
    workspaces[streams++].data = data;
}

/* The Python implementation that this thread has called met an error. */
PA_EXPORT void pa_raise(void) { raised = true; }
