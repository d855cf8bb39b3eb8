/* Linear rows of 4- and 8-bit weights with activations quantised to bytes: integer dot products, floats once a group.
 *
 * A chunk is ACT_GROUP columns. For 4-bit weights the activations of a chunk come as its 32 even columns, then its 32 odd
 * ones, to meet the low and the high nibbles. */
#include "kernels.h"
#include "simd.h"

enum { ROWS = 4, TOKENS = 4, MAX_GROUPS = MAX_COLS / MIN_GROUP, AHEAD_BYTES = 8192 };

/* What a tile needs of its groups, as floats; zero from the last group to a whole vector.
 *
 * A unit is half a chunk where groups are that small, else a chunk: the columns that share one scale. */
typedef struct {
    float scale[ROWS][MAX_GROUPS];           /* a group's */
    float bias[ROWS][MAX_GROUPS];            /* a group's */
    float product[TOKENS][ROWS][MAX_GROUPS]; /* a unit's: weight scale times activation scale */
} tile_scales;

INLINE f32x8 load_halves(const uint16_t *p, int format) { return format == FORMAT_BF16 ? f8_of_bf16(p) : f8_of_f16(p); }

/* n scales, and zeros up to a whole vector. Nothing behind them is read. */
INLINE void widen_scales(const uint8_t *p, int64_t n, int format, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        f8_store(out + i, format == FORMAT_F32 ? f8_load((const float *)p + i) : load_halves((const uint16_t *)p + i, format));
    if (i == n) return;
    if (format == FORMAT_F32) {
        f8_store(out + i, f8_load_some((const float *)p + i, (int)(n - i)));
        return;
    }
    uint16_t rest[8] = {0};
    const uint16_t *from = (const uint16_t *)p + i;
    if (n - i == 4) { /* common, and a load that follows narrower stores waits for them */
        f8_store(out + i, format == FORMAT_BF16 ? f8_of_4_bf16(from) : f8_of_4_f16(from));
        return;
    }
    for (int64_t j = 0; j < n - i; j++) rest[j] = from[j];
    f8_store(out + i, load_halves(rest, format));
}

static void load_groups(const matrix *m, int64_t first, int rows, int64_t groups, tile_scales *s) {
    for (int r = 0; r < rows; r++) {
        int64_t at = (first + r) * m->scale_row_bytes;
        widen_scales(m->scales + at, groups, m->scale_format, s->scale[r]);
        widen_scales(m->biases + at, groups, m->scale_format, s->bias[r]);
        if (m->format != FORMAT_Q8) continue;
        /* The kernel sees q - 128, so the bias takes 128 scales more. */
        for (int64_t i = 0; i < groups; i++) s->bias[r][i] += 128.0f * s->scale[r][i];
    }
}

INLINE void multiply_scales(const int R, const int T, const int GROUP, int64_t cols, const activation *tokens,
                            tile_scales *s) {
    int64_t chunks = (cols + 63) / 64;
    for (int t = 0; t < T; t++) {
        const float *act = tokens[t].scale;
        for (int r = 0; r < R; r++) {
            const float *scale = s->scale[r];
            float *product = s->product[t][r];
            if (GROUP == 64) {
                for (int64_t c = 0; c < chunks; c += 8) f8_store(product + c, f8_mul(f8_load(scale + c), f8_load(act + c)));
            } else if (GROUP == 128) {
                for (int64_t c = 0; c < chunks; c++) product[c] = scale[c / 2] * act[c];
            } else {
                for (int64_t u = 0; u < cols / 32; u++) product[u] = scale[u] * act[u / 2];
            }
        }
    }
}

/* A chunk's scale: one number, or one for each half. */
INLINE f32x8 chunk_scale(const int GROUP, const float *product, int64_t chunk) {
    return GROUP == 32 ? f8_halves(product[2 * chunk], product[2 * chunk + 1]) : f8_set1(product[chunk]);
}

INLINE f32x8 bias_products(const float *bias, const float *sum, int64_t groups) {
    f32x8 acc = f8_zero();
    for (int64_t i = 0; i < groups; i += 8) acc = f8_fma(f8_load(bias + i), f8_load(sum + i), acc);
    return acc;
}

