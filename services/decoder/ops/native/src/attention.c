/* Attention of a whole mixed batch in one call: decoding and prefilling sequences alike. */
#include <math.h>
#include <string.h>

#include "layers.h"
#include "linear.h"

enum { TASK_ROWS = 8, SPLIT_ROWS = 2 };

typedef struct {
    context *c;
    const attention_layer *layer;
    const step *s;
    int64_t index;
    float *q, *kv; /* [T, heads * head_dim]; [T, 2 * kv_heads * head_dim], K first */
} qkv_job;

/* Norm and rotation of one token's heads; K and V are rounded to the pool's format here, before anything reads them. */
static void finish_qkv(void *arg, int64_t t, int member) {
    qkv_job *job = arg;
    const attention_layer *l = job->layer;
    const kernels *k = job->c->k;
    const step *s = job->s;
    int64_t d = l->head_dim, kv_size = l->num_kv_heads * d;
    const float *cos_sin = (const float *)job->c->buffers[BUFFER_COS_SIN].memory + t * d;
    float *q = job->q + t * l->num_heads * d, *kv = job->kv + t * 2 * kv_size;
    (void)member;
    for (int64_t h = 0; h < l->num_heads; h++) k->norm_rope(q + h * d, l->q_norm, l->eps, cos_sin, cos_sin + d / 2, d);
    for (int64_t h = 0; h < l->num_kv_heads; h++) k->norm_rope(kv + h * d, l->k_norm, l->eps, cos_sin, cos_sin + d / 2, d);
    for (int value = 0; value < 2; value++) {
        int64_t row = own_row(s, job->index, value) + t * l->num_kv_heads;
        const float *from = kv + value * kv_size;
        if (s->kv_format != FORMAT_I8) {
            k->narrow(from, kv_size, s->kv_format, s->own_rows + row * s->row_bytes);
            continue;
        }
        for (int64_t h = 0; h < l->num_kv_heads; h++, row++)
            s->own_scales[row] = k->to_int8(from + h * d, d, (int8_t *)s->own_rows + row * d);
    }
}

typedef struct {
    const attention_layer *layer;
    const step *s;
    float *cos_sin; /* [T, head_dim], cos first */
} angle_job;

/* In double, so that a far position's angle is as good as a near one's. */
static void token_angles(void *arg, int64_t t, int member) {
    angle_job *job = arg;
    int64_t d = job->layer->head_dim;
    float *out = job->cos_sin + t * d;
    (void)member;
    for (int64_t i = 0; i < d / 2; i++) {
        double angle = (double)job->s->positions[t] * (double)job->layer->rope_inv_freq[i];
        out[i] = (float)(cos(angle) * job->layer->rope_factor);
        out[d / 2 + i] = (float)(sin(angle) * job->layer->rope_factor);
    }
}

/* Once a step: the layers of a model rotate alike. */
static void prepare_angles(context *c, const attention_layer *l, const step *s) {
    if (c->angles_of == l->rope_inv_freq) return;
    angle_job job = {l, s, NEW(c, BUFFER_COS_SIN, float, s->num_tokens * l->head_dim)};
    if (!c->failed) team_for(c->team, s->num_tokens, token_angles, &job);
    c->angles_of = l->rope_inv_freq;
}

void norm_qkv_rope(context *c, const attention_layer *l, int64_t index, const step *s, const float *hidden) {
    int64_t tokens = s->num_tokens, q_size = l->num_heads * l->head_dim, kv_size = l->num_kv_heads * l->head_dim;
    prepare_angles(c, l, s);
    const float *normed = norm_rows(c, hidden, l->input_norm, l->eps, tokens, l->hidden_size);
    qkv_job job = {c, l, s, index, NEW(c, BUFFER_Q, float, tokens * q_size), NEW(c, BUFFER_KV, float, tokens * 2 * kv_size)};
    if (c->failed) return;
    const projection all[3] = {
        {&l->q, job.q, q_size, 0}, {&l->k, job.kv, 2 * kv_size, 0}, {&l->v, job.kv + kv_size, 2 * kv_size, 0}};
    for (int from = 0; from < 3;) { /* as many at once as read the same activations */
        int to = from + 1;
        while (to < 3 && same_activations(c, all[from].m, all[to].m)) to++;
        project(c, all + from, to - from, prepare_activations(c, all[from].m, normed, l->hidden_size, tokens));
        from = to;
    }
    if (!c->failed) team_for(c->team, tokens, finish_qkv, &job);
}

