/* Runs every kernel on one set of pseudo-random inputs, checks the best set against plain C, and prints its results' bits as
 * checksums, so that processors of two architectures can be compared. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u; }
static float number(void) { return (float)(int32_t)next() * 0x1p-31f; }

static void checksum(const char *name, const float *x, int n) {
    uint64_t sum = 1469598103934665603u;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        sum = (sum ^ bits) * 1099511628211u;
    }
    printf("sum %s %016llx\n", name, (unsigned long long)sum);
}

static int close_to(const char *name, const float *a, const float *b, int n) {
    for (int i = 0; i < n; i++)
        if (!(fabsf(a[i] - b[i]) <= 1e-4f * (1 + fabsf(b[i])))) {
            printf("%s: %g and %g at %d\n", name, (double)a[i], (double)b[i], i);
            return 1;
        }
    return 0;
}

enum { ROWS = 23, COLS = 416, TOKENS = 7 };
static uint8_t weight[ROWS * COLS * 4];
static uint16_t scales[ROWS * COLS / 32], biases[ROWS * COLS / 32];
static float x[TOKENS][COLS];

static int linear(const kernels *best, const kernels *plain, int format, int group, int cols) {
    static int8_t q[TOKENS][COLS + 64];
    static float act[TOKENS][COLS], sums[TOKENS][COLS], out[2][TOKENS * ROWS];
    int64_t bytes = format == FORMAT_Q4 ? cols / 2 : format == FORMAT_Q8 ? cols : format == FORMAT_F32 ? 4 * cols : 2 * cols;
    int quantised = format >= FORMAT_Q4, bad = 0;
    const next_rows next = {weight, (uint8_t *)scales, (uint8_t *)biases};
    matrix m = {.weight = weight, .scales = (uint8_t *)scales, .biases = (uint8_t *)biases, .rows = ROWS, .cols = cols,
                .row_bytes = bytes, .scale_row_bytes = cols / group * 2, .format = format, .scale_format = FORMAT_F16,
                .group_size = group};
    for (int fast = 0; fast <= quantised; fast++) {
        for (int which = 0; which < 2; which++) {
            const kernels *k = which ? plain : best;
            activation tokens[TOKENS];
            for (int t = 0; t < TOKENS; t++) {
                if (fast) k->quantise(x[t], cols, format, group, q[t], act[t], sums[t]);
                tokens[t] = (activation){x[t], q[t], act[t], sums[t]};
            }
            (fast ? k->rows_fast : k->rows_exact)(&m, 0, ROWS, tokens, TOKENS, out[which], ROWS, fast ? &next : NULL);
        }
        char name[64];
        snprintf(name, sizeof name, "linear-%d-%d-%d-%d", format, group, cols, fast);
        bad |= close_to(name, out[0], out[1], TOKENS * ROWS);
        checksum(name, out[0], TOKENS * ROWS);
    }
    return bad;
}

static int attention(const kernels *best, const kernels *plain, int format, int head_dim) {
    enum { HEADS = 6, KV_HEADS = 2, TOKENS_SEEN = 700, STATES = 3 * HEADS };
    static float values[2][2][STATES * 128], largest[2][2][STATES], total[2][2][STATES], weights[STATES * WEIGHTS];
    static float q[3 * HEADS * 128];
    static _Alignas(64) uint16_t pool[2 * KV_HEADS * TOKENS_SEEN * 128], own[2][3 * KV_HEADS * 128];
    static float pool_scales[2 * KV_HEADS * TOKENS_SEEN], own_scales[2][3 * KV_HEADS];
    uint64_t block = (uint64_t)(uintptr_t)pool;
    for (size_t i = 0; i < sizeof pool / 2; i++) pool[i] = (uint16_t)(0x3c00 | (next() >> 8 & 0x83ff));
    for (size_t i = 0; i < sizeof own / 2; i++) ((uint16_t *)own)[i] = (uint16_t)(0x3c00 | (next() >> 8 & 0x83ff));
    for (size_t i = 0; i < sizeof q / 4; i++) q[i] = number();
    attention_task a = {.num_heads = HEADS, .num_kv_heads = KV_HEADS, .head_dim = head_dim, .scale = 0.1f, .kv_format = format,
                        .row_bytes = head_dim * (format == FORMAT_I8 ? 1 : 2), .blocks = &block, .block_size = TOKENS_SEEN,
                        .first_row = TOKENS_SEEN, .value_stride = KV_HEADS * TOKENS_SEEN, .token_stride = 1,
                        .own_k = (uint8_t *)own[0], .own_v = (uint8_t *)own[1], .context_len = TOKENS_SEEN, .q = q,
                        .q_stride = HEADS * head_dim, .num_rows = 3, .first_position = TOKENS_SEEN, .kv_head = 1};
    if (format == FORMAT_I8) {
        for (size_t i = 0; i < sizeof pool_scales / 4; i++) pool_scales[i] = number() / 127;
        for (size_t i = 0; i < sizeof own_scales / 4; i++) ((float *)own_scales)[i] = number() / 127;
        memcpy(pool, pool_scales, sizeof pool_scales);
        a.rows_offset = sizeof pool_scales;
        a.own_k_scales = own_scales[0], a.own_v_scales = own_scales[1];
    }
    int width = (head_dim + 7) / 8 * 8, rows = 3 * HEADS / KV_HEADS;
    for (int which = 0; which < 2; which++) {
        const kernels *k = which ? plain : best;
        softmax_state parts[2];
        for (int split = 0; split < 2; split++) {
            parts[split] = (softmax_state){largest[which][split], total[which][split], values[which][split], weights};
            k->attend(&a, split, NULL, 0, parts[split]);
        }
        k->merge(parts[0], parts[1], rows, head_dim);
    }
    char name[64];
    snprintf(name, sizeof name, "attention-%d-%d", format, head_dim);
    checksum(name, values[0][0], rows * width);
    return close_to(name, values[0][0], values[1][0], rows * width) | close_to(name, total[0][0], total[1][0], rows);
}

static int bytes_of_rows(const kernels *best, const kernels *plain) {
    int8_t bytes[2][COLS] = {{0}};
    for (int n = 1; n < COLS; n += 29) {
        float scales_of[2] = {best->to_int8(x[n % TOKENS], n, bytes[0]), plain->to_int8(x[n % TOKENS], n, bytes[1])};
        if (scales_of[0] != scales_of[1] || memcmp(bytes[0], bytes[1], (size_t)n)) {
            printf("to_int8-%d differs\n", n);
            return 1;
        }
    }
    return 0;
}

static int vectors(const kernels *best, const kernels *plain) {
    static float a[2][COLS], b[COLS], total[2];
    const kernels *both[2] = {best, plain};
    for (int which = 0; which < 2; which++) {
        const kernels *k = both[which];
        k->rms_norm(x[0], x[1], 1e-6f, 413, a[which]);
        k->norm_rope(a[which], x[2], 1e-6f, x[3], x[4], 126);
        memcpy(b, x[5], sizeof b);
        k->silu_mul(a[which], b, 413);
        k->add_scaled(a[which], x[6], 0.7f, 413);
        k->softmax(a[which], 411, &total[which]);
    }
    checksum("vectors", a[0], 411);
    return close_to("vectors", a[0], a[1], 411) | close_to("total", total, total + 1, 1);
}

/* These have the same bits everywhere, plain C included. */
static int sampling(const kernels *best, const kernels *plain) {
    enum { LOGITS = 1013 };
    static float logits[LOGITS], tiles[2][LOGITS / SAMPLE_TILE + 1];
    static double weights[2][LOGITS];
    const kernels *both[2] = {best, plain};
    double mass[2];
    for (int i = 0; i < LOGITS; i++) logits[i] = 40 * number();
    logits[17] = -INFINITY;
    for (int which = 0; which < 2; which++) {
        both[which]->block_maxima(logits, LOGITS, tiles[which]);
        mass[which] = both[which]->weigh(logits, LOGITS, 40, 0.7, weights[which]);
    }
    checksum("tiles", tiles[0], LOGITS / SAMPLE_TILE + 1);
    checksum("weights", (const float *)weights[0], 2 * LOGITS);
    checksum("mass", (const float *)mass, 2);
    return memcmp(tiles[0], tiles[1], sizeof tiles[0]) || memcmp(weights[0], weights[1], sizeof weights[0]) || mass[0] != mass[1];
}

