/* A program and a call's tensors: whether they fit, and the launches if they do. Words as in program.c. */
#pragma once

#include <dlpack/dlpack.h>
#include <stdint.h>

enum { PA_TENSORS = 24, PA_NAMES = 8 };
enum pa_fit { PA_MISFIT, PA_FITS, PA_EMPTY }; /* empty: it fits and has no rows, so there is nothing to launch */

struct pa_call {
    const int64_t *at; /* what is read next */
    int64_t steps;
    DLTensor *tensors[PA_TENSORS];
    int64_t sizes[PA_NAMES];
    int known[PA_NAMES];
    int32_t device, kind;
};

/* Whether `call->tensors` are what the program was made for. A bit of `made` stands for a tensor that is still to be
 * allocated: it is told its dtype and shape. */
enum pa_fit pa_match(struct pa_call *call, const int64_t *program, unsigned made);

/* The program's launches after PA_FITS: 0, or -1 with a raised error. */
int pa_start(struct pa_call *call, void *stream);

/* The number of tensors that a program is called with. */
int64_t pa_tensors(const int64_t *program);
