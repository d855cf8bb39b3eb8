/* Activations quantised to bytes, and linear rows of 8-bit weights with them: integer dot products, floats once a group.
 *
 * A chunk is ACT_GROUP columns. For 4-bit weights, which have a file of their own, the activations of a chunk are its 32 even
 * columns, then its 32 odd ones. */
#include "kernels.h"
#include "row_scales.h"
#include "simd.h"

enum { ROWS = 2, TOKENS = 4, MAX_GROUPS = MAX_COLS / MIN_GROUP, LINE = 64 };

/* Weight scale times activation scale for every unit: the columns that share one scale, half a chunk where groups are that
 * small, else a chunk. */
typedef struct {
    float product[TOKENS][ROWS][MAX_GROUPS + 24]; /* not a power of two apart: those would share a set of the cache */
} tile_scales;

/* The products of one row for all tokens, and the sum of its biases times the groups' sums, which acc begins with. */
INLINE void begin_row(const int T, const int GROUP, const matrix *m, int64_t row, int r,
                      const activation *tokens, tile_scales *s, f32x8 (*acc)[ROWS]) {
    const uint8_t *scales = m->scales + row * m->scale_row_bytes, *biases = m->biases + row * m->scale_row_bytes;
    int64_t groups = m->cols / GROUP;
    float scale[GROUP == 64 ? 8 : MAX_GROUPS];
    UNROLL for (int t = 0; t < T; t++) acc[t][r] = f8_zero();
    for (int64_t i = 0; i < groups; i += 8) {
        f32x8 factor = load_scales(scales, i, groups, m->scale_format), bias = load_scales(biases, i, groups, m->scale_format);
        /* The dot products see q - 128, so the bias takes 128 scales more. */
        bias = f8_add(bias, f8_mul(f8_set1(128.0f), factor));
        if (GROUP != 64) f8_store(scale + i, factor);
        UNROLL for (int t = 0; t < T; t++) {
            acc[t][r] = f8_fma(bias, f8_load(tokens[t].sum + i), acc[t][r]);
            if (GROUP == 64) f8_store(s->product[t][r] + i, f8_mul(factor, f8_load(tokens[t].scale + i)));
        }
    }
    if (GROUP == 64) return;
    for (int t = 0; t < T; t++)
        for (int64_t u = 0; u < (GROUP == 32 ? groups : 2 * groups); u++)
            s->product[t][r][u] = GROUP == 32 ? scale[u] * tokens[t].scale[u / 2] : scale[u / 2] * tokens[t].scale[u];
}

INLINE void q8_tile(const int R, const int T, const int GROUP, const uint8_t *weight, int64_t row_bytes, int64_t cols,
                    const tile_scales *s, const activation *tokens, const uint8_t *next, f32x8 (*acc)[ROWS]) {
    int64_t chunks = cols / 64;
    for (int64_t c = 0; c < chunks; c++) {
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *at = weight + r * row_bytes + c * 64;
            bytes32 w0 = b32_to_signed(b32_load(at)), w1 = b32_to_signed(b32_load(at + 32));
            prefetch(next + (r * chunks + c) * LINE);
            UNROLL for (int t = 0; t < T; t++) {
                bytes32 a0 = b32_load(tokens[t].q + c * 64), a1 = b32_load(tokens[t].q + c * 64 + 32);
                const float *product = s->product[t][r];
                if (GROUP == 32) {
                    acc[t][r] = f8_fma(dot_bytes(w0, a0), f8_set1(product[2 * c]), acc[t][r]);
                    acc[t][r] = f8_fma(dot_bytes(w1, a1), f8_set1(product[2 * c + 1]), acc[t][r]);
                } else {
                    acc[t][r] = f8_fma(dot_bytes2(w0, a0, w1, a1), f8_set1(product[c]), acc[t][r]);
                }
            }
        }
    }
    if (GROUP != 32 || cols % 64 == 0) return;
    for (int r = 0; r < R; r++) {
        bytes32 w = b32_to_signed(b32_load(weight + r * row_bytes + chunks * 64));
        for (int t = 0; t < T; t++) {
            f32x8 dot = dot_bytes(w, b32_load(tokens[t].q + chunks * 64));
            acc[t][r] = f8_fma(dot, f8_set1(s->product[t][r][2 * chunks]), acc[t][r]);
        }
    }
}

INLINE void tile(const int R, const int T, const int GROUP, const matrix *m, int64_t first,
                 const activation *tokens, float *out, int64_t out_stride, tile_scales *s, next_rows next) {
    const uint8_t *weight = m->weight + first * m->row_bytes;
    f32x8 acc[TOKENS][ROWS];
    for (int64_t i = 0; i < R * m->scale_row_bytes; i += LINE) {
        prefetch(next.scales + i);
        prefetch(next.biases + i);
    }
    UNROLL for (int r = 0; r < R; r++) begin_row(T, GROUP, m, first + r, r, tokens, s, acc);
    q8_tile(R, T, GROUP, weight, m->row_bytes, m->cols, s, tokens, next.weight, acc);
    if (R == ROWS) {
        UNROLL for (int t = 0; t + 2 <= T; t += 2) {
            float sums[2 * ROWS];
            f8_sums4(sums, acc[t][0], acc[t][1], acc[t + 1][0], acc[t + 1][1]);
            memcpy(out + t * out_stride, sums, sizeof sums / 2);
            memcpy(out + (t + 1) * out_stride, sums + ROWS, sizeof sums / 2);
        }
    }
    UNROLL for (int t = R == ROWS ? T / 2 * 2 : 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) out[t * out_stride + r] = f8_sum(acc[t][r]);
}

