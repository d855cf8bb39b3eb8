/* Linear rows of 4- and 8-bit weights with activations quantised to bytes: integer dot products, floats once a group.
 *
 * A chunk is ACT_GROUP columns. For 4-bit weights the activations of a chunk come as its 32 even columns, then its 32 odd
 * ones, to meet the low and the high nibbles. */
#include "kernels.h"
#include "simd.h"

enum { ROWS = 4, MAX_GROUPS = MAX_COLS / MIN_GROUP };

/* Scales and biases of up to ROWS rows as floats. */
typedef struct {
    float scale[ROWS][MAX_GROUPS], bias[ROWS][MAX_GROUPS];
} row_groups;

INLINE void widen_scales(const uint8_t *p, int64_t n, int format, float *out) {
    int64_t i = 0;
    if (format == FORMAT_F32) {
        memcpy(out, p, (size_t)n * 4);
    } else if (format == FORMAT_BF16) {
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_bf16((const uint16_t *)p + i));
        for (; i < n; i++) out[i] = float_of_bf16(((const uint16_t *)p)[i]);
    } else {
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_f16((const uint16_t *)p + i));
        for (; i < n; i++) out[i] = float_of_f16(((const uint16_t *)p)[i]);
    }
}

static void load_groups(const matrix *m, int64_t first, int rows, int64_t groups, row_groups *g) {
    for (int r = 0; r < rows; r++) {
        int64_t at = (first + r) * m->scale_row_bytes;
        widen_scales(m->scales + at, groups, m->scale_format, g->scale[r]);
        widen_scales(m->biases + at, groups, m->scale_format, g->bias[r]);
        if (m->format != FORMAT_Q8) continue;
        /* The kernel sees q - 128, so the bias takes 128 scales more. */
        for (int64_t i = 0; i < groups; i++) g->bias[r][i] += 128.0f * g->scale[r][i];
    }
}

/* A chunk's weight scale: one number, or one for each half where groups are half a chunk. */
INLINE f32x8 chunk_scale(const int GROUP, const float *scale, int64_t chunk) {
    if (GROUP == 32) return f8_halves(scale[2 * chunk], scale[2 * chunk + 1]);
    return f8_set1(scale[GROUP == 64 ? chunk : chunk / 2]);
}

/* A chunk of half size ends the row where groups are half a chunk and their number is odd. */
INLINE f32x8 last_scale(const float *scale, int64_t chunk) { return f8_halves(scale[2 * chunk], 0.0f); }

INLINE f32x8 bias_products(const float *bias, const float *sum, int64_t groups) {
    f32x8 acc = f8_zero();
    int64_t i = 0;
    for (; i + 8 <= groups; i += 8) acc = f8_fma(f8_load(bias + i), f8_load(sum + i), acc);
    if (i < groups) {
        int n = (int)(groups - i);
        acc = f8_fma(f8_load_some(bias + i, n), f8_load_some(sum + i, n), acc);
    }
    return acc;
}

INLINE void q4_chunk(const int R, const int T, const bytes32 *w, const f32x8 *scale, const activation *tokens,
                     int64_t chunk, f32x8 (*acc)[ROWS]) {
    bytes32 low[ROWS], high[ROWS];
    UNROLL for (int r = 0; r < R; r++) {
        low[r] = b32_low_nibbles(w[r]);
        high[r] = b32_high_nibbles(w[r]);
    }
    UNROLL for (int t = 0; t < T; t++) {
        bytes32 even = b32_load(tokens[t].q + chunk * 64), odd = b32_load(tokens[t].q + chunk * 64 + 32);
        f32x8 act_scale = f8_set1(tokens[t].scale[chunk]);
        UNROLL for (int r = 0; r < R; r++) {
            f32x8 dot = dot_nibbles(low[r], high[r], even, odd);
            acc[t][r] = f8_fma(dot, f8_mul(scale[r], act_scale), acc[t][r]);
        }
    }
}

INLINE void q4_tile(const int R, const int T, const int GROUP, const uint8_t *weight, int64_t row_bytes, int64_t cols,
                    const row_groups *g, const activation *tokens, f32x8 (*acc)[ROWS]) {
    int64_t chunks = cols / 64;
    bytes32 w[ROWS];
    f32x8 scale[ROWS];
    for (int64_t c = 0; c < chunks; c++) {
        UNROLL for (int r = 0; r < R; r++) {
            w[r] = b32_load(weight + r * row_bytes + c * 32);
            scale[r] = chunk_scale(GROUP, g->scale[r], c);
        }
        q4_chunk(R, T, w, scale, tokens, c, acc);
    }
    if (GROUP == 32 && cols % 64) {
        UNROLL for (int r = 0; r < R; r++) {
            w[r] = b32_load_half(weight + r * row_bytes + chunks * 32);
            scale[r] = last_scale(g->scale[r], chunks);
        }
        q4_chunk(R, T, w, scale, tokens, chunks, acc);
    }
}