/* One item of attention: up to TASK_ROWS rows of a sequence on one K/V head; with one split, a part to be merged later. */
typedef struct {
    int64_t seq, row, num_rows, kv_head, split; /* split -1: all of them, one after the other */
    int64_t state;                              /* where its state is, in rows of softmax_state */
} task;

typedef struct {
    context *c;
    const attention_layer *layer;
    const step *s;
    int64_t index, width, group, num_tasks, scratch_rows;
    task *tasks;
    softmax_state parts, scratch;
} attend_job;

static softmax_state state_at(softmax_state s, int64_t row, int64_t width) {
    return (softmax_state){s.largest + row, s.total + row, s.values + row * width, s.weights + row * WEIGHTS};
}

static attention_task describe(const attend_job *job, const task *t) {
    const attention_layer *l = job->layer;
    const step *s = job->s;
    int64_t q_size = l->num_heads * l->head_dim, start = s->cu_seqlens[t->seq];
    int64_t own_k = own_row(s, job->index, 0) + start * l->num_kv_heads, own_v = own_row(s, job->index, 1) + start * l->num_kv_heads;
    int scaled = s->kv_format == FORMAT_I8;
    return (attention_task){
        .num_heads = l->num_heads, .num_kv_heads = l->num_kv_heads, .head_dim = l->head_dim, .window = l->window,
        .scale = l->scale, .kv_format = s->kv_format, .blocks = s->blocks + t->seq * s->table_width,
        .row_bytes = s->row_bytes, .block_size = s->block_size, .value_stride = s->value_stride,
        .first_row = job->index * s->layer_stride + t->kv_head * s->head_stride, .token_stride = s->token_stride,
        .rows_offset = s->rows_offset,
        .own_k = s->own_rows + own_k * s->row_bytes, .own_v = s->own_rows + own_v * s->row_bytes,
        .own_k_scales = scaled ? s->own_scales + own_k : NULL, .own_v_scales = scaled ? s->own_scales + own_v : NULL,
        .context_len = s->context_lens[t->seq],
        .q = (const float *)job->c->buffers[BUFFER_Q].memory + t->row * q_size, .q_stride = q_size,
        .num_rows = t->num_rows, .first_position = s->context_lens[t->seq] + t->row - start, .kv_head = t->kv_head};
}

static void write_out(const attend_job *job, const task *t, softmax_state state) {
    const attention_layer *l = job->layer;
    float *out = (float *)job->c->buffers[BUFFER_ATTENDED].memory;
    for (int64_t i = 0; i < t->num_rows; i++)
        for (int64_t g = 0; g < job->group; g++) {
            int64_t r = i * job->group + g, head = t->kv_head * job->group + g;
            job->c->k->scale_out(state.values + r * job->width, state.total[r], l->head_dim,
                                 out + ((t->row + i) * l->num_heads + head) * l->head_dim);
        }
}

static int64_t num_splits(const attention_task *a) {
    return (a->first_position + a->num_rows + KV_SPLIT - 1) / KV_SPLIT;
}

static int64_t first_split(const attention_task *a) {
    return a->window && a->first_position >= a->window ? (a->first_position - a->window + 1) / KV_SPLIT : 0;
}

static void attend_item(void *arg, int64_t item, int member) {
    attend_job *job = arg;
    const task *t = job->tasks + item;
    attention_task a = describe(job, t);
    if (t->split >= 0) {
        int64_t after = team_next(job->c->team, member);
        const task *other = after < 0 || job->tasks[after].split < 0 ? NULL : job->tasks + after;
        attention_task next = other ? describe(job, other) : a;
        job->c->k->attend(&a, t->split, other ? &next : NULL, other ? other->split : 0, state_at(job->parts, t->state, job->width));
        return;
    }
    int64_t rows = t->num_rows * job->group;
    softmax_state sum = state_at(job->scratch, member * 2 * job->scratch_rows, job->width);
    softmax_state part = state_at(sum, job->scratch_rows, job->width);
    memset(sum.total, 0, (size_t)rows * sizeof *sum.total);
    for (int64_t split = first_split(&a); split < num_splits(&a); split++) {
        job->c->k->attend(&a, split, NULL, 0, part);
        job->c->k->merge(sum, part, rows, job->layer->head_dim);
    }
    write_out(job, t, sum);
}

