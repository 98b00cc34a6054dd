/* Turns an operator call, as PyTorch's dispatcher makes it, into launches of a program that is kept for its kind.
 *
 * PyTorch's stable C interface hands over a call's arguments as 64-bit words; pa_ops/native.py says what each of them is.
 * Where no kept program fits, the operator's Python twin is called, which keeps one for the next time. So what is
 * checked, chosen and loaded is Python's, and a steady call never gets there: 25 us become 10. */
#include "program.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

#define PA_EXPORT extern "C" __attribute__((visibility("default")))

using Word = int64_t;
using Value = uint64_t; /* an argument or a result: a number, or a pointer that its holder owns */
using Tensor = void *;
using Object = void *; /* a Python object */

namespace pybind11 {
/* As pybind11 declares it: PyTorch's bindings let an exception of this class say which Python error it is. */
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
    virtual void set_error() const = 0;
};
} // namespace pybind11

namespace {

enum { OPERATORS = 16, ARGUMENTS = 32, KIND_WORDS = 24, TEXT_WORDS = 3, DIMENSIONS = 8, RESULTS = 2 };
enum { HEADS = 1024, WATCHES = 16, STREAMS = 256, DTYPES = 8 };
enum { OPERATOR, TOKENS, SEQUENCES, TOKEN, FIRST_OPTION }; /* words of a kind */
constexpr Value ABI = UINT64_C(2) << 56 | UINT64_C(10) << 48; /* of the interface: PyTorch 2.10's */
enum Type { TENSOR, MAYBE_TENSOR, NUMBER, MAYBE_NUMBER, BOUND, TEXT };

/* Functions of PyTorch and of Python, in the order of native.py's tables. */
struct {
    int (*get_sizes)(Tensor, Word **);
    int (*get_strides)(Tensor, Word **);
    int (*get_dim)(Tensor, Word *);
    int (*get_dtype)(Tensor, int32_t *);
    int (*get_data_ptr)(Tensor, void **);
    int (*get_device_type)(Tensor, int32_t *);
    int (*get_device_index)(Tensor, int32_t *);
    int (*empty_strided)(Word, const Word *, const Word *, int32_t, int32_t, int32_t, Tensor *);
    int (*delete_tensor)(Tensor);
    int (*string_length)(void *, size_t *);
    int (*string_text)(void *, const char **);
    int (*delete_string)(void *);
    int (*call_dispatcher)(const char *, const char *, Value *, uint64_t);
    bool (*grad_mode)();
    bool (*requires_grad)(const void *);
    int (*current_stream)(int32_t, void **);
    int (*take_gil)();
    void (*leave_gil)(int);
    Object (*dict_item)(Object, Object);
    int (*variable_value)(Object, Object, Object *);
    Object (*list_item)(Object, Word);
    Word (*list_size)(Object);
    Object (*call)(Object, Object);
    Object (*call_nothing)(Object);
    void (*drop)(Object);
    void (*clear_error)();
} api;

/* What Python holds for as long as the process lives, and numbers that are PyTorch's own. */
struct {
    Object sinks, raise;
    Word dtypes[DTYPES][2]; /* DLPack's code and bits, PyTorch's number */
} world;

struct Operator {
    const char *name, *overload;
    Word index, arguments, tensors, tokens, sequences, workspace, results, made[RESULTS];
    struct {
        Word type, place;
    } argument[ARGUMENTS];
} operators[OPERATORS];

/* What decides which programs may serve a call, besides its tensors; as many words as its operator fills. */
struct Kind {
    Word words[KIND_WORDS];
    int count;