INLINE void q4_tile(const int R, const int T, const int GROUP, const uint8_t *weight, int64_t row_bytes, int64_t cols,
                    const tile_scales *s, const activation *tokens, f32x8 (*acc)[ROWS]) {
    int64_t chunks = cols / 64;
    bytes32 low[ROWS], high[ROWS];
    for (int64_t c = 0; c < chunks; c++) {
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *at = weight + r * row_bytes + c * 32;
            bytes32 w = b32_load(at);
            prefetch(at + AHEAD_BYTES);
            low[r] = b32_low_nibbles(w);
            high[r] = b32_high_nibbles(w);
        }
        UNROLL for (int t = 0; t < T; t++) {
            bytes32 even = b32_load(tokens[t].q + c * 64), odd = b32_load(tokens[t].q + c * 64 + 32);
            UNROLL for (int r = 0; r < R; r++)
                acc[t][r] = f8_fma(dot_nibbles(low[r], high[r], even, odd), chunk_scale(GROUP, s->product[t][r], c), acc[t][r]);
        }
    }
    if (GROUP != 32 || cols % 64 == 0) return;
    for (int r = 0; r < R; r++) { /* half a chunk ends the row; its other half is zero in the activations */
        bytes32 w = b32_load_half(weight + r * row_bytes + chunks * 32);
        bytes32 l = b32_low_nibbles(w), h = b32_high_nibbles(w);
        for (int t = 0; t < T; t++) {
            bytes32 even = b32_load(tokens[t].q + chunks * 64), odd = b32_load(tokens[t].q + chunks * 64 + 32);
            f32x8 scale = f8_halves(s->product[t][r][2 * chunks], 0.0f);
            acc[t][r] = f8_fma(dot_nibbles(l, h, even, odd), scale, acc[t][r]);
        }
    }
}

INLINE void q8_tile(const int R, const int T, const int GROUP, const uint8_t *weight, int64_t row_bytes, int64_t cols,
                    const tile_scales *s, const activation *tokens, f32x8 (*acc)[ROWS]) {
    int64_t chunks = cols / 64;
    for (int64_t c = 0; c < chunks; c++) {
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *at = weight + r * row_bytes + c * 64;
            bytes32 w0 = b32_to_signed(b32_load(at)), w1 = b32_to_signed(b32_load(at + 32));
            prefetch(at + AHEAD_BYTES);
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

INLINE void tile(const int FORMAT, const int R, const int T, const int GROUP, const matrix *m, int64_t first,
                 const activation *tokens, float *out, int64_t out_stride, tile_scales *s) {
    const uint8_t *weight = m->weight + first * m->row_bytes;
    int64_t groups = m->cols / GROUP;
    f32x8 acc[TOKENS][ROWS];
    multiply_scales(R, T, GROUP, m->cols, tokens, s);
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) acc[t][r] = bias_products(s->bias[r], tokens[t].sum, groups);
    if (FORMAT == FORMAT_Q4) {
        q4_tile(R, T, GROUP, weight, m->row_bytes, m->cols, s, tokens, acc);
    } else {
        q8_tile(R, T, GROUP, weight, m->row_bytes, m->cols, s, tokens, acc);
    }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < R; r++) out[t * out_stride + r] = f8_sum(acc[t][r]);
}

/* R rows by up to four tokens: accumulators stay in registers. */
INLINE void tokens_tile(const int FORMAT, const int R, const int GROUP, const matrix *m, int64_t first,
                        const activation *tokens, int64_t n, float *out, int64_t out_stride, tile_scales *s) {
    if (n == 1) {
        tile(FORMAT, R, 1, GROUP, m, first, tokens, out, out_stride, s);
    } else if (n == 2) {
        tile(FORMAT, R, 2, GROUP, m, first, tokens, out, out_stride, s);
    } else if (n == 3) {
        tile(FORMAT, R, 3, GROUP, m, first, tokens, out, out_stride, s);
    } else {
        tile(FORMAT, R, 4, GROUP, m, first, tokens, out, out_stride, s);
    }
}

INLINE void all_rows(const int FORMAT, const int GROUP, const matrix *m, int64_t first, int64_t num_rows,
                     const activation *tokens, int64_t num_tokens, float *out, int64_t out_stride) {
    tile_scales s;
    int64_t groups = m->cols / GROUP;
    for (int64_t t = 0; t < num_tokens; t += TOKENS) {
        int64_t n = num_tokens - t < TOKENS ? num_tokens - t : TOKENS, r = 0;
        const activation *a = tokens + t;
        float *o = out + t * out_stride;
        for (; n <= 2 && r + 4 <= num_rows; r += 4) {
            load_groups(m, first + r, 4, groups, &s);
            if (n == 1) {
                tile(FORMAT, 4, 1, GROUP, m, first + r, a, o + r, out_stride, &s);
            } else {
                tile(FORMAT, 4, 2, GROUP, m, first + r, a, o + r, out_stride, &s);
            }
        }
        for (; r + 2 <= num_rows; r += 2) {
            load_groups(m, first + r, 2, groups, &s);
            tokens_tile(FORMAT, 2, GROUP, m, first + r, a, n, o + r, out_stride, &s);
        }
        if (r < num_rows) {
            load_groups(m, first + r, 1, groups, &s);
            tokens_tile(FORMAT, 1, GROUP, m, first + r, a, n, o + r, out_stride, &s);
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
    for (int64_t g = cols / group_size; g % 8; g++) sum[g] = 0;
    for (int64_t c = (cols + 63) / 64; c % 8; c++) scale[c] = 0;
}