/* Merges the parts of a task's rows in order of split; the first part's state takes the sum. */
static void merge_item(void *arg, int64_t item, int member) {
    attend_job *job = arg;
    const task *t = job->tasks + item;
    (void)member;
    if (t->split < 0) return;
    if (item && t[-1].split >= 0 && t[-1].row == t->row && t[-1].kv_head == t->kv_head) return; /* not the first part */
    softmax_state sum = state_at(job->parts, t->state, job->width);
    int64_t rows = t->num_rows * job->group;
    for (const task *p = t + 1; p < job->tasks + job->num_tasks && p->row == t->row && p->kv_head == t->kv_head; p++)
        job->c->k->merge(sum, state_at(job->parts, p->state, job->width), rows, job->layer->head_dim);
    write_out(job, t, sum);
}

/* Few rows (decode): a task for each split, so that one long sequence keeps the team busy. Many rows: one task. */
static int64_t add_tasks(task *tasks, int64_t count, int64_t *state, const attend_job *job, int64_t seq) {
    const step *s = job->s;
    int64_t start = s->cu_seqlens[seq], stop = s->cu_seqlens[seq + 1];
    int by_split = stop - start <= SPLIT_ROWS;
    for (int64_t row = start; row < stop; row += TASK_ROWS)
        for (int64_t h = 0; h < job->layer->num_kv_heads; h++) {
            task t = {.seq = seq, .row = row, .kv_head = h, .split = -1};
            t.num_rows = stop - row < TASK_ROWS ? stop - row : TASK_ROWS;
            attention_task a = describe(job, &t);
            int64_t from = by_split ? first_split(&a) : 0, to = by_split ? num_splits(&a) : 1;
            for (int64_t split = from; split < to; split++, count++) {
                if (!tasks) continue;
                tasks[count] = t;
                if (!by_split) continue;
                tasks[count].split = split;
                tasks[count].state = *state;
                *state += t.num_rows * job->group;
            }
            if (!tasks && by_split) *state += (to - from) * t.num_rows * job->group;
        }
    return count;
}

static softmax_state new_states(context *c, enum buffer which, int64_t rows, int64_t width) {
    float *memory = NEW(c, which, float, rows * (width + WEIGHTS + 2)), *numbers = memory + rows * (width + WEIGHTS);
    return (softmax_state){numbers, numbers + rows, memory, memory + rows * width};
}

void attend_step(context *c, const attention_layer *l, int64_t index, const step *s) {
    attend_job job = {.c = c, .layer = l, .s = s, .index = index, .group = l->num_heads / l->num_kv_heads};
    job.width = (l->head_dim + 7) / 8 * 8;
    job.scratch_rows = TASK_ROWS * job.group;
    NEW(c, BUFFER_ATTENDED, float, s->num_tokens * l->num_heads * l->head_dim);
    int64_t state_rows = 0, count = 0;
    for (int64_t seq = 0; seq < s->num_seqs; seq++) count = add_tasks(NULL, count, &state_rows, &job, seq);
    job.num_tasks = count;
    job.tasks = NEW(c, BUFFER_TASKS, task, count);
    job.parts = new_states(c, BUFFER_SOFTMAX, state_rows, job.width);
    job.scratch = new_states(c, BUFFER_MEMBER_SCRATCH, team_size(c->team) * 2 * job.scratch_rows, job.width);
    if (c->failed) return;
    count = state_rows = 0;
    for (int64_t seq = 0; seq < s->num_seqs; seq++) count = add_tasks(job.tasks, count, &state_rows, &job, seq);
    team_for(c->team, count, attend_item, &job);
    if (state_rows) team_for(c->team, count, merge_item, &job);
}

void out_proj_residual(context *c, const attention_layer *l, const step *s, float *hidden) {
    const float *attended = c->buffers[BUFFER_ATTENDED].memory;
    projection p = {&l->o, hidden, l->hidden_size, 1};
    project(c, &p, 1, prepare_activations(c, &l->o, attended, l->num_heads * l->head_dim, s->num_tokens));
}