    bool operator==(const Kind &other) const
    {
        return count == other.count && std::memcmp(words, other.words, static_cast<size_t>(count) * sizeof(Word)) == 0;
    }
};

struct Entry {
    Kind kind;
    const Word *program;
    Object decisions;
    Entry *next;
};

/* Everything below is read and written under the GIL alone. */
Entry *heads[HEADS];
struct {
    Word count, token;
    struct {
        Word is_variable;
        Object owner, key, value;
    } watches[WATCHES];
} state;
struct {
    Word device, words;
    void *stream, *data;
} workspaces[STREAMS];
int streams;

thread_local Kind asked; /* the kind of the call that Python is serving on this thread */
thread_local bool asking, raised;

struct Gil {
    int held = api.take_gil();
    ~Gil() { api.leave_gil(held); }
};

/* A view of a PyTorch tensor, or of one that is still to be made. */
struct View {
    DLTensor tensor;
    Word shape[DIMENSIONS], strides[DIMENSIONS];
};

/* A call's tensors by their places in a program, and what its kind is made of. */
struct Given {
    View views[PA_TENSORS];
    pa_call call;
    Kind kind;
    void *stream;
};

Word bit_length(Word value) { return value == 0 ? 0 : 64 - __builtin_clzll((unsigned long long)value); }

Word elements(const DLTensor &tensor)
{
    Word product = 1;
    for (int i = 0; i < tensor.ndim; i++)
        product *= tensor.shape[i];
    return product;
}

bool look(Tensor handle, DLTensor &view, bool grad)
{
    int32_t dtype, type, index;
    Word dimensions;
    if (grad && (api.requires_grad == nullptr || api.requires_grad(*static_cast<void **>(handle))))
        return false;
    if (api.get_sizes(handle, &view.shape) || api.get_strides(handle, &view.strides) ||
        api.get_dim(handle, &dimensions) || api.get_dtype(handle, &dtype) || api.get_data_ptr(handle, &view.data) ||
        api.get_device_type(handle, &type) || api.get_device_index(handle, &index))
        return false;
    view.device = {static_cast<DLDeviceType>(type), index < 0 ? 0 : index}; /* PyTorch counts no CPUs */
    view.ndim = static_cast<int32_t>(dimensions);
    view.byte_offset = 0;
    for (auto [dlpack, torch] : world.dtypes)
        if (torch == dtype) {
            view.dtype = {static_cast<uint8_t>(dlpack >> 8), static_cast<uint8_t>(dlpack), 1};
            return true;
        }
    return false;
}

bool text(Value value, Word *words)
{
    size_t length;
    const char *characters;
    void *handle = reinterpret_cast<void *>(value);
    if (api.string_length(handle, &length) || api.string_text(handle, &characters) ||
        length >= TEXT_WORDS * sizeof(Word))
        return false;
    std::memset(words, 0, TEXT_WORDS * sizeof(Word));
    std::memcpy(words, characters, length);
    return true;
}

/* Looks at the arguments without taking them; false where they are beyond what C serves. */
bool read(const Operator &op, const Value *stack, Given &given)
{
    std::memset(given.call.tensors, 0, sizeof given.call.tensors);
    bool grad = api.grad_mode();
    Word *words = given.kind.words + FIRST_OPTION;
    for (Word i = 0; i < op.arguments; i++) {
        auto [type, place] = op.argument[i];
        auto *held = reinterpret_cast<const Value *>(stack[i]);
        bool optional = type == MAYBE_TENSOR || type == MAYBE_NUMBER || type == BOUND;
        Value value = optional && held != nullptr ? *held : stack[i];
        if (type == TENSOR || (type == MAYBE_TENSOR && held != nullptr)) {
            if (!look(reinterpret_cast<Tensor>(value), given.views[place].tensor, grad))
                return false;
            given.call.tensors[place] = &given.views[place].tensor;
        } else if (type == NUMBER) {
            *words++ = static_cast<Word>(value);
        } else if (type == MAYBE_NUMBER) {
            *words++ = held != nullptr;
            *words++ = static_cast<Word>(value);
        } else if (type == BOUND) {
            if (held != nullptr && static_cast<Word>(value) < 0)
                return false;
            *words++ = held != nullptr ? bit_length(static_cast<Word>(value)) : -1;
        } else if (type == TEXT) {
            if (!text(value, words))
                return false;
            words += TEXT_WORDS;
        }
    }
    given.kind.count = static_cast<int>(words - given.kind.words);
    given.kind.words[OPERATOR] = op.index;
    given.kind.words[TOKENS] = bit_length(elements(given.views[op.tokens].tensor));
    given.kind.words[SEQUENCES] = bit_length(elements(given.views[op.sequences].tensor));
    int32_t device = given.views[op.tokens].tensor.device.device_id;
    return api.current_stream(device, &given.stream) == 0;
}

/* Whether overrides and environment are what the token stands for. */
bool unchanged()
{
    for (Word i = 0; i < state.count; i++) {
        const auto &watch = state.watches[i];
        Object value = nullptr;
        if (!watch.is_variable)
            value = api.dict_item(watch.owner, watch.key);
        else if (api.variable_value(watch.owner, nullptr, &value) == 0 && value != nullptr)
            api.drop(value); /* somebody else holds it */
        if (value != watch.value)
            return false;
    }
    return state.count > 0;
}

size_t head_of(const Kind &kind)
{
    uint64_t hash = 0;
    for (int i = 0; i < kind.count; i++)
        hash = (hash ^ static_cast<uint64_t>(kind.words[i])) * UINT64_C(0x9E3779B97F4A7C15);
    return hash >> 54;
}

Entry **place_of(const Kind &kind, const Word *program)
{
    Entry **at = &heads[head_of(kind)];
    while (*at != nullptr && ((*at)->program != program || !((*at)->kind == kind)))
        at = &(*at)->next;
    return at;
}

bool lend_workspace(const Operator &op, Given &given)
{
    if (op.workspace < 0)
        return true;
    Word device = given.views[op.tokens].tensor.device.device_id;
    for (int i = 0; i < streams; i++) {
        const auto &found = workspaces[i];
        if (found.stream != given.stream || found.device != device)
            continue;
        View &view = given.views[op.workspace];
        view.shape[0] = found.words;
        view.strides[0] = 1;
        view.tensor = {found.data, given.views[op.tokens].tensor.device, 1, {kDLInt, 32, 1}, view.shape, view.strides, 0};
        given.call.tensors[op.workspace] = &view.tensor;
        return true;
    }
    return false;
}

void record(Object decisions)
{
    for (Word i = 0; i < api.list_size(world.sinks); i++) {
        Object done = api.call(api.list_item(world.sinks, i), decisions);
        if (done != nullptr)
            api.drop(done);
        else
            api.clear_error();
    }
}

/* The program that fits is left in `given.call`, its launches on record. */
pa_fit find(const Operator &op, Given &given)
{
    Gil gil;
    if (!unchanged() || !lend_workspace(op, given))
        return PA_MISFIT;
    given.kind.words[TOKEN] = state.token;
    unsigned made = 0;
    for (Word i = 0; i < op.results; i++) {
        View &view = given.views[op.made[i]];
        view.tensor = {nullptr, given.views[op.tokens].tensor.device, 0, {}, view.shape, view.strides, 0};
        given.call.tensors[op.made[i]] = &view.tensor;
        made |= 1u << op.made[i];
    }
    for (Entry *entry = heads[head_of(given.kind)]; entry != nullptr; entry = entry->next) {
        if (!(entry->kind == given.kind))
            continue;
        pa_fit fit = pa_match(&given.call, entry->program, made);
        if (fit == PA_FITS)
            record(entry->decisions);
        if (fit != PA_MISFIT)
            return fit;
    }
    return PA_MISFIT;
}

bool make(DLTensor &result, Tensor *handle)
{
    Word dtype = result.dtype.code << 8 | result.dtype.bits;
    for (auto [dlpack, torch] : world.dtypes)
        if (dlpack == dtype)
            return api.empty_strided(result.ndim, result.shape, result.strides, static_cast<int32_t>(torch),
                                     result.device.device_type, result.device.device_id, handle) == 0 &&
                   api.get_data_ptr(*handle, &result.data) == 0;
    return false;
}

void release(const Operator &op, const Value *stack)
{
    for (Word i = 0; i < op.arguments; i++) {
        Word type = op.argument[i].type;
        auto *held = reinterpret_cast<Value *>(stack[i]);
        if (type == TENSOR)
            api.delete_tensor(held);
        else if (type == TEXT)
            api.delete_string(held);
        else if (type != NUMBER && held != nullptr) {
            if (type == MAYBE_TENSOR)
                api.delete_tensor(reinterpret_cast<Tensor>(*held));
            delete held;
        }
    }
}

/* What fails is left to Python, which meets the same error and can say it. */
bool served(const Operator &op, Value *stack, Given &given)
{
    Tensor made[RESULTS] = {};
    pa_fit fit = find(op, given);
    bool done = fit != PA_MISFIT;
    for (Word i = 0; done && i < op.results; i++)
        done = make(*given.call.tensors[op.made[i]], &made[i]);
    if (done && fit == PA_FITS)
        done = pa_start(&given.call, given.stream) == 0;
    if (done)
        release(op, stack);
    for (Word i = 0; i < op.results; i++)
        if (done)
            stack[i] = reinterpret_cast<Value>(made[i]);
        else if (made[i] != nullptr)
            api.delete_tensor(made[i]);
    return done;
}

/* The error that Python met, carried through the dispatcher. */
struct Raised : pybind11::builtin_exception {
    Raised() : builtin_exception("pa_ops: an error was raised in Python") {}
    void set_error() const override { api.call_nothing(world.raise); }
};

void serve(const Operator &op, Value *stack)
{
    Given given;
    bool readable = read(op, stack, given);
    if (readable && served(op, stack, given))
        return;
    asked = given.kind;
    asking = readable;
    raised = false;
    int failed = api.call_dispatcher(op.name, op.overload, stack, ABI);
    asking = false;
    if (failed)
        throw std::runtime_error("pa_ops: PyTorch could not call the Python implementation");
    if (raised) {
        for (Word i = 0; i < op.results; i++)
            api.delete_tensor(reinterpret_cast<Tensor>(stack[i]));
        throw Raised();
    }
}

/* The dispatcher tells a kernel nothing of which operator is called, so each has a function of its own. */
template <size_t N> void kernel(Value *stack, uint64_t, uint64_t) { serve(operators[N], stack); }

template <size_t... N> void *kernel_of(Word index, std::index_sequence<N...>)
{
    using Kernel = void (*)(Value *, uint64_t, uint64_t);
    static const Kernel kernels[] = {kernel<N>...};
    return reinterpret_cast<void *>(kernels[index]);
}

} // namespace

