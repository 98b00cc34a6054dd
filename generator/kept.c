/* Turns a kind of call into the programs that Python keeps for it, as long as what they were chosen under holds.
 *
 * Everything here is read and written under the GIL alone. Nothing is freed: a thread may be running any program. */
#include "kept.h"

#include <stdlib.h>
#include <string.h>

enum { HEADS = 1024, WATCHES = 16, STREAMS = 256 };

typedef int64_t word;

pa_object pa_sinks;

struct entry {
    struct pa_kind kind;
    const word *program;
    pa_object decisions;
    struct entry *next;
};

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

static bool same(const struct pa_kind *a, const struct pa_kind *b)
{
    return a->count == b->count && memcmp(a->words, b->words, (size_t)a->count * sizeof(word)) == 0;
}

static struct entry **head_of(const struct pa_kind *kind)
{
    uint64_t hash = 0;
    for (int i = 0; i < kind->count; i++)
        hash = (hash ^ (uint64_t)kind->words[i]) * UINT64_C(0x9E3779B97F4A7C15);
    return &heads[hash >> 54];
}

bool pa_borrow(struct pa_view *view, DLDevice device, void *stream)
{
    for (int i = 0; i < streams; i++) {
        if (workspaces[i].stream != stream || workspaces[i].device != device.device_id)
            continue;
        view->shape[0] = workspaces[i].words;
        view->strides[0] = 1;
        view->tensor =
            (DLTensor){workspaces[i].data, device, 1, {kDLInt, 32, 1}, view->shape, view->strides, .byte_offset = 0};
        return true;
    }
    return false;
}

static void record(pa_object decisions)
{
    for (word i = 0; i < pa_host.list_size(pa_sinks); i++) {
        pa_object done = pa_host.call(pa_host.list_item(pa_sinks, i), decisions);
        if (done != NULL)
            pa_host.drop(done);
        else
            pa_host.clear_error();
    }
}

enum pa_fit pa_find(struct pa_kind *kind, struct pa_call *call, unsigned made)
{
    if (!unchanged())
        return PA_MISFIT;
    kind->words[PA_TOKEN] = state.token;
    for (struct entry *entry = *head_of(kind); entry != NULL; entry = entry->next) {
        if (!same(&entry->kind, kind))
            continue;
        enum pa_fit fit = pa_match(call, entry->program, made);
        if (fit == PA_FITS)
            record(entry->decisions);
        if (fit != PA_MISFIT)
            return fit;
    }
    return PA_MISFIT;
}

static _Thread_local struct pa_kind asked;
static _Thread_local bool asking;

void pa_ask(const struct pa_kind *kind)
{
    asking = kind != NULL;
    if (asking)
        asked = *kind;
}

/* The functions below are called by pa_ops/native.py, which holds the GIL and all that it hands over. */

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
    asked.words[PA_TOKEN] = state.token;
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