INLINE void q8_tile(const int R, const int T, const int GROUP, const uint8_t *weight, int64_t row_bytes, int64_t cols,
                    const row_groups *g, const activation *tokens, f32x8 (*acc)[ROWS]) {
    int64_t chunks = cols / 64;
    for (int64_t c = 0; c < chunks; c++) {
        UNROLL for (int r = 0; r < R; r++) {
            bytes32 w0 = b32_to_signed(b32_load(weight + r * row_bytes + c * 64));
            bytes32 w1 = b32_to_signed(b32_load(weight + r * row_bytes + c * 64 + 32));
            UNROLL for (int t = 0; t < T; t++) {
                bytes32 a0 = b32_load(tokens[t].q + c * 64), a1 = b32_load(tokens[t].q + c * 64 + 32);
                f32x8 act_scale = f8_set1(tokens[t].scale[c]);
                if (GROUP == 32) {
                    f32x8 s0 = f8_set1(g->scale[r][2 * c]), s1 = f8_set1(g->scale[r][2 * c + 1]);
                    acc[t][r] = f8_fma(dot_bytes(w0, a0), f8_mul(s0, act_scale), acc[t][r]);
                    acc[t][r] = f8_fma(dot_bytes(w1, a1), f8_mul(s1, act_scale), acc[t][r]);
                } else {
                    f32x8 scale = f8_mul(chunk_scale(GROUP, g->scale[r], c), act_scale);
                    acc[t][r] = f8_fma(dot_bytes2(w0, a0, w1, a1), scale, acc[t][r]);
                }
            }
        }
    }
    if (GROUP == 32 && cols % 64) {
        UNROLL for (int r = 0; r < R; r++) {
            bytes32 w0 = b32_to_signed(b32_load(weight + r * row_bytes + chunks * 64));
            UNROLL for (int t = 0; t < T; t++) {
                f32x8 scale = f8_mul(f8_set1(g->scale[r][2 * chunks]), f8_set1(tokens[t].scale[chunks]));
                acc[t][r] = f8_fma(dot_bytes(w0, b32_load(tokens[t].q + chunks * 64)), scale, acc[t][r]);
            }
        }
    }
}

INLINE void tile(const int FORMAT, const int R, const int T, const int GROUP, const matrix *m, int64_t first,
                 const activation *tokens, float *out, int64_t out_stride, row_groups *g) {
    const uint8_t *weight = m->weight + first * m->row_bytes;
    int64_t groups = m->cols / GROUP;
    f32x8 acc[4][ROWS];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) acc[t][r] = bias_products(g->bias[r], tokens[t].sum, groups);
    if (FORMAT == FORMAT_Q4) {
        q4_tile(R, T, GROUP, weight, m->row_bytes, m->cols, g, tokens, acc);
    } else {
        q8_tile(R, T, GROUP, weight, m->row_bytes, m->cols, g, tokens, acc);
    }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) out[t * out_stride + r] = f8_sum(acc[t][r]);
}

/* R rows by up to four tokens: accumulators stay in registers. */
INLINE void tokens_tile(const int FORMAT, const int R, const int GROUP, const matrix *m, int64_t first,
                        const activation *tokens, int64_t n, float *out, int64_t out_stride, row_groups *g) {
    if (n == 1) {
        tile(FORMAT, R, 1, GROUP, m, first, tokens, out, out_stride, g);
    } else if (n == 2) {
        tile(FORMAT, R, 2, GROUP, m, first, tokens, out, out_stride, g);
    } else if (n == 3) {
        tile(FORMAT, R, 3, GROUP, m, first, tokens, out, out_stride, g);
    } else {
        tile(FORMAT, R, 4, GROUP, m, first, tokens, out, out_stride, g);
    }
}

INLINE void all_rows(const int FORMAT, const int GROUP, const matrix *m, int64_t first, int64_t num_rows,
                     const activation *tokens, int64_t num_tokens, float *out, int64_t out_stride) {
    row_groups g;
    int64_t groups = m->cols / GROUP;
    for (int64_t t = 0; t < num_tokens; t += 4) {
        int64_t n = num_tokens - t < 4 ? num_tokens - t : 4, r = 0;
        const activation *a = tokens + t;
        float *o = out + t * out_stride;
        for (; n <= 2 && r + 4 <= num_rows; r += 4) {
            load_groups(m, first + r, 4, groups, &g);
            if (n == 1) {
                tile(FORMAT, 4, 1, GROUP, m, first + r, a, o + r, out_stride, &g);
            } else {
                tile(FORMAT, 4, 2, GROUP, m, first + r, a, o + r, out_stride, &g);
            }
        }
        for (; r + 2 <= num_rows; r += 2) {
            load_groups(m, first + r, 2, groups, &g);
            tokens_tile(FORMAT, 2, GROUP, m, first + r, a, n, o + r, out_stride, &g);
        }
        if (r < num_rows) {
            load_groups(m, first + r, 1, groups, &g);
            tokens_tile(FORMAT, 1, GROUP, m, first + r, a, n, o + r, out_stride, &g);
        }
    }
}

#define INSTANCE(name, format, group)                                                                             \
    static void name(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens, \
                     float *out, int64_t out_stride) {                                                             \
        all_rows(format, group, m, first, num_rows, tokens, num_tokens, out, out_stride);                         \
    }
INSTANCE(q4_g32, FORMAT_Q4, 32)
INSTANCE(q4_g64, FORMAT_Q4, 64)
INSTANCE(q4_g128, FORMAT_Q4, 128)
INSTANCE(q8_g32, FORMAT_Q8, 32)
INSTANCE(q8_g64, FORMAT_Q8, 64)
INSTANCE(q8_g128, FORMAT_Q8, 128)

void ISA(rows_fast)(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens,
                    float *out, int64_t out_stride) {
    static rows_kernel *const instances[2][3] = {{q4_g32, q4_g64, q4_g128}, {q8_g32, q8_g64, q8_g128}};
    int group = m->group_size == 32 ? 0 : m->group_size == 64 ? 1 : 2;
    instances[m->format == FORMAT_Q8][group](m, first, num_rows, tokens, num_tokens, out, out_stride);
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
}
