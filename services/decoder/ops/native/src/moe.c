/* The mixture of experts: route, group the token-expert pairs by expert, and read each expert's weights once. */
#include <string.h>

#include "layers.h"
#include "linear.h"

#define INLINE static inline __attribute__((always_inline))

/* AHEAD: how many items before its turn the pages of an expert's beginning are touched. */
enum { GATE_ROWS = 32, TOKEN_BLOCK = 32, AHEAD = 6, TOUCHED = 2 };

/* Pairs in order of expert; pair p belongs to token pair_token[p]. slot[t * K + j] is the pair of token t's j-th best expert. */
typedef struct {
    int64_t num_pairs;
    float *weights;             /* [T, K] */
    int32_t *experts, *slots;   /* [T, K] */
    int32_t *pair_token;        /* [T * K] */
    int32_t *first;             /* [E + 1], an expert's first pair */
    int32_t *active;            /* experts with a pair */
    int64_t num_active;
} routes;

typedef struct {
    context *c;
    const moe_layer *layer;
    routes *r;
    float *scores;
} route_job;

/* The best K of a row of router scores, best first, the lower index of equals, with their weights. */
static void route_token(void *arg, int64_t t, int member) {
    route_job *job = arg;
    const moe_layer *l = job->layer;
    int64_t k = l->experts_per_token;
    float *scores = job->scores + t * l->num_experts, total, chosen = 0;
    (void)member;
    job->c->k->softmax(scores, l->num_experts, &total);
    for (int64_t j = 0; j < k; j++) {
        int64_t best = job->c->k->argmax(scores, l->num_experts);
        job->r->experts[t * k + j] = (int32_t)best;
        job->r->weights[t * k + j] = scores[best];
        chosen += scores[best];
        scores[best] = -1; /* below every weight */
    }
    float divisor = l->renormalise ? chosen : total;
    for (int64_t j = 0; j < k; j++) job->r->weights[t * k + j] /= divisor;
}

static void group_pairs(const moe_layer *l, int64_t num_tokens, routes *r) {
    int64_t k = l->experts_per_token;
    memset(r->first, 0, (size_t)(l->num_experts + 1) * sizeof *r->first);
    for (int64_t i = 0; i < num_tokens * k; i++) r->first[r->experts[i] + 1]++;
    r->num_active = 0;
    for (int64_t e = 0; e < l->num_experts; e++) {
        if (r->first[e + 1]) r->active[r->num_active++] = (int32_t)e;
        r->first[e + 1] += r->first[e];
    }
    for (int64_t i = 0; i < num_tokens * k; i++) { /* first[e] is the next free pair of e for a while */
        int32_t pair = r->first[r->experts[i]]++;
        r->slots[i] = pair;
        r->pair_token[pair] = (int32_t)(i / k);
    }
    for (int64_t e = l->num_experts; e > 0; e--) r->first[e] = r->first[e - 1];
    r->first[0] = 0;
}

static routes new_routes(context *c, const moe_layer *l, int64_t num_tokens) {
    int64_t pairs = num_tokens * l->experts_per_token, e = l->num_experts;
    routes r = {.num_pairs = pairs};
    r.weights = NEW(c, BUFFER_ROUTES, float, 4 * pairs + 2 * e + 1);
    r.experts = (int32_t *)(r.weights + pairs);
    r.slots = r.experts + pairs;
    r.pair_token = r.slots + pairs;
    r.first = r.pair_token + pairs;
    r.active = r.first + e + 1;
    return r;
}

