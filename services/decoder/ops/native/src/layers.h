/* The layers of a model and one step of it, as Python describes them (layout.py mirrors these structs). */
#ifndef LH_LAYERS_H
#define LH_LAYERS_H

#include "context.h"

typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, hidden_size, window;
    float eps, scale;
    const float *input_norm, *q_norm, *k_norm; /* the last two may be NULL */
    const float *rope_inv_freq;                /* [head_dim / 2]; layers that share it share the pointer */
    double rope_factor;
    matrix q, k, v, o;
} attention_layer;

/* A mixture of experts; a dense MLP is one expert without a router. */
typedef struct {
    int64_t hidden_size, intermediate_size, num_experts, experts_per_token;
    int32_t renormalise, dense;
    float eps;
    int32_t reserved;
    const float *norm;
    matrix router;
    const matrix *gate, *up, *down; /* [num_experts] each */
} moe_layer;

typedef struct {
    int64_t num_tokens, num_seqs;
    const int32_t *token_ids, *positions, *cu_seqlens, *context_lens;
    const uint64_t *blocks; /* [num_seqs, table_width], addresses */
    int64_t table_width, block_size;
    /* Inside a block: rows of head_dim elements, after rows_offset bytes of scales (of FORMAT_I8). Strides count rows. */
    int64_t layer_stride, value_stride, head_stride, token_stride, row_bytes, rows_offset;
    int32_t kv_format, reserved;
    int64_t num_layers, num_kv_heads, head_dim;
    /* The step's own K/V rows, [num_layers, 2, num_tokens, num_kv_heads, head_dim], the scales of FORMAT_I8 likewise, and where
     * the rows of a token are committed. */
    uint8_t *own_rows;
    float *own_scales;
    const uint64_t *commit_blocks; /* [num_tokens], addresses */
    const int64_t *commit_offsets; /* [num_tokens], tokens into the block */
} step;

void embed(context *c, const matrix *table, const step *s, float *hidden);
void norm_qkv_rope(context *c, const attention_layer *layer, int64_t index, const step *s, const float *hidden);
void attend_step(context *c, const attention_layer *layer, int64_t index, const step *s);
void out_proj_residual(context *c, const attention_layer *layer, const step *s, float *hidden);
void moe_residual(context *c, const moe_layer *layer, int64_t num_tokens, float *hidden);

/* The number of the first of the step's own rows of K (value 0) or V (value 1) of a layer. */
int64_t own_row(const step *s, int64_t layer, int value);

/* [num_tokens, n] rows of x, normed into the context's BUFFER_NORMED. */
const float *norm_rows(context *c, const float *x, const float *weight, float eps, int64_t num_rows, int64_t n);

#endif
