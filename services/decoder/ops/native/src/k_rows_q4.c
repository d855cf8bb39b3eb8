/* Linear rows of 4-bit weights with activations quantised to bytes: integer dot products, floats once for each unit.
 *
 * A unit is the columns that share a scale: a chunk of ACT_GROUP columns, or half of one where groups are that small. The
 * activations of a chunk come as its 32 even columns, then its 32 odd ones, to meet the low and the high nibbles.
 *
 * A row's sum with a token has four lanes, one for every fourth chunk and for every fourth group,
 *     lane = 0 + bias[i] * sum[i] + bias[i + 4] * sum[i + 4] ... + dot[i] * scale[i] + dot[i + 4] * scale[i + 4] ...
 * fused and in this order, with both units of a chunk one after the other, and is (lane 0 + lane 1) + (lane 2 + lane 3).
 *
 * Up to three tokens are bound by memory, which likes rows to be read one after the other: 32 bytes of a row meet a token at a time,
 * the sums of four chunks lie side by side as their scales do, and two rows fill a vector. More tokens are bound by multiplications:
 * they go by twos, a vector with 16 bytes of each meets 16 bytes of a row, twice, and the sums of four rows lie side by side, each
 * lane in a vector of its own. Both give the same bits, because the sum of a unit is whole before it becomes a float. */
#include <string.h>

#include "kernels.h"
#include "row_scales.h"
#include "simd.h"

enum {
    LANES = 4,     /* of a sum; a quad is that many chunks */
    FEW_ROWS = 2,  /* that few tokens meet at a time */
    PAIR_ROWS = 4, /* that pairs of tokens meet at a time */
    MAX_FEW = 3,   /* tokens */
    MAX_PAIRS = 4, /* of tokens */
    LINE = 64,
    CHUNK_BYTES = ACT_GROUP / 2,
    QUAD_BYTES = LANES * CHUNK_BYTES,
    PAIR_BYTES = 2 * ACT_GROUP, /* the activations of a chunk, of two tokens */
    MAX_GROUPS = MAX_COLS / MIN_GROUP,
    MAX_CHUNKS = MAX_COLS / ACT_GROUP,
    TILE_CHUNKS = MAX_CHUNKS, /* in all pairs of tokens together: longer rows take fewer pairs */
};

/* A matrix and rows of it, as a pass takes them. */
typedef struct {
    const matrix *m;
    int64_t chunks, full_quads, groups; /* a last chunk of half the columns counts as one */
    int64_t first, num_rows;
    next_rows next;
} row_range;

/* Row `row` of the matrix, or the last one beyond its end. */
INLINE int64_t row_or_last(const matrix *m, int64_t row) { return row < m->rows ? row : m->rows - 1; }

/* Fetches scales and biases of the rows that are as far behind `next` as row i is behind the first. */
INLINE void fetch_scales(const row_range *s, int64_t i, int64_t rows) {
    int64_t from = i * s->m->scale_row_bytes, end = from + rows * s->m->scale_row_bytes;
    for (int64_t at = from; at < end; at += LINE) {
        prefetch(s->next.scales + at);
        prefetch(s->next.biases + at);
    }
}

/* Two rows' scales by lane: [quad][unit of its chunks] one row's four, then the other's. */
typedef struct {
    const uint8_t *weight[FEW_ROWS];
    uint8_t last[FEW_ROWS][QUAD_BYTES]; /* the quad that is not full, and zeros */
    float scale[2 * MAX_CHUNKS / LANES + 2][8];
} few_rows;

/* Of eight groups. */
INLINE void spread_scales(const int GROUP, f32x8 one, f32x8 other, float (*to)[8]) {
    f32x8 low = f8_lower(one, other), high = f8_upper(one, other);
    if (GROUP == 32) {
        f8_store(to[0], f8_evens(low, high));
        f8_store(to[1], f8_odds(low, high));
    } else if (GROUP == 64) {
        f8_store(to[0], low);
        f8_store(to[1], high);
    } else {
        f8_store(to[0], f8_twice_low(low));
        f8_store(to[1], f8_twice_high(low));
        f8_store(to[2], f8_twice_low(high));
        f8_store(to[3], f8_twice_high(high));
    }
}