/* R rows by up to four tokens: accumulators stay in registers. */
INLINE void tokens_tile(const int R, const int GROUP, const matrix *m, int64_t first,
                        const activation *tokens, int64_t n, float *out, int64_t out_stride, tile_scales *s,
                        next_rows next) {
    if (n == 1) {
        tile(R, 1, GROUP, m, first, tokens, out, out_stride, s, next);
    } else if (n == 2) {
        tile(R, 2, GROUP, m, first, tokens, out, out_stride, s, next);
    } else if (n == 3) {
        tile(R, 3, GROUP, m, first, tokens, out, out_stride, s, next);
    } else {
        tile(R, 4, GROUP, m, first, tokens, out, out_stride, s, next);
    }
}

INLINE next_rows rows_behind(const matrix *m, next_rows from, int64_t rows) {
    int64_t scales = rows * m->scale_row_bytes;
    return (next_rows){from.weight + rows * m->row_bytes, from.scales + scales, from.biases + scales};
}

INLINE void all_rows(const int GROUP, const matrix *m, int64_t first, int64_t num_rows,
                     const activation *tokens, int64_t num_tokens, float *out, int64_t out_stride,
                     const next_rows *next) {
    tile_scales s;
    /* Without a next, and in all but the first pass over the rows, what is fetched is here already. */
    const next_rows start = {m->weight, m->scales, m->biases}, own = rows_behind(m, start, first);
    for (int64_t t = 0; t < num_tokens; t += TOKENS, next = NULL) {
        const next_rows from = next ? *next : own;
        int64_t n = num_tokens - t < TOKENS ? num_tokens - t : TOKENS, r = 0;
        const activation *a = tokens + t;
        float *o = out + t * out_stride;
        for (; r + ROWS <= num_rows; r += ROWS) {
            tokens_tile(ROWS, GROUP, m, first + r, a, n, o + r, out_stride, &s, rows_behind(m, from, r));
        }
        if (r < num_rows) {
            tokens_tile(1, GROUP, m, first + r, a, n, o + r, out_stride, &s, rows_behind(m, from, r));
        }
    }
}

#define INSTANCE(name, group)                                                                                     \
    static void name(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens, \
                     float *out, int64_t out_stride, const next_rows *next) {                                      \
        all_rows(group, m, first, num_rows, tokens, num_tokens, out, out_stride, next);                            \
    }
INSTANCE(q8_g32, 32)
INSTANCE(q8_g64, 64)
INSTANCE(q8_g128, 128)

rows_kernel ISA(rows_q4);

void ISA(rows_fast)(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens,
                    float *out, int64_t out_stride, const next_rows *next) {
    rows_kernel *q8 = m->group_size == 32 ? q8_g32 : m->group_size == 64 ? q8_g64 : q8_g128;
    rows_kernel *instance = m->format == FORMAT_Q4 ? ISA(rows_q4) : q8;
    instance(m, first, num_rows, tokens, num_tokens, out, out_stride, next);
}

void ISA(quantise)(const float *x, int64_t cols, int format, int64_t group_size, int8_t *q, float *scale, float *sum) {
    for (int64_t c = 0; c * 64 < cols; c++) {
        int64_t n = cols - c * 64 < 64 ? cols - c * 64 : 64;
        f32x8 v[8], largest = f8_zero();
        for (int i = 0; i < 8; i++) {
            v[i] = 8 * i + 8 <= n ? f8_load(x + c * 64 + 8 * i) : f8_zero(); /* n is 32 or 64 */
            largest = f8_max(largest, f8_abs(v[i]));
        }
        float peak = f8_largest(largest);
        if (peak < 1e-30f) peak = 0; /* its inverse would overflow */
        f32x8 inverse = f8_set1(peak > 0 ? 127.0f / peak : 0.0f);
        int8_t bytes[64];
        for (int i = 0; i < 8; i++) f8_to_i8(bytes + 8 * i, f8_mul(v[i], inverse));
        int halves[2] = {0, 0};
        for (int i = 0; i < 32; i++) halves[0] += bytes[i];
        for (int i = 32; i < 64; i++) halves[1] += bytes[i];
        for (int i = 0; i < 64; i++) q[c * 64 + i] = format == FORMAT_Q4 ? bytes[i < 32 ? 2 * i : 2 * (i - 32) + 1] : bytes[i];
        scale[c] = peak / 127.0f;
        if (group_size == 32) {
            sum[2 * c] = scale[c] * (float)halves[0];
            if (n == 64) sum[2 * c + 1] = scale[c] * (float)halves[1];
        } else {
            float part = scale[c] * (float)(halves[0] + halves[1]);
            int64_t group = c * 64 / group_size;
            sum[group] = c * 64 % group_size ? sum[group] + part : part;
        }
    }
    for (int64_t g = cols / group_size; g % 8; g++) sum[g] = 0;
    for (int64_t c = (cols + 63) / 64; c % 8; c++) scale[c] = 0;
}