/* The functions below are called by pa_ops/native.py, which holds the GIL and all that it hands over. */

/* 0, or -1 if the caller's tables are those of another version: functions as in `api`, dtypes as in `world`. */
PA_EXPORT int pa_attach(Word functions, void *const *addresses, const Word *dtypes, Object sinks, Object raise)
{
    if (functions * sizeof(void *) != sizeof api)
        return -1;
    std::memcpy(static_cast<void *>(&api), addresses, sizeof api);
    std::memcpy(world.dtypes, dtypes, sizeof world.dtypes);
    world.sinks = sinks;
    world.raise = raise;
    return 0;
}

/* The kernel of an operator, which `words` describe from `index` on; null where there is no room for it. */
PA_EXPORT void *pa_operator(const char *name, const char *overload, const Word *words)
{
    if (words[0] >= OPERATORS || words[1] > ARGUMENTS || words[2] > PA_TENSORS)
        return nullptr;
    Operator &op = operators[words[0]];
    op.name = name;
    op.overload = overload;
    std::memcpy(&op.index, words, sizeof op - offsetof(Operator, index));
    return kernel_of(op.index, std::make_index_sequence<OPERATORS>());
}

/* From now on the token stands for these values; what is kept for another token is not run. */
PA_EXPORT void pa_watch(Word token, Word count, const Word *watches)
{
    state.count = count <= WATCHES ? count : 0;
    state.token = token;
    std::memcpy(state.watches, watches, static_cast<size_t>(state.count) * sizeof *state.watches);
}

/* Whether the program is newly kept, for the kind of the call that this thread is serving in Python. */
PA_EXPORT int pa_keep(const Word *program, Object decisions)
{
    if (!asking)
        return 0;
    asked.words[TOKEN] = state.token;
    Entry **at = place_of(asked, program);
    if (*at != nullptr)
        return 0;
    *at = new Entry{asked, program, decisions, nullptr};
    return 1;
}

/* A stream's workspace, for good. */
PA_EXPORT void pa_lend(Word device, void *stream, void *data, Word words)
{
    for (int i = 0; i < streams; i++)
        if (workspaces[i].device == device && workspaces[i].stream == stream)
            return;
    if (streams < STREAMS)
        workspaces[streams++] = {device, words, stream, data};
}

/* The Python implementation that this thread has called met an error. */
PA_EXPORT void pa_raise() { raised = true; }