int main(void) {
    const kernels *best = kernels_for(""), *plain = kernels_for("plain");
    int bad = 0;
    printf("best %s\n", best->name);
    for (size_t i = 0; i < sizeof weight; i++) weight[i] = (uint8_t)(next() >> 13);
    for (size_t i = 0; i < sizeof scales / 2; i++) {
        scales[i] = (uint16_t)(0x2000 | (next() >> 10 & 0x3ff));
        biases[i] = (uint16_t)(0xa000 | (next() >> 10 & 0x3ff));
    }
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < COLS; i++) x[t][i] = number();
    for (int format = FORMAT_Q4; format <= FORMAT_Q8; format++)
        for (int group = 32; group <= 128; group *= 2)
            for (int cols = 128; cols <= 416; cols += group) bad |= linear(best, plain, format, group, cols / group * group);
    for (size_t i = 0; i < sizeof weight / 2; i++) ((uint16_t *)weight)[i] = (uint16_t)(0x3400 | (next() >> 8 & 0x83ff));
    bad |= linear(best, plain, FORMAT_F16, 32, 413) | linear(best, plain, FORMAT_BF16, 32, 413);
    for (int head_dim = 18; head_dim <= 128; head_dim += 22) {
        bad |= attention(best, plain, FORMAT_BF16, head_dim);
        bad |= attention(best, plain, FORMAT_F16, head_dim);
        bad |= attention(best, plain, FORMAT_I8, head_dim);
    }
    bad |= vectors(best, plain) | bytes_of_rows(best, plain) | sampling(best, plain);
    return bad;
}
