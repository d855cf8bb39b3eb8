/* Linear rows with float activations: four weight rows are widened panel by panel and multiplied with every token. */
#include "kernels.h"
#include "simd.h"

enum { ROWS = 4, PANEL = 512, TOKENS = 32 };

INLINE f32x8 load_scale(const uint8_t *p, int format) {
    if (format == FORMAT_BF16) return f8_set1(float_of_bf16(*(const uint16_t *)p));
    if (format == FORMAT_F16) return f8_set1(float_of_f16(*(const uint16_t *)p));
    return f8_set1(*(const float *)p);
}

/* Columns [col, col + n) of a quantised row, col a multiple of 8 and n of MIN_GROUP / 4 or the row's end. */
static void widen_quantised(const matrix *m, int64_t row, int64_t col, int64_t n, float *out) {
    const int bits = m->format == FORMAT_Q4 ? 4 : 8, scale_bytes = m->scale_format == FORMAT_F32 ? 4 : 2;
    const uint8_t *w = m->weight + row * m->row_bytes;
    const uint8_t *scales = m->scales + row * m->scale_row_bytes, *biases = m->biases + row * m->scale_row_bytes;
    for (int64_t end = col + n; col < end;) {
        int64_t group = col / m->group_size, stop = (group + 1) * m->group_size;
        f32x8 scale = load_scale(scales + group * scale_bytes, m->scale_format);
        f32x8 bias = load_scale(biases + group * scale_bytes, m->scale_format);
        for (stop = stop < end ? stop : end; col < stop; col += 8, out += 8) {
            f32x8 q = bits == 4 ? f8_of_u4(w + col / 2) : f8_of_u8(w + col);
            f8_store(out, f8_fma(q, scale, bias));
        }
    }
}

static void widen_half(const uint16_t *w, int64_t n, int format, float *out) {
    int64_t i = 0;
    if (format == FORMAT_BF16) {
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_bf16(w + i));
        for (; i < n; i++) out[i] = float_of_bf16(w[i]);
    } else {
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_f16(w + i));
        for (; i < n; i++) out[i] = float_of_f16(w[i]);
    }
}

void ISA(widen)(const matrix *m, int64_t row, int64_t col, int64_t n, float *out) {
    const uint8_t *w = m->weight + row * m->row_bytes;
    if (m->format == FORMAT_F32) {
        memcpy(out, w + col * 4, (size_t)n * 4);
    } else if (m->format == FORMAT_F16 || m->format == FORMAT_BF16) {
        widen_half((const uint16_t *)w + col, n, m->format, out);
    } else {
        widen_quantised(m, row, col, n, out);
    }
}

/* sums[t][r] += products of one panel; tokens from 0 to T. */
INLINE void panel_tile(const int T, const float *const *w, const activation *tokens, int64_t col, int64_t n, f32x8 *sums) {
    f32x8 acc[2][ROWS];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < ROWS; r++) acc[t][r] = sums[t * ROWS + r];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        UNROLL for (int t = 0; t < T; t++) {
            f32x8 x = f8_load(tokens[t].x + col + i);
            UNROLL for (int r = 0; r < ROWS; r++) acc[t][r] = f8_fma(f8_load(w[r] + i), x, acc[t][r]);
        }
    }
    if (i < n) {
        for (int t = 0; t < T; t++) {
            f32x8 x = f8_load_some(tokens[t].x + col + i, (int)(n - i));
            for (int r = 0; r < ROWS; r++) acc[t][r] = f8_fma(f8_load_some(w[r] + i, (int)(n - i)), x, acc[t][r]);
        }
    }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < ROWS; r++) sums[t * ROWS + r] = acc[t][r];
}

/* Up to ROWS rows (a missing one repeats the first) by up to TOKENS tokens. */
static void row_block(const matrix *m, int64_t first, int rows, const activation *tokens, int num_tokens, float *out,
                      int64_t out_stride) {
    f32x8 sums[TOKENS * ROWS];
    float scratch[ROWS][PANEL];
    const float *w[ROWS];
    for (int i = 0; i < num_tokens * ROWS; i++) sums[i] = f8_zero();
    for (int64_t col = 0; col < m->cols; col += PANEL) {
        int64_t n = m->cols - col < PANEL ? m->cols - col : PANEL;
        for (int r = 0; r < ROWS; r++) {
            if (m->format == FORMAT_F32) {
                w[r] = (const float *)(m->weight + (first + (r < rows ? r : 0)) * m->row_bytes) + col;
            } else {
                w[r] = scratch[r < rows ? r : 0];
                if (r < rows) ISA(widen)(m, first + r, col, n, scratch[r]);
            }
        }
        int t = 0;
        for (; t + 2 <= num_tokens; t += 2) panel_tile(2, w, tokens + t, col, n, sums + t * ROWS);
        if (t < num_tokens) panel_tile(1, w, tokens + t, col, n, sums + t * ROWS);
    }
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < rows; r++) out[t * out_stride + r] = f8_sum(sums[t * ROWS + r]);
}

void ISA(rows_exact)(const matrix *m, int64_t first, int64_t num_rows, const activation *tokens, int64_t num_tokens,
                     float *out, int64_t out_stride, const next_rows *next) {
    (void)next; /* widening takes longer than reading */
    for (int64_t t = 0; t < num_tokens; t += TOKENS) {
        int count = (int)(num_tokens - t < TOKENS ? num_tokens - t : TOKENS);
        for (int64_t r = 0; r < num_rows; r += ROWS) {
            int rows = (int)(num_rows - r < ROWS ? num_rows - r : ROWS);
            row_block(m, first + r, rows, tokens + t, count, out + t * out_stride + r, out_stride);
        }
    }
}
