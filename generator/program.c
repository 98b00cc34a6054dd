/* Turns a program and a call's tensors into kernel launches, if the tensors are what the program was made for.
 *
 * A program is an array of 64-bit words that pa_ops/program.py writes:
 *   tensors, steps, device
 *   a tensor:  present, dtype, dimensions, flags; a dimension: rule, name, value
 *   a step:    kernel, record bytes, patches, grid rule and its four numbers; the record; its patches
 *   a patch:   offset, bytes, a value; of a tensor map: offset, bytes, three extents of a box, element type,
 *   eight values
 *   a value:   source, tensor and axis, times, plus
 * Dimensions that may differ from call to call have a name: the first tensor that shows it fixes its size. Whatever
 * else selection looked at is compared, so a program never runs on a call that it does not fit. */
#include "program.h"

#include "launch.h"

#include <string.h>
#include <tvm/ffi/extra/c_env_api.h>

enum { RECORD_WORDS = 128, MAX_BLOCKS = 65535 };
enum { ALIGNED = 1, WRITTEN = 2 };                         /* flags of a tensor */
enum { CONSTANT, EQUAL, AT_LEAST };                        /* rules of a dimension */
enum { ADDRESS, STRIDE, SIZE, CONSTANT_VALUE };            /* sources of a value */
enum { GRID_TILES, GRID_TOKENS, GRID_ROWS, GRID_FIXED };              /* rules of a grid */
enum { VECTOR_BYTES = 16 };

typedef int64_t word;

static word next(struct pa_call *call) { return *call->at++; }

static word ceil_div(word a, word b) { return (a + b - 1) / b; }

static word min(word a, word b) { return a < b ? a : b; }

static word max(word a, word b) { return a > b ? a : b; }

static DLTensor *tensor_of(const TVMFFIAny *value)
{
    if (value->type_index == kTVMFFIDLTensorPtr)
        return value->v_ptr;
    if (value->type_index == kTVMFFITensor)
        return (void *)((char *)value->v_ptr + sizeof(TVMFFIObject));
    return NULL;
}

static int size_fits(struct pa_call *call, word size)
{
    word rule = next(call), name = next(call), value = next(call);
    if (rule == CONSTANT)
        return size == value;
    if (!call->known[name]) {
        call->known[name] = 1;
        call->sizes[name] = size - value;
        return size >= value;
    }
    return rule == EQUAL ? size == call->sizes[name] + value : size >= call->sizes[name];
}

/* Dense in the last dimension; rows at multiples of 16 bytes, or not written twice, where the program asks for it. */
static int strides_fit(const DLTensor *tensor, word flags)
{
    word bytes = tensor->dtype.bits / 8, base = (word)(intptr_t)tensor->data + (word)tensor->byte_offset;
    if (tensor->strides == NULL || (flags & ALIGNED && base % VECTOR_BYTES))
        return 0;
    for (int i = 0; i < tensor->ndim; i++) {
        word stride = tensor->strides[i];
        if (tensor->shape[i] < 2)
            continue;
        if (i == tensor->ndim - 1 ? stride != 1 : flags & ALIGNED && stride * bytes % VECTOR_BYTES)
            return 0;
        if (flags & WRITTEN && stride == 0)
            return 0;
    }
    return 1;
}

static int tensor_fits(struct pa_call *call, const DLTensor *tensor)
{
    word present = next(call), dtype = next(call), dimensions = next(call), flags = next(call);
    if (present != (tensor != NULL))
        return 0;
    if (!present)
        return 1;
    if ((word)tensor->dtype.code << 8 != (dtype & 0xFF00) || tensor->dtype.bits != (dtype & 0xFF) ||
        tensor->ndim != dimensions || tensor->device.device_id != call->device ||
        (int32_t)tensor->device.device_type != call->kind)
        return 0;
    for (int i = 0; i < tensor->ndim; i++)
        if (!size_fits(call, tensor->shape[i]))
            return 0;
    return strides_fit(tensor, flags);
}

/* The tensor as a call of these sizes would bring it, contiguous and with no memory yet. */
static void describe(struct pa_call *call, DLTensor *tensor)
{
    next(call);
    word dtype = next(call), stride = 1;
    tensor->ndim = (int32_t)next(call);
    tensor->dtype = (DLDataType){(uint8_t)(dtype >> 8), (uint8_t)dtype, 1};
    next(call);
    for (int i = 0; i < tensor->ndim; i++) {
        word rule = next(call), name = next(call), value = next(call);
        tensor->shape[i] = rule == CONSTANT ? value : call->sizes[name] + value;
    }
    for (int i = tensor->ndim - 1; i >= 0; stride *= max(tensor->shape[i--], 1))
        tensor->strides[i] = stride;
}

static word value_of(struct pa_call *call)
{
    word source = next(call), place = next(call), times = next(call), plus = next(call);
    const DLTensor *tensor = call->tensors[place >> 8];
    if (source == CONSTANT_VALUE)
        return plus;
    if (source == ADDRESS)
        return (word)(intptr_t)tensor->data + (word)tensor->byte_offset + plus;
    return (source == STRIDE ? tensor->strides : tensor->shape)[place & 0xFF] * times + plus;
}

/* Nothing is copied from an empty tensor, and nothing steps over an extent of 1: any stride will do, and any address
 * of the device's memory: the first tensor's, which has rows. An address that is nobody's faults all the same. */
