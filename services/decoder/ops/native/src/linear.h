/* Linear layers over all tokens of a step. */
#ifndef LH_LINEAR_H
#define LH_LINEAR_H

#include "context.h"

/* T rows of activations, prepared for matrices of one kind. */
typedef struct {
    const activation *rows;
    int64_t num_rows;
} activations;

/* Whether m is multiplied with quantised activations. */
int is_fast(const context *c, const matrix *m);
/* Whether activations prepared for a serve b as well. */
int same_activations(const context *c, const matrix *a, const matrix *b);
/* Row `first` of m and those behind it. */
next_rows rows_from(const matrix *m, int64_t first);
rows_kernel *kernel_of(const context *c, const matrix *m);
/* Rows of m for one item of work: enough bytes to stream, few enough to stay in the second-level cache. */
int64_t rows_per_item(const matrix *m);

/* Where this member's share of what comes after the operation at hand begins; 0 when that is not known. */
int fetch_coming(const context *c, int member, next_rows *to);

enum { PAGE_BYTES = 4096 };
/* Fetches the first line of every page of some rows, because a page that is not known yet costs several reads from memory before
 * its own. Inlined: see `prefetch` in simd_avx2.h. */
static inline __attribute__((always_inline)) void touch_pages(const matrix *m, int64_t first, int64_t rows) {
    const uint8_t *weight = m->weight + first * m->row_bytes, *end = weight + rows * m->row_bytes;
    for (; weight < end; weight += PAGE_BYTES) __builtin_prefetch(weight, 0, 2);
    if (!m->scales) return;
    __builtin_prefetch(m->scales + first * m->scale_row_bytes, 0, 2);
    __builtin_prefetch(m->biases + first * m->scale_row_bytes, 0, 2);
}

/* x is [num_rows, m->cols], x_stride floats apart. The result lives in the context's buffers until the next call. */
activations prepare_activations(context *c, const matrix *m, const float *x, int64_t x_stride, int64_t num_rows);
/* The same in buffers of the caller's choice. */
activations prepare_in(context *c, enum buffer heads, enum buffer bytes, enum buffer floats, const matrix *m, const float *x,
                       int64_t x_stride, int64_t num_rows);

typedef struct {
    const matrix *m;
    float *out; /* [num_rows, out_stride] */
    int64_t out_stride;
    int add; /* out += instead of out = */
} projection;

/* All projections of the same activations, in one loop. */
void project(context *c, const projection *projections, int count, activations a);

#endif
