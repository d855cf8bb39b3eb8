/* What is computed, once for each instruction set: the table that `isa.c` chooses from at run time.
 *
 * A result never depends on how many rows or tokens a call is given: every sum runs in an order fixed by absolute position. */
#ifndef LH_KERNELS_H
#define LH_KERNELS_H

#include <stdint.h>

/* FORMAT_I8 is of K/V alone: bytes with a float scale for each row of head_dim. */
enum format { FORMAT_F32, FORMAT_F16, FORMAT_BF16, FORMAT_Q4, FORMAT_Q8, FORMAT_I8 };

enum {
    MAX_COLS = 32768,
    MIN_GROUP = 32,
    ACT_GROUP = 64, /* activations are quantised in groups of this many, whatever the weights' groups */
    KV_TILE = 32,   /* tokens of K/V that attention widens at a time, at multiples of this position */
    KV_SPLIT = 512, /* tokens that share a running softmax, at multiples of this position */
    MAX_HEAD_DIM = 512,
    SAMPLE_TILE = 64,    /* logits of which only the largest is looked at first */
    SAMPLE_BLOCK = 1024, /* weights that are summed apart, at multiples of this id; sampler.py has the same */
};

/* A linear layer [rows, cols] as the checkpoint has it; for FORMAT_Q4 and Q8, w = scale * q + bias in groups of columns. */
typedef struct {
    const uint8_t *weight, *scales, *biases;
    const float *out_bias; /* [rows] or NULL */
    int64_t rows, cols, row_bytes, scale_row_bytes;
    int32_t format, scale_format, group_size, reserved;
} matrix;

/* One token's activations: floats, and for integer dot products bytes with a scale for each ACT_GROUP columns and the sum
 * (scale times bytes) of each of the weights' groups; scale and sum are zero from their end to a whole vector of eight.
 * q may be read to the end of four chunks. */
typedef struct {
    const float *x;
    const int8_t *q;
    const float *scale, *sum;
} activation;

/* Where the rows begin that this thread multiplies next. A kernel fetches them into the cache while it computes, at the pace
 * at which it uses its own, which the call before has fetched: memory never waits for arithmetic, nor the other way. */
typedef struct {
    const uint8_t *weight, *scales, *biases;
} next_rows;

/* out[t * out_stride + r] = dot(row first + r, tokens[t]) for r < num_rows, t < num_tokens. `next` may be NULL. */
typedef void rows_kernel(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens,
                         float *out, int64_t out_stride, const next_rows *next);

/* Attention of some consecutive rows of one sequence, on the heads that share one K/V head. */
typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, window; /* window 0: the whole context */
    float scale;
    int32_t kv_format;
    int64_t row_bytes;
    /* The pool: a block's address for each block_size tokens of this sequence. Rows are counted: first_row is the first of this
     * layer and head, rows_offset the bytes of scales before row 0. */
    const uint64_t *blocks;
    int64_t block_size, first_row, value_stride, token_stride, rows_offset;
    /* The step's own rows of this sequence, num_kv_heads a token, token `context_len` first; scales of FORMAT_I8 alone. */
    const uint8_t *own_k, *own_v;
    const float *own_k_scales, *own_v_scales;
    int64_t context_len;
    /* Queries: row i has position first_position + i. */
    const float *q;
    int64_t q_stride, num_rows, first_position, kv_head;
} attention_task;

/* A running softmax for each (row, head of the group): largest score, sum of weights, weighted sum of values; and the tile at
 * hand's weights, with what the sums so far must be multiplied by behind them. */
enum { WEIGHTS = KV_TILE + 8 };
typedef struct {
    float *largest, *total, *values, *weights;
} softmax_state;

typedef struct {
    const char *name;
    rows_kernel *rows_exact, *rows_fast;
    void (*quantise)(const float *x, int64_t cols, int format, int64_t group_size, int8_t *q, float *scale, float *sum);
    void (*widen)(const matrix *m, int64_t row, int64_t col, int64_t n, float *out);
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *out);
    /* Norm (unless weight is NULL) and rotation of one head, in place. */
    void (*norm_rope)(float *head, const float *weight, float eps, const float *cos, const float *sin, int64_t head_dim);
    void (*narrow)(const float *x, int64_t n, int format, void *out);
    /* One row of FORMAT_I8; returns its scale, NaN for a row that is not finite. */
    float (*to_int8)(const float *x, int64_t n, int8_t *out);
    void (*silu_mul)(float *gate, const float *up, int64_t n);
    void (*add_scaled)(float *sum, const float *x, float factor, int64_t n);
    /* Turns scores into weights in place; returns the largest score, and the sum of the weights in *total. */
    float (*softmax)(float *scores, int64_t n, float *total);
    /* The tokens of split `split` that the rows may see. A row that sees none gets total 0. Meanwhile the beginning of what this
     * thread attends to next, unless that is NULL, is fetched into the cache. */
    void (*attend)(const attention_task *task, int64_t split, const attention_task *next, int64_t next_split,
                   softmax_state out);
    void (*merge)(softmax_state sum, softmax_state part, int64_t num_rows, int64_t head_dim);
    void (*scale_out)(const float *values, float total, int64_t n, float *out);
    /* Index of the largest, the first of equals. */
    int64_t (*argmax)(const float *x, int64_t n);
    int (*all_finite)(const float *x, int64_t n);
    /* The largest of each SAMPLE_TILE numbers; whether all numbers are finite, without which the largest mean nothing. */
    int (*block_maxima)(const float *x, int64_t n, float *largest);
    /* The sum of e^((x - largest) / temperature) over at most SAMPLE_BLOCK logits, and each of them unless weights is NULL. */
    double (*weigh)(const float *logits, int64_t n, double largest, double temperature, double *weights);
} kernels;

/* The best table this processor can run, or the one called `name`; NULL when it cannot run that. */
const kernels *kernels_for(const char *name);

#endif
