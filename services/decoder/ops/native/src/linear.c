#include "linear.h"

#include <string.h>

enum { MAX_PROJECTIONS = 4, ITEM_BYTES = 64 << 10, MIN_ITEM_ROWS = 16, MAX_ITEM_ROWS = 128, TOKEN_BLOCK = 32 };

int is_fast(const context *c, const matrix *m) { return c->fast && m->format >= FORMAT_Q4; }

int same_activations(const context *c, const matrix *a, const matrix *b) {
    if (a->cols != b->cols || is_fast(c, a) != is_fast(c, b)) return 0;
    return !is_fast(c, a) || (a->format == b->format && a->group_size == b->group_size);
}

next_rows rows_from(const matrix *m, int64_t first) {
    int64_t scales = first * m->scale_row_bytes;
    return (next_rows){m->weight + first * m->row_bytes, m->scales + scales, m->biases + scales};
}

rows_kernel *kernel_of(const context *c, const matrix *m) { return is_fast(c, m) ? c->k->rows_fast : c->k->rows_exact; }

int64_t rows_per_item(const matrix *m) {
    int64_t rows = ITEM_BYTES / (m->row_bytes + 2 * m->scale_row_bytes) / 4 * 4;
    return rows < MIN_ITEM_ROWS ? MIN_ITEM_ROWS : rows > MAX_ITEM_ROWS ? MAX_ITEM_ROWS : rows;
}

int fetch_coming(const context *c, int member, next_rows *to) {
    if (!c->coming) return 0;
    int64_t first = member * rows_per_item(c->coming);
    if (first >= c->coming->rows) return 0;
    *to = rows_from(c->coming, first);
    return 1;
}

typedef struct {
    const kernels *k;
    const matrix *m;
    activation *rows;
} quantise_job;

static void quantise_row(void *arg, int64_t i, int member) {
    quantise_job *job = arg;
    activation *a = job->rows + i;
    (void)member;
    job->k->quantise(a->x, job->m->cols, job->m->format, job->m->group_size, (int8_t *)a->q, (float *)a->scale,
                     (float *)a->sum);
}

activations prepare_in(context *c, enum buffer heads, enum buffer bytes, enum buffer floats, const matrix *m, const float *x,
                       int64_t x_stride, int64_t num_rows) {
    int fast = is_fast(c, m);
    int64_t chunks = (m->cols + ACT_GROUP - 1) / ACT_GROUP, held = (chunks + 3) / 4 * 4; /* kernels read them by fours */
    int64_t groups = fast ? (m->cols / m->group_size + 7) / 8 * 8 : 0, scales = (chunks + 7) / 8 * 8;
    activation *rows = NEW(c, heads, activation, num_rows);
    int8_t *q = fast ? NEW(c, bytes, int8_t, num_rows * held * ACT_GROUP) : NULL;
    float *numbers = fast ? NEW(c, floats, float, num_rows * (scales + groups)) : NULL;
    if (c->failed) return (activations){NULL, 0};
    for (int64_t i = 0; i < num_rows; i++) {
        rows[i] = (activation){.x = x + i * x_stride};
        if (!fast) continue;
        rows[i].q = q + i * held * ACT_GROUP;
        rows[i].scale = numbers + i * (scales + groups);
        rows[i].sum = rows[i].scale + scales;
    }
    quantise_job job = {c->k, m, rows};
    if (fast) team_for(c->team, num_rows, quantise_row, &job);
    return (activations){rows, num_rows};
}

activations prepare_activations(context *c, const matrix *m, const float *x, int64_t x_stride, int64_t num_rows) {
    return prepare_in(c, BUFFER_ACT_HEADS, BUFFER_ACT_BYTES, BUFFER_ACT_FLOATS, m, x, x_stride, num_rows);
}

typedef struct {
    const context *c;
    const projection *projections;
    int64_t first_item[MAX_PROJECTIONS + 1];
    activations a;
} project_job;

static void add_bias(const matrix *m, int64_t first, int64_t rows, float *out, int64_t stride, int64_t tokens) {
    if (!m->out_bias) return;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r++) out[t * stride + r] += m->out_bias[first + r];
}

/* The projection that an item belongs to, and its first row there. */
static const projection *find_item(const project_job *job, int64_t item, int64_t *first) {
    int p = 0;
    while (item >= job->first_item[p + 1]) p++;
    *first = (item - job->first_item[p]) * rows_per_item(job->projections[p].m);
    return job->projections + p;
}

static void project_item(void *arg, int64_t item, int member) {
    project_job *job = arg;
    int64_t first, next_first, next_item = team_next(job->c->team, member);
    const projection *to = find_item(job, item, &first), *after = next_item < 0 ? NULL : find_item(job, next_item, &next_first);
    const matrix *m = to->m;
    int64_t step = rows_per_item(m), rows = m->rows - first < step ? m->rows - first : step;
    rows_kernel *kernel = kernel_of(job->c, m);
    next_rows ahead = {0}, *next = &ahead;
    if (after) {
        ahead = rows_from(after->m, next_first);
    } else if (!fetch_coming(job->c, member, &ahead)) {
        next = NULL;
    }
    for (int64_t t = 0; t < job->a.num_rows; t += TOKEN_BLOCK) {
        int64_t tokens = job->a.num_rows - t < TOKEN_BLOCK ? job->a.num_rows - t : TOKEN_BLOCK;
        float *out = to->out + t * to->out_stride + first;
        if (!to->add) {
            kernel(m, first, rows, job->a.rows + t, tokens, out, to->out_stride, next);
            next = NULL;
            add_bias(m, first, rows, out, to->out_stride, tokens);
            continue;
        }
        float part[TOKEN_BLOCK * MAX_ITEM_ROWS];
        kernel(m, first, rows, job->a.rows + t, tokens, part, rows, next);
        next = NULL;
        add_bias(m, first, rows, part, rows, tokens);
        for (int64_t i = 0; i < tokens; i++)
            for (int64_t r = 0; r < rows; r++) out[i * to->out_stride + r] += part[i * rows + r];
    }
}

void project(context *c, const projection *projections, int count, activations a) {
    project_job job = {.c = c, .projections = projections, .a = a};
    if (c->failed || !a.num_rows) return;
    for (int p = 0; p < count; p++) {
        int64_t step = rows_per_item(projections[p].m);
        job.first_item[p + 1] = job.first_item[p] + (projections[p].m->rows + step - 1) / step;
    }
    team_for(c->team, job.first_item[count], project_item, &job);
}
