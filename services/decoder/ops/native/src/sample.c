#include "sample.h"

#include <math.h>
#include <stdlib.h>

#include "forward.h"
#include "select.h"

/* CHUNK logits are one item of work: whole tiles and whole blocks. */
enum { CHUNK = 16 << 10 };

/* Logits that are looked at: a row's, or its raw ones where those differ. */
typedef struct {
    const float *logits;
    float *tiles;           /* [tiles of the vocabulary], the largest of each */
    uint8_t *chunk_finite;  /* [chunks of the vocabulary] */
    int64_t best;           /* -1: nothing can be drawn from them */
} view;

/* Sums of the weights of each block of a view, at one temperature. */
typedef struct {
    const view *of;
    double temperature;
    double *masses; /* [blocks of the vocabulary]; running sums in the end */
} weighing;

typedef struct {
    const kernels *k;
    sample_row *rows;
    view *views, **view_of, **raw_view_of;
    weighing *weighings, **draw_of, **raw_of; /* by row; NULL where none is needed */
    int64_t num_rows, num_views, num_weighings, vocab_size, tiles, chunks, blocks;
    uint8_t *scratch;
    int64_t scratch_bytes;
} sampling;

/* One member's memory for filters and alternatives; each [vocab_size]. */
typedef struct {
    candidate *candidates;
    double *weights;
    float *logits;
    int32_t *ids;
} scratch;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static void look_at_chunk(void *arg, int64_t item, int member) {
    sampling *s = arg;
    view *v = s->views + item / s->chunks;
    int64_t chunk = item % s->chunks, first = chunk * CHUNK;
    (void)member;
    v->chunk_finite[chunk] =
        (uint8_t)s->k->block_maxima(v->logits + first, smaller(CHUNK, s->vocab_size - first), v->tiles + first / SAMPLE_TILE);
}

/* Minus infinity is a logit like any other, unless it is the best. */
static int can_be_drawn_from(const float *x, int64_t n) {
    int64_t below = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i]) || x[i] == INFINITY) return 0;
        below += x[i] == -INFINITY;
    }
    return below < n;
}

static void settle_view(void *arg, int64_t i, int member) {
    sampling *s = arg;
    view *v = s->views + i;
    int finite = 1;
    (void)member;
    for (int64_t chunk = 0; chunk < s->chunks; chunk++) finite &= v->chunk_finite[chunk];
    v->best = -1;
    if (!finite && !can_be_drawn_from(v->logits, s->vocab_size)) return;
    int64_t tile = s->k->argmax(v->tiles, s->tiles);
    v->best = tile * SAMPLE_TILE;
    while (v->logits[v->best] != v->tiles[tile]) v->best++;
}

static void weigh_chunk(void *arg, int64_t item, int member) {
    sampling *s = arg;
    weighing *w = s->weighings + item / s->chunks;
    int64_t first = item % s->chunks * CHUNK, end = smaller(first + CHUNK, s->vocab_size);
    (void)member;
    if (w->of->best < 0) return;
    double largest = w->of->logits[w->of->best];
    for (int64_t i = first; i < end; i += SAMPLE_BLOCK)
        w->masses[i / SAMPLE_BLOCK] =
            s->k->weigh(w->of->logits + i, smaller(SAMPLE_BLOCK, end - i), largest, w->temperature, NULL);
}

static void accumulate(double *sums, int64_t n) {
    for (int64_t i = 1; i < n; i++) sums[i] += sums[i - 1];
}

/* The first place above the target, but none after the last that adds to the sum. */
static int64_t first_above(const double *sums, int64_t n, double target) {
    int64_t i = 0;
    while (i < n && sums[i] <= target && sums[i] < sums[n - 1]) i++;
    return i;
}

/* The place in a block of weights, which are overwritten. */
static int64_t place_in_block(double *weights, int64_t n, double target) {
    accumulate(weights, n);
    return first_above(weights, n, target);
}

