/* The library's functions, as Python calls them. One context serves one thread. */
#ifndef LH_FORWARD_H
#define LH_FORWARD_H

#include "layers.h"
#include "sample.h"

#define EXPORT __attribute__((visibility("default")))

enum op_code { OP_EMBED, OP_NORM_QKV_ROPE, OP_ATTENTION, OP_OUT_PROJ, OP_MLP };

/* `handle` is a matrix, an attention_layer or a moe_layer; `layer` counts the layers of the pool. */
typedef struct {
    int32_t code, layer;
    const void *handle;
} recorded_op;

typedef struct {
    const float *norm;
    float eps;
    int32_t reserved;
    matrix head;
} head_layer;

/* Names the sources that the library was built from. */
EXPORT const char *lh_source_hash(void);

/* NULL when the processor cannot run `isa` ("" for the best), or without memory or threads. */
EXPORT context *lh_context_new(const char *isa, int threads, int fast);
EXPORT void lh_context_free(context *c);
EXPORT const char *lh_context_isa(const context *c);

/* Runs the operations; the hidden state stays in the context. -1 without memory. */
EXPORT int lh_forward(context *c, const step *s, const recorded_op *ops, int64_t num_ops, int64_t hidden_size);
/* Copies the hidden state out, for tests. */
EXPORT int lh_hidden_rows(const context *c, int64_t num_floats, float *out);
/* Logits [num_rows, vocab_size] of some rows of the hidden state. */
EXPORT int lh_head_logits(context *c, const head_layer *l, const int32_t *rows, int64_t num_rows, float *logits);
/* Draws a token for each row of logits [vocab_size]. -1 without memory. */
EXPORT int lh_sample(context *c, sample_row *rows, int64_t num_rows, int64_t vocab_size);
/* Copies the step's own rows into the blocks. */
EXPORT void lh_commit(context *c, const step *s);

/* For benchmarks: reads memory with the whole team, and returns what keeps the reads from being optimised away. */
EXPORT uint64_t lh_read(context *c, const void *memory, int64_t num_bytes);
/* MoE blocks computed since the last call, and the sum of the distinct experts that each read. */
EXPORT void lh_take_routing(context *c, int64_t *blocks, int64_t *experts);

#endif