static routes route(context *c, const moe_layer *l, const float *normed, int64_t num_tokens) {
    routes r = new_routes(c, l, num_tokens);
    float *scores = NEW(c, BUFFER_ROUTER_SCORES, float, num_tokens * l->num_experts);
    if (c->failed) return r;
    if (l->dense) {
        for (int64_t t = 0; t < num_tokens; t++) r.experts[t] = 0, r.weights[t] = 1;
    } else {
        int fast = c->fast;
        const matrix *coming = c->coming;
        c->coming = NULL; /* the experts come first, and nobody knows which */
        c->fast = 0; /* the router is float32 in every precision: a wrong expert costs more than a rounded number */
        projection p = {&l->router, scores, l->num_experts, 0};
        project(c, &p, 1, prepare_activations(c, &l->router, normed, l->hidden_size, num_tokens));
        c->fast = fast;
        c->coming = coming;
        route_job job = {c, l, &r, scores};
        if (!c->failed) team_for(c->team, num_tokens, route_token, &job);
    }
    if (!c->failed) group_pairs(l, num_tokens, &r);
    c->routed_blocks += !l->dense;
    c->routed_experts += l->dense ? 0 : r.num_active;
    return r;
}

typedef struct {
    context *c;
    const moe_layer *layer;
    const routes *r;
    const activation *acts; /* one a pair, in order of pair */
    float *gated;           /* [pairs, intermediate] */
    float *out;             /* [pairs, hidden] */
    int64_t items_per_expert, down_items_per_expert, rows_per_item, num_items;
} expert_job;

/* Touches what an item reads that begins an expert; other items' pages are neighbours of those before. */
INLINE void touch_gate_up(const expert_job *job, int64_t item) {
    if (item >= job->num_items || item % job->items_per_expert >= TOUCHED) return;
    int32_t e = job->r->active[item / job->items_per_expert];
    touch_pages(job->layer->gate + e, item % job->items_per_expert * GATE_ROWS, GATE_ROWS);
    touch_pages(job->layer->up + e, item % job->items_per_expert * GATE_ROWS, GATE_ROWS);
}

INLINE void touch_down(const moe_layer *l, const routes *r, int64_t item, int64_t items_per_expert, int64_t rows) {
    if (item >= r->num_active * items_per_expert || item % items_per_expert >= TOUCHED) return;
    touch_pages(l->down + r->active[item / items_per_expert], item % items_per_expert * rows, rows);
}

/* silu(gate) * up for some rows of one expert and all its pairs. */
static void gate_up_item(void *arg, int64_t item, int member) {
    expert_job *job = arg;
    const moe_layer *l = job->layer;
    int32_t e = job->r->active[item / job->items_per_expert];
    int64_t first = item % job->items_per_expert * GATE_ROWS, width = l->intermediate_size;
    int64_t rows = width - first < GATE_ROWS ? width - first : GATE_ROWS;
    float up[TOKEN_BLOCK * GATE_ROWS];
    int64_t after = team_next(job->c->team, member);
    int32_t next_expert = after < 0 ? e : job->r->active[after / job->items_per_expert];
    next_rows own_up = rows_from(l->up + e, first);
    touch_gate_up(job, item + AHEAD);
    if (item + AHEAD >= job->num_items)
        touch_down(l, job->r, item + AHEAD - job->num_items, job->down_items_per_expert, job->rows_per_item);
    /* Each thread's last item goes on to rows of `down`. */
    next_rows then = after < 0 ? rows_from(l->down + job->r->active[0], member * job->rows_per_item % l->down->rows)
                               : rows_from(l->gate + next_expert, after % job->items_per_expert * GATE_ROWS);
    int is_first = 1;
    for (int64_t p = job->r->first[e]; p < job->r->first[e + 1]; p += TOKEN_BLOCK) {
        int64_t n = job->r->first[e + 1] - p < TOKEN_BLOCK ? job->r->first[e + 1] - p : TOKEN_BLOCK;
        float *gate = job->gated + p * width + first;
        kernel_of(job->c, l->gate + e)(l->gate + e, first, rows, job->acts + p, n, gate, width, is_first ? &own_up : NULL);
        kernel_of(job->c, l->up + e)(l->up + e, first, rows, job->acts + p, n, up, rows, is_first ? &then : NULL);
        is_first = 0;
        for (int64_t i = 0; i < n; i++) job->c->k->silu_mul(gate + i * width, up + i * rows, rows);
    }
}