/* Takes up row i and the next, and begins their sums with T tokens: the biases times the groups' sums. */
INLINE void begin_few(const int T, const int GROUP, const row_range *s, int64_t i, const activation *tokens, few_rows *to, f32x8 *acc) {
    const matrix *m = s->m;
    const uint8_t *scales[FEW_ROWS], *biases[FEW_ROWS];
    const int64_t full = s->full_quads * QUAD_BYTES;
    for (int r = 0; r < FEW_ROWS; r++) {
        int64_t row = row_or_last(m, s->first + i + r);
        to->weight[r] = m->weight + row * m->row_bytes;
        if (full < m->row_bytes) memcpy(to->last[r], to->weight[r] + full, (size_t)(m->row_bytes - full));
        scales[r] = m->scales + row * m->scale_row_bytes;
        biases[r] = m->biases + row * m->scale_row_bytes;
    }
    UNROLL for (int t = 0; t < T; t++) acc[t] = f8_zero();
    for (int64_t g = 0; g < s->groups; g += 8) {
        f32x8 one = load_scales(biases[0], g, s->groups, m->scale_format), other = load_scales(biases[1], g, s->groups, m->scale_format);
        f32x8 low = f8_lower(one, other), high = f8_upper(one, other);
        UNROLL for (int t = 0; t < T; t++) {
            acc[t] = f8_fma(low, f8_repeat(tokens[t].sum + g), acc[t]);
            acc[t] = f8_fma(high, f8_repeat(tokens[t].sum + g + 4), acc[t]);
        }
        one = load_scales(scales[0], g, s->groups, m->scale_format);
        other = load_scales(scales[1], g, s->groups, m->scale_format);
        spread_scales(GROUP, one, other, to->scale + g / (GROUP == 128 ? 2 : 4));
    }
}

