/* The programs that Python keeps for kinds of calls, and what must hold for one to be run. */
#pragma once

#include "host.h"
#include "program.h"

enum { PA_DIMENSIONS = 8, PA_KIND_WORDS = 24 };
enum { PA_OPERATOR, PA_KIND_TOKENS, PA_KIND_SEQUENCES, PA_TOKEN, PA_FIRST_OPTION }; /* words of a kind */

/* What decides which programs may serve a call, besides its tensors; as many words as its operator fills. */
struct pa_kind {
    int64_t words[PA_KIND_WORDS];
    int count;
};

/* A view of a tensor of PyTorch's, or of one that is still to be made. */
struct pa_view {
    DLTensor tensor;
    int64_t shape[PA_DIMENSIONS], strides[PA_DIMENSIONS];
};

/* A list of Python functions, each called with the decisions of every program that is run. */
extern pa_object pa_sinks;

/* Both under the GIL: the stream's workspace; whether a program fits, which is then in `call` and on record. */
bool pa_borrow(struct pa_view *workspace, DLDevice device, void *stream);
enum pa_fit pa_find(struct pa_kind *kind, struct pa_call *call, unsigned made);

/* The kind of the call that this thread leaves to Python, null after it. */
void pa_ask(const struct pa_kind *kind);