static int patch_map(struct pa_call *call, void *map)
{
    struct pa_tensor tensor;
    for (int i = 0; i < PA_MAP_RANK - 1; i++)
        tensor.box[i] = (uint16_t)next(call);
    tensor.type = (uint16_t)next(call);
    word address = value_of(call);
    tensor.address = address ? (void *)(intptr_t)address : call->tensors[0]->data;
    for (int i = 0; i < PA_MAP_RANK; i++)
        tensor.sizes[i] = (uint64_t)max(value_of(call), 1);
    for (int i = 0; i < PA_MAP_RANK - 1; i++) {
        word stride = value_of(call);
        tensor.strides[i] = tensor.sizes[i + 1] > 1 ? (uint64_t)stride : VECTOR_BYTES;
    }
    return pa_encode(map, &tensor);
}

static int patch(struct pa_call *call, char *record)
{
    word offset = next(call), width = next(call);
    if (width == PA_MAP_BYTES)
        return patch_map(call, record + offset);
    word value = value_of(call);
    int32_t narrow = (int32_t)min(value, INT32_MAX);
    if (width == sizeof narrow)
        memcpy(record + offset, &narrow, sizeof narrow);
    else
        memcpy(record + offset, &value, sizeof value);
    return 0;
}

/* x and y from sizes 0 (tokens) and 1 (sequences): an extent may exceed the work, never fall short of it. */
static void grid(struct pa_call *call, unsigned extent[2])
{
    word rule = next(call), a = next(call), b = next(call), c = next(call), d = next(call);
    word tokens = call->sizes[0], sequences = call->sizes[1], x, y;
    if (rule == GRID_TILES) { /* a: rows of a tile, b: bound of a length or -1, c: heads, d at a time */
        x = (tokens + min(sequences, tokens) * (a - 1)) / a;
        x = max(b < 0 ? x : min(x, sequences * ceil_div(b, a)), 1) * d;
        y = c / d;
    } else if (rule == GRID_TOKENS) { /* a: slices of a token at most, b: blocks that fill the device */
        x = min(tokens, MAX_BLOCKS);
        y = max(min(a, b / max(x, 1)), 1);
    } else if (rule == GRID_FIXED) {
        x = a;
        y = b;
    } else { /* a: rows of a token, b: rows of a block */
        x = min(ceil_div(tokens * a, b), MAX_BLOCKS);
        y = 1;
    }
    extent[0] = (unsigned)x;
    extent[1] = (unsigned)y;
}

static int run_step(struct pa_call *call, int device, void *stream)
{
    word record[RECORD_WORDS];
    unsigned extent[2];
    struct pa_kernel *kernel = (struct pa_kernel *)(intptr_t)next(call);
    word bytes = next(call), patches = next(call);
    if (bytes != kernel->arguments || bytes > (word)sizeof record)
        return pa_fail("ValueError", kernel->entry, "the program's record is not the kernel's");
    grid(call, extent);
    memcpy(record, call->at, (size_t)bytes);
    call->at += ceil_div(bytes, sizeof(word));
    for (word i = 0; i < patches; i++)
        if (patch(call, (char *)record))
            return -1;
    return pa_launch(kernel, device, stream, record, extent[0], extent[1]);
}

int64_t pa_tensors(const int64_t *program) { return program[0]; }

enum pa_fit pa_match(struct pa_call *call, const int64_t *program, unsigned made)
{
    memset(call->known, 0, sizeof call->known);
    call->sizes[0] = call->sizes[1] = 0;
    call->at = program;
    word tensors = next(call);
    call->steps = next(call);
    call->device = (int32_t)next(call);
    call->kind = call->tensors[0] == NULL ? 0 : (int32_t)call->tensors[0]->device.device_type;
    for (int i = 0; i < tensors; i++)
        if (made >> i & 1)
            describe(call, call->tensors[i]);
        else if (!tensor_fits(call, call->tensors[i]))
            return PA_MISFIT;
    return call->sizes[0] == 0 || (call->known[1] && call->sizes[1] == 0) ? PA_EMPTY : PA_FITS;
}

int pa_start(struct pa_call *call, void *stream)
{
    for (word i = 0; i < call->steps; i++)
        if (run_step(call, call->device, stream))
            return -1;
    return 0;
}

/* pa_call(program's address, tensors or None...) -> 0: the call does not fit; 1: launched; 2: it has no rows. */
PA_EXPORT int __tvm_ffi_pa_call(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)
{
    (void)self;
    result->type_index = kTVMFFIInt;
    result->v_int64 = PA_MISFIT;
    if (count < 1 || count > PA_TENSORS || args[0].type_index != kTVMFFIInt)
        return pa_fail("TypeError", "pa_call", "takes a program's address, then tensors");
    const word *program = (const word *)(intptr_t)args[0].v_int64;
    if (pa_tensors(program) != count - 1)
        return pa_fail("TypeError", "pa_call", "the program is for another number of tensors");
    struct pa_call call;
    for (int i = 0; i < count - 1; i++)
        call.tensors[i] = tensor_of(&args[i + 1]);
    enum pa_fit fit = pa_match(&call, program, 0);
    if (fit == PA_FITS && pa_start(&call, TVMFFIEnvGetStream(call.kind, call.device)))
        return -1;
    result->v_int64 = fit;
    return 0;
}