/* A quad of a row by T tokens: the dot products of each chunk's first 16 bytes, then those of its others. */
INLINE void quad_of_few(const int T, const int FETCH, const uint8_t *weight, const activation *tokens, int64_t chunk,
                        const uint8_t *next, i32x8 *quads) {
    i32x8 pairs[2][MAX_FEW];
    UNROLL for (int i = 0; i < 2; i++) {
        parts sums[2][MAX_FEW];
        UNROLL for (int j = 0; j < 2; j++) {
            const int C = 2 * i + j;
            bytes32 w = b32_load(weight + C * CHUNK_BYTES);
            keep(w);
            bytes32 low = b32_low_nibbles(w), high = b32_high_nibbles(w);
            if (FETCH) prefetch(next + C * LINE); /* half a line a row and chunk */
            UNROLL for (int t = 0; t < T; t++) {
                const int8_t *q = tokens[t].q + (chunk + C) * ACT_GROUP;
                sums[j][t] = parts_add(parts_add(parts_zero(), low, b32_load(q)), high, b32_load(q + 32));
                keep(sums[j][t]);
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            pairs[i][t] = parts_pairs(sums[0][t], sums[1][t]);
            keep(pairs[i][t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        quads[t] = i8_quads(pairs[0][t], pairs[1][t]);
        keep(quads[t]);
    }
}

/* A quad of two rows by T tokens. */
INLINE void add_quad_of_few(const int T, const int GROUP, const uint8_t *one, const uint8_t *other, const few_rows *rows, int64_t quad,
                            const activation *tokens, const uint8_t *next, f32x8 *acc) {
    const int UNITS = GROUP == 32 ? 2 : 1;
    i32x8 quads[FEW_ROWS][MAX_FEW];
    quad_of_few(T, 1, one, tokens, quad * LANES, next, quads[0]);
    forget_loads();
    quad_of_few(T, 0, other, tokens, quad * LANES, next, quads[1]);
    forget_loads();
    UNROLL for (int t = 0; t < T; t++) {
        f32x8 scale = f8_repeat(tokens[t].scale + quad * LANES);
        i32x8 first = i8_lower(quads[0][t], quads[1][t]), second = i8_upper(quads[0][t], quads[1][t]);
        if (UNITS == 1) first = i8_add(first, second);
        acc[t] = f8_fma(f8_of_ints(first), f8_mul(f8_load(rows->scale[quad * UNITS]), scale), acc[t]);
        if (UNITS == 2) acc[t] = f8_fma(f8_of_ints(second), f8_mul(f8_load(rows->scale[quad * 2 + 1]), scale), acc[t]);
    }
}

/* out[t][i] for all rows i, T tokens. */
INLINE void few_tokens(const int T, const int GROUP, const row_range *s, const activation *tokens, float *out, int64_t out_stride) {
    const int64_t row_bytes = s->m->row_bytes, full = s->full_quads;
    few_rows rows;
    memset(rows.last, 0, sizeof rows.last);
    for (int64_t i = 0; i < s->num_rows; i += FEW_ROWS) {
        f32x8 acc[MAX_FEW];
        const uint8_t *next = s->next.weight + i * row_bytes;
        fetch_scales(s, i, FEW_ROWS);
        begin_few(T, GROUP, s, i, tokens, &rows, acc);
        const uint8_t *one = rows.weight[0], *other = rows.weight[1];
        for (int64_t k = 0; k < full; k++, next += FEW_ROWS * QUAD_BYTES)
            add_quad_of_few(T, GROUP, one + k * QUAD_BYTES, other + k * QUAD_BYTES, &rows, k, tokens, next, acc);
        if (full * LANES < s->chunks) add_quad_of_few(T, GROUP, rows.last[0], rows.last[1], &rows, full, tokens, next, acc);
        UNROLL for (int t = 0; t < T; t++) {
            float sums[8];
            f8_store(sums, f8_sums_of_fours(acc[t], acc[t], acc[t], acc[t]));
            out[t * out_stride + i] = sums[0];
            if (i + 1 < s->num_rows) out[t * out_stride + i + 1] = sums[4];
        }
    }
}

/* The activations of P pairs of tokens: [chunk][pair] bytes as the lanes take them, and by lane [chunk][pair] the scale of every
 * chunk and [group][pair] the sum of every group. */
typedef struct {
    uint8_t q[TILE_CHUNKS][PAIR_BYTES] __attribute__((aligned(32)));
    float scale[TILE_CHUNKS][8], sum[2 * TILE_CHUNKS][8];
} token_pairs;

INLINE void pair_up(const int P, const row_range *s, const activation *tokens, int64_t num_tokens, token_pairs *to) {
    for (int p = 0; p < P; p++) {
        const activation *a = tokens + 2 * p, *b = 2 * p + 1 < num_tokens ? a + 1 : a;
        for (int64_t c = 0; c < s->chunks; c++) {
            uint8_t *q = to->q[c * P + p];
            for (int half = 0; half < 2; half++) {
                bytes32 of_a = b32_load(a->q + c * ACT_GROUP + half * 32), of_b = b32_load(b->q + c * ACT_GROUP + half * 32);
                b32_store(q + half * 64, b32_lower(of_a, of_b));
                b32_store(q + half * 64 + 32, b32_upper(of_a, of_b));
            }
            f8_store(to->scale[c * P + p], f8_halves(a->scale[c], b->scale[c]));
        }
        for (int64_t g = 0; g < s->groups; g++) f8_store(to->sum[g * P + p], f8_halves(a->sum[g], b->sum[g]));
    }
}

/* Four rows, and their scales and biases [group][row]. */
typedef struct {
    const uint8_t *weight[PAIR_ROWS];
    float scale[MAX_GROUPS * PAIR_ROWS], bias[MAX_GROUPS * PAIR_ROWS];
} pair_rows;

INLINE void load_columns(const row_range *s, const uint8_t *const *from, float *to) {
    for (int64_t g = 0; g < s->groups; g += 8) {
        f32x8 v[PAIR_ROWS];
        UNROLL for (int r = 0; r < PAIR_ROWS; r++) v[r] = load_scales(from[r], g, s->groups, s->m->scale_format);
        f8_store_columns(to + g * PAIR_ROWS, PAIR_ROWS, v[0], v[1], v[2], v[3]);
    }
}

/* Takes up row i and the next three. */
INLINE void begin_pairs(const row_range *s, int64_t i, pair_rows *to) {
    const matrix *m = s->m;
    const uint8_t *scales[PAIR_ROWS], *biases[PAIR_ROWS];
    for (int r = 0; r < PAIR_ROWS; r++) {
        int64_t row = row_or_last(m, s->first + i + r);
        to->weight[r] = m->weight + row * m->row_bytes;
        scales[r] = m->scales + row * m->scale_row_bytes;
        biases[r] = m->biases + row * m->scale_row_bytes;
    }
    load_columns(s, scales, to->scale);
    load_columns(s, biases, to->bias);
}

/* HALVES times 16 bytes of four rows, from `at`, by P pairs of tokens. */
INLINE void dots_of_pairs(const int P, const int HALVES, const uint8_t *const *weight, const uint8_t (*q)[PAIR_BYTES], int64_t at,
                          i32x8 *dots) {
    i32x8 pairs[2][MAX_PAIRS];
    UNROLL for (int i = 0; i < 2; i++) {
        bytes32 low[2][2], high[2][2];
        UNROLL for (int r = 0; r < 2; r++)
            UNROLL for (int h = 0; h < HALVES; h++) {
                bytes32 w = b32_repeat(weight[2 * i + r] + at + h * 16);
                low[r][h] = b32_low_nibbles(w);
                high[r][h] = b32_high_nibbles(w);
                keep(low[r][h]);
                keep(high[r][h]);
            }
        UNROLL for (int p = 0; p < P; p++) {
            parts sums[2];
            UNROLL for (int r = 0; r < 2; r++) {
                sums[r] = parts_zero();
                UNROLL for (int h = 0; h < HALVES; h++) {
                    sums[r] = parts_add(sums[r], low[r][h], b32_load(q[p] + h * 32));
                    sums[r] = parts_add(sums[r], high[r][h], b32_load(q[p] + h * 32 + 64));
                    keep(sums[r]);
                }
            }
            pairs[i][p] = parts_pairs(sums[0], sums[1]);
            keep(pairs[i][p]);
        }
    }
    UNROLL for (int p = 0; p < P; p++) dots[p] = i8_quads(pairs[0][p], pairs[1][p]);
}

/* One lane of four rows by P pairs of tokens; returns what is to be fetched with the next lane. */
INLINE const uint8_t *add_lane(const int P, const int GROUP, const row_range *s, const pair_rows *rows, const token_pairs *tokens,
                               int64_t lane, const uint8_t *next, f32x8 *to) {
    const int UNITS = GROUP == 32 ? 2 : 1;
    f32x8 acc[MAX_PAIRS];
    UNROLL for (int p = 0; p < P; p++) acc[p] = f8_zero();
    for (int64_t g = lane; g < s->groups; g += LANES) {
        f32x8 bias = f8_repeat(rows->bias + g * PAIR_ROWS);
        UNROLL for (int p = 0; p < P; p++) acc[p] = f8_fma(bias, f8_load(tokens->sum[g * P + p]), acc[p]);
    }
    const uint8_t *const weight[PAIR_ROWS] = {rows->weight[0], rows->weight[1], rows->weight[2], rows->weight[3]};
    const int64_t chunks = s->chunks;
    for (int64_t c = lane; c < chunks; c += LANES, next += 2 * LINE) {
        prefetch(next); /* half a line a row and chunk */
        prefetch(next + LINE);
        UNROLL for (int u = 0; u < UNITS; u++) {
            int64_t group = GROUP == 128 ? c / 2 : UNITS * c + u;
            if (u == 1 && group == s->groups) break;
            i32x8 dots[MAX_PAIRS];
            const uint8_t *q = tokens->q[c * P] + u * 32;
            dots_of_pairs(P, 2 / UNITS, weight, (const uint8_t (*)[PAIR_BYTES])q, c * CHUNK_BYTES + u * 16, dots);
            f32x8 scale = f8_repeat(rows->scale + group * PAIR_ROWS);
            UNROLL for (int p = 0; p < P; p++) {
                f32x8 both = f8_mul(scale, f8_load(tokens->scale[c * P + p]));
                acc[p] = f8_fma(f8_of_ints(dots[p]), both, acc[p]);
            }
        }
    }
    UNROLL for (int p = 0; p < P; p++) to[p] = acc[p];
    return next;
}

/* out[t][i] for all rows i, P pairs of tokens; the second of the last pair may be wanting. */
INLINE void several_tokens(const int P, const int GROUP, const row_range *s, const activation *tokens, int64_t num_tokens, float *out,
                           int64_t out_stride) {
    token_pairs paired;
    pair_rows rows;
    pair_up(P, s, tokens, num_tokens, &paired);
    for (int64_t i = 0; i < s->num_rows; i += PAIR_ROWS) {
        int64_t n = s->num_rows - i < PAIR_ROWS ? s->num_rows - i : PAIR_ROWS;
        f32x8 acc[LANES][MAX_PAIRS];
        float sums[2 * MAX_PAIRS * PAIR_ROWS];
        fetch_scales(s, i, PAIR_ROWS);
        begin_pairs(s, i, &rows);
        const uint8_t *next = s->next.weight + i * s->m->row_bytes;
        for (int64_t lane = 0; lane < LANES; lane++) next = add_lane(P, GROUP, s, &rows, &paired, lane, next, acc[lane]);
        UNROLL for (int p = 0; p < P; p++)
            f8_store(sums + 8 * p, f8_add(f8_add(acc[0][p], acc[1][p]), f8_add(acc[2][p], acc[3][p])));
        for (int64_t t = 0; t < num_tokens; t++) memcpy(out + t * out_stride + i, sums + t * PAIR_ROWS, (size_t)n * sizeof *sums);
    }
}

INLINE void all_tokens(const int GROUP, const matrix *m, int64_t first, int64_t num_rows, const activation *tokens,
                       int64_t num_tokens, float *out, int64_t out_stride, const next_rows *next) {
    row_range s = {
        .m = m,
        .chunks = (m->cols + ACT_GROUP - 1) / ACT_GROUP,
        .full_quads = m->cols / (LANES * ACT_GROUP),
        .groups = m->cols / GROUP,
        .first = first,
        .num_rows = num_rows,
    };
    /* Without a next, and in all but the first pass over the rows, what is fetched is here already. */
    const next_rows own = {m->weight + first * m->row_bytes, m->scales + first * m->scale_row_bytes,
                           m->biases + first * m->scale_row_bytes};
    int64_t most = TILE_CHUNKS / s.chunks < MAX_PAIRS ? 2 * (TILE_CHUNKS / s.chunks) : 2 * MAX_PAIRS;
    for (int64_t t = 0; t < num_tokens; next = NULL) {
        int64_t n = num_tokens - t < most ? num_tokens - t : most;
        const activation *a = tokens + t;
        float *o = out + t * out_stride;
        s.next = next ? *next : own;
        if (n == 1) few_tokens(1, GROUP, &s, a, o, out_stride);
        else if (n == 2) few_tokens(2, GROUP, &s, a, o, out_stride);
        else if (n == 3) few_tokens(3, GROUP, &s, a, o, out_stride);
        else if (n == 4) several_tokens(2, GROUP, &s, a, n, o, out_stride);
        else if (n <= 6) several_tokens(3, GROUP, &s, a, n, o, out_stride);
        else several_tokens(4, GROUP, &s, a, n, o, out_stride);
        t += n;
    }
}

#define INSTANCE(name, group)                                                                                     \
    static void name(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens, \
                     float *out, int64_t out_stride, const next_rows *next) {                                      \
        all_tokens(group, m, first, num_rows, tokens, num_tokens, out, out_stride, next);                          \
    }
INSTANCE(q4_g32, 32)
INSTANCE(q4_g64, 64)
INSTANCE(q4_g128, 128)

rows_kernel ISA(rows_q4);

void ISA(rows_q4)(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens, float *out,
                  int64_t out_stride, const next_rows *next) {
    rows_kernel *instance = m->group_size == 32 ? q4_g32 : m->group_size == 64 ? q4_g64 : q4_g128;
    instance(m, first, num_rows, tokens, num_tokens, out, out_stride, next);
}