static void down_item(void *arg, int64_t item, int member) {
    expert_job *job = arg;
    const moe_layer *l = job->layer;
    int32_t e = job->r->active[item / job->items_per_expert];
    const matrix *m = l->down + e;
    int64_t first = item % job->items_per_expert * job->rows_per_item;
    int64_t rows = m->rows - first < job->rows_per_item ? m->rows - first : job->rows_per_item;
    int64_t after = team_next(job->c->team, member);
    next_rows then = {0}, *next = &then;
    touch_down(l, job->r, item + AHEAD, job->items_per_expert, job->rows_per_item);
    if (after >= 0) {
        int32_t next_expert = job->r->active[after / job->items_per_expert];
        then = rows_from(l->down + next_expert, after % job->items_per_expert * job->rows_per_item);
    } else if (!fetch_coming(job->c, member, &then)) {
        next = NULL;
    }
    for (int64_t p = job->r->first[e]; p < job->r->first[e + 1]; p += TOKEN_BLOCK) {
        int64_t n = job->r->first[e + 1] - p < TOKEN_BLOCK ? job->r->first[e + 1] - p : TOKEN_BLOCK;
        kernel_of(job->c, m)(m, first, rows, job->acts + p, n, job->out + p * l->hidden_size + first, l->hidden_size, next);
        next = NULL;
    }
}

typedef struct {
    const kernels *k;
    const moe_layer *layer;
    const routes *r;
    const float *out;
    float *hidden;
} sum_job;

/* In order of the token's routes, best first. */
static void sum_token(void *arg, int64_t t, int member) {
    sum_job *job = arg;
    int64_t n = job->layer->hidden_size, k = job->layer->experts_per_token;
    (void)member;
    for (int64_t j = t * k; j < (t + 1) * k; j++)
        job->k->add_scaled(job->hidden + t * n, job->out + job->r->slots[j] * n, job->r->weights[j], n);
}

/* The prepared rows of the pairs' tokens, in order of pair. */
static const activation *spread(context *c, const routes *r, activations a) {
    activation *pairs = NEW(c, BUFFER_PAIR_ACTS, activation, r->num_pairs);
    if (c->failed) return NULL;
    for (int64_t p = 0; p < r->num_pairs; p++) pairs[p] = a.rows[r->pair_token[p]];
    return pairs;
}

static void run_experts(context *c, const moe_layer *l, const routes *r, const float *normed, int64_t num_tokens,
                        float *hidden) {
    float *gated = NEW(c, BUFFER_GATED, float, r->num_pairs * l->intermediate_size);
    float *out = NEW(c, BUFFER_EXPERT_OUT, float, r->num_pairs * l->hidden_size);
    expert_job job = {.c = c, .layer = l, .r = r, .gated = gated, .out = out, .rows_per_item = rows_per_item(l->down)};
    job.items_per_expert = (l->intermediate_size + GATE_ROWS - 1) / GATE_ROWS;
    job.down_items_per_expert = (l->down->rows + job.rows_per_item - 1) / job.rows_per_item;
    job.num_items = r->num_active * job.items_per_expert;
    for (int64_t item = 0; item < AHEAD; item++) touch_gate_up(&job, item);
    activations tokens = prepare_activations(c, l->gate, normed, l->hidden_size, num_tokens);
    job.acts = c->failed ? NULL : spread(c, r, tokens);
    if (c->failed) return;
    team_for(c->team, job.num_items, gate_up_item, &job);
    job.acts = prepare_activations(c, l->down, gated, l->intermediate_size, r->num_pairs).rows;
    if (c->failed) return;
    job.items_per_expert = job.down_items_per_expert;
    team_for(c->team, r->num_active * job.items_per_expert, down_item, &job);
    sum_job sum = {c->k, l, r, out, hidden};
    team_for(c->team, num_tokens, sum_token, &sum);
}

void moe_residual(context *c, const moe_layer *l, int64_t num_tokens, float *hidden) {
    const float *normed = norm_rows(c, hidden, l->norm, l->eps, num_tokens, l->hidden_size);
    if (c->failed) return;
    routes r = route(c, l, normed, num_tokens);
    if (!c->failed) run_experts(c, l, &r, normed, num_tokens, hidden);
}
