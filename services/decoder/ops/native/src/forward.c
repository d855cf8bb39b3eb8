/* One step through a model: the operations that Python recorded, in order, in one call. */
#include "forward.h"

#include <stdlib.h>
#include <string.h>

#include "linear.h"

enum { ALIGN = 64 };

void *context_buffer(context *c, enum buffer which, int64_t bytes) {
    if (bytes < ALIGN) bytes = ALIGN;
    if (c->buffers[which].bytes >= bytes) return c->buffers[which].memory;
    bytes = (bytes + bytes / 4 + ALIGN - 1) / ALIGN * ALIGN;
    free(c->buffers[which].memory);
    c->buffers[which].memory = aligned_alloc(ALIGN, (size_t)bytes);
    c->buffers[which].bytes = c->buffers[which].memory ? bytes : 0;
    if (!c->buffers[which].memory) c->failed = 1;
    return c->buffers[which].memory;
}

context *lh_context_new(const char *isa, int threads, int fast) {
    const kernels *k = kernels_for(isa);
    context *c = k ? calloc(1, sizeof *c) : NULL;
    if (!c) return NULL;
    c->k = k;
    c->fast = fast;
    c->team = team_new(threads);
    if (c->team) return c;
    free(c);
    return NULL;
}

void lh_context_free(context *c) {
    if (!c) return;
    team_free(c->team);
    for (int i = 0; i < BUFFERS; i++) free(c->buffers[i].memory);
    free(c);
}

const char *lh_source_hash(void) { return LH_SOURCE_HASH; }

const char *lh_context_isa(const context *c) { return c->k->name; }

typedef struct {
    context *c;
    const float *x, *weight;
    float *out;
    float eps;
    int64_t n;
} norm_job;

static void norm_row(void *arg, int64_t i, int member) {
    norm_job *job = arg;
    (void)member;
    job->c->k->rms_norm(job->x + i * job->n, job->weight, job->eps, job->n, job->out + i * job->n);
}

const float *norm_rows(context *c, const float *x, const float *weight, float eps, int64_t num_rows, int64_t n) {
    norm_job job = {c, x, weight, NEW(c, BUFFER_NORMED, float, num_rows * n), eps, n};
    if (!c->failed) team_for(c->team, num_rows, norm_row, &job);
    return job.out;
}

void embed(context *c, const matrix *table, const step *s, float *hidden) {
    for (int64_t t = 0; t < s->num_tokens; t++)
        c->k->widen(table, s->token_ids[t], 0, table->cols, hidden + t * table->cols);
}

int64_t own_row(const step *s, int64_t layer, int value) {
    return (layer * 2 + value) * s->num_tokens * s->num_kv_heads;
}

/* The matrix that the operations from `op` on multiply first, as far as it is known before they run. */
static const matrix *first_matrix(const recorded_op *op, const recorded_op *end) {
    for (; op < end; op++) {
        const attention_layer *attention = op->handle;
        const moe_layer *mlp = op->handle;
        switch (op->code) {
        case OP_NORM_QKV_ROPE: return &attention->q;
        case OP_OUT_PROJ: return &attention->o;
        case OP_MLP: return mlp->dense ? mlp->gate : &mlp->router;
        default: break;
        }
    }
    return NULL;
}

static void run_op(context *c, const step *s, const recorded_op *op, float *hidden) {
    switch (op->code) {
    case OP_EMBED: embed(c, op->handle, s, hidden); break;
    case OP_NORM_QKV_ROPE: norm_qkv_rope(c, op->handle, op->layer, s, hidden); break;
    case OP_ATTENTION: attend_step(c, op->handle, op->layer, s); break;
    case OP_OUT_PROJ: out_proj_residual(c, op->handle, s, hidden); break;
    case OP_MLP: moe_residual(c, op->handle, s->num_tokens, hidden); break;
    default: break;
    }
}

int lh_forward(context *c, const step *s, const recorded_op *ops, int64_t num_ops, int64_t hidden_size) {
    c->failed = 0;
    float *hidden = NEW(c, BUFFER_HIDDEN, float, s->num_tokens * hidden_size);
    c->angles_of = NULL;
    for (int64_t i = 0; i < num_ops && !c->failed; i++) {
        c->coming = first_matrix(ops + i + 1, ops + num_ops);
        run_op(c, s, ops + i, hidden);
    }
    c->coming = NULL;
    return c->failed ? -1 : 0;
}

int lh_hidden_rows(const context *c, int64_t num_floats, float *out) {
    if (c->buffers[BUFFER_HIDDEN].bytes < num_floats * (int64_t)sizeof *out) return -1;
    memcpy(out, c->buffers[BUFFER_HIDDEN].memory, (size_t)num_floats * sizeof *out);
    return 0;
}

int lh_head_logits(context *c, const head_layer *l, const int32_t *rows, int64_t num_rows, float *logits) {
    const float *hidden = c->buffers[BUFFER_HIDDEN].memory;
    float *picked = NEW(c, BUFFER_HEAD_ROWS, float, num_rows * l->head.cols);
    if (c->failed) return -1;
    for (int64_t i = 0; i < num_rows; i++)
        memcpy(picked + i * l->head.cols, hidden + rows[i] * l->head.cols, (size_t)l->head.cols * sizeof *picked);
    const float *normed = norm_rows(c, picked, l->norm, l->eps, num_rows, l->head.cols);
    projection p = {&l->head, logits, l->head.rows, 0};
    if (!c->failed)
        project(c, &p, 1, prepare_activations(c, &l->head, normed, l->head.cols, num_rows));
    return c->failed ? -1 : 0;
}

typedef struct {
    const step *s;
} commit_job;

static void commit_token(void *arg, int64_t t, int member) {
    const step *s = ((commit_job *)arg)->s;
    uint8_t *block = (uint8_t *)(uintptr_t)s->commit_blocks[t];
    (void)member;
    for (int64_t layer = 0; layer < s->num_layers; layer++)
        for (int value = 0; value < 2; value++) {
            int64_t from = own_row(s, layer, value) + t * s->num_kv_heads;
            int64_t to = layer * s->layer_stride + value * s->value_stride + s->commit_offsets[t] * s->token_stride;
            for (int64_t h = 0; h < s->num_kv_heads; h++, from++, to += s->head_stride) {
                memcpy(block + s->rows_offset + to * s->row_bytes, s->own_rows + from * s->row_bytes, (size_t)s->row_bytes);
                if (s->kv_format == FORMAT_I8) ((float *)block)[to] = s->own_scales[from];
            }
        }
}

void lh_commit(context *c, const step *s) {
    commit_job job = {s};
    team_for(c->team, s->num_tokens, commit_token, &job);
}