/* A block's sum in eight lanes, as the kernels add up while they compute the weights. */
static double mass_of(const double *weights, int64_t n) {
    double lane[8] = {0};
    for (int64_t i = 0; i < n; i++) lane[i % 8] += weights[i];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

static int64_t place_of(double *weights, int64_t n, double noise) {
    double total = 0, running = 0, before = 0;
    for (int64_t i = 0; i < n; i += SAMPLE_BLOCK) total += mass_of(weights + i, smaller(SAMPLE_BLOCK, n - i));
    double target = noise * total;
    int64_t block = 0;
    for (;; block += SAMPLE_BLOCK) {
        running = before + mass_of(weights + block, smaller(SAMPLE_BLOCK, n - block));
        if (running > target || running >= total) break;
        before = running;
    }
    return block + place_in_block(weights + block, smaller(SAMPLE_BLOCK, n - block), target - before);
}

static int32_t draw_from_all(const sampling *s, const weighing *w, double noise) {
    double weights[SAMPLE_BLOCK], target = noise * w->masses[s->blocks - 1];
    int64_t block = first_above(w->masses, s->blocks, target), first = block * SAMPLE_BLOCK;
    int64_t n = smaller(SAMPLE_BLOCK, s->vocab_size - first);
    s->k->weigh(w->of->logits + first, n, w->of->logits[w->of->best], w->temperature, weights);
    return (int32_t)(first + place_in_block(weights, n, target - (block ? w->masses[block - 1] : 0)));
}

static int compare_ids(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static int32_t draw_filtered(const sampling *s, const sample_row *row, const view *v, scratch m) {
    int64_t n = s->vocab_size;
    const float *logits = v->logits;
    if (row->top_k > 0 && row->top_k < n) {
        n = row->top_k;
        select_best(v->logits, s->vocab_size, v->tiles, n, m.candidates);
        for (int64_t i = 0; i < n; i++) m.ids[i] = (int32_t)m.candidates[i].id;
        qsort(m.ids, (size_t)n, sizeof *m.ids, compare_ids);
        for (int64_t i = 0; i < n; i++) m.logits[i] = v->logits[m.ids[i]];
        logits = m.logits;
    } else {
        for (int64_t i = 0; i < n; i++) m.ids[i] = (int32_t)i;
    }
    for (int64_t i = 0; i < n; i += SAMPLE_BLOCK)
        s->k->weigh(logits + i, smaller(SAMPLE_BLOCK, n - i), v->logits[v->best], row->temperature, m.weights + i);
    if (row->top_p < 1.0) n = keep_top_p(row->top_p, m.weights, m.ids, n, m.candidates);
    if (row->min_p > 0.0) n = keep_min_p(row->min_p, m.weights, m.ids, n);
    return m.ids[place_of(m.weights, n, row->noise)];
}

static int is_filtered(const sample_row *row) { return row->top_k > 0 || row->top_p < 1.0 || row->min_p > 0.0; }

static scratch scratch_of(const sampling *s, int member) {
    scratch m;
    m.candidates = (candidate *)(s->scratch + member * s->scratch_bytes);
    m.weights = (double *)(m.candidates + s->vocab_size);
    m.logits = (float *)(m.weights + s->vocab_size);
    m.ids = (int32_t *)(m.logits + s->vocab_size);
    return m;
}

static void finish_row(void *arg, int64_t i, int member) {
    sampling *s = arg;
    sample_row *row = s->rows + i;
    view *v = s->view_of[i], *raw = s->raw_view_of[i];
    row->token_id = (int32_t)v->best;
    if (v->best < 0 || (raw && raw->best < 0)) {
        row->token_id = -1;
        return;
    }
    if (raw) {
        accumulate(s->raw_of[i]->masses, s->blocks);
        row->raw_largest = raw->logits[raw->best];
        row->raw_mass = s->raw_of[i]->masses[s->blocks - 1];
        candidate *found = scratch_of(s, member).candidates;
        if (row->num_alternatives) {
            select_best(raw->logits, s->vocab_size, raw->tiles, row->num_alternatives, found);
            sort_candidates(found, row->num_alternatives);
        }
        for (int32_t j = 0; j < row->num_alternatives; j++) row->alternatives[j] = (int32_t)found[j].id;
    }
    if (row->temperature == 0) return;
    if (s->draw_of[i]) {
        accumulate(s->draw_of[i]->masses, s->blocks);
        row->token_id = draw_from_all(s, s->draw_of[i], row->noise);
    } else {
        row->token_id = draw_filtered(s, row, v, scratch_of(s, member));
    }
}

static view *add_view(sampling *s, const float *logits) {
    s->views[s->num_views].logits = logits;
    return s->views + s->num_views++;
}

static weighing *add_weighing(sampling *s, const view *of, double temperature) {
    weighing *w = s->weighings + s->num_weighings++;
    w->of = of;
    w->temperature = temperature;
    return w;
}

/* Carves the memory up, and lists the views and the weighings that the rows need. */
static int prepare(context *c, sampling *s) {
    int64_t n = s->num_rows, needs_scratch = 0;
    view *views = NEW(c, BUFFER_SAMPLE_VIEWS, view, 2 * n);
    weighing *weighings = NEW(c, BUFFER_SAMPLE_WEIGHINGS, weighing, 2 * n);
    void **pointers = NEW(c, BUFFER_SAMPLE_POINTERS, void *, 4 * n);
    if (c->failed) return -1;
    s->views = views;
    s->weighings = weighings;
    s->view_of = (view **)pointers;
    s->raw_view_of = (view **)pointers + n;
    s->draw_of = (weighing **)pointers + 2 * n;
    s->raw_of = (weighing **)pointers + 3 * n;
    for (int64_t i = 0; i < n; i++) {
        const sample_row *row = s->rows + i;
        view *v = s->view_of[i] = add_view(s, row->logits);
        view *raw = s->raw_view_of[i] = !row->raw ? NULL : row->raw == row->logits ? v : add_view(s, row->raw);
        s->raw_of[i] = raw ? add_weighing(s, raw, 1.0) : NULL;
        s->draw_of[i] = row->temperature > 0 && !is_filtered(row) ? add_weighing(s, v, row->temperature) : NULL;
        needs_scratch |= row->num_alternatives || (row->temperature > 0 && is_filtered(row));
    }
    float *tiles = NEW(c, BUFFER_SAMPLE_TILES, float, s->num_views * s->tiles);
    uint8_t *finite = NEW(c, BUFFER_SAMPLE_FINITE, uint8_t, s->num_views * s->chunks);
    double *masses = NEW(c, BUFFER_SAMPLE_MASSES, double, s->num_weighings * s->blocks);
    int64_t size = (int64_t)(sizeof(candidate) + sizeof(double) + sizeof(float) + sizeof(int32_t)) * s->vocab_size;
    s->scratch_bytes = needs_scratch ? (size + 63) / 64 * 64 : 0;
    s->scratch = NEW(c, BUFFER_SAMPLE_SCRATCH, uint8_t, s->scratch_bytes * team_size(c->team));
    for (int64_t i = 0; i < s->num_views && !c->failed; i++) {
        views[i].tiles = tiles + i * s->tiles;
        views[i].chunk_finite = finite + i * s->chunks;
    }
    for (int64_t i = 0; i < s->num_weighings && !c->failed; i++) weighings[i].masses = masses + i * s->blocks;
    return c->failed ? -1 : 0;
}

int lh_sample(context *c, sample_row *rows, int64_t num_rows, int64_t vocab_size) {
    sampling s = {.k = c->k, .rows = rows, .num_rows = num_rows, .vocab_size = vocab_size};
    s.tiles = (vocab_size + SAMPLE_TILE - 1) / SAMPLE_TILE;
    s.chunks = (vocab_size + CHUNK - 1) / CHUNK;
    s.blocks = (vocab_size + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
    c->failed = 0;
    if (prepare(c, &s)) return -1;
    team_for(c->team, s.num_views * s.chunks, look_at_chunk, &s);
    team_for(c->team, s.num_views, settle_view, &s);
    team_for(c->team, s.num_weighings * s.chunks, weigh_chunk, &s);
    team_for(c->team, s.num_rows, finish_row, &s);
    return 0;
}
