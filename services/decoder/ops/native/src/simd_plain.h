/* Eight floats and the byte dot products in plain C: the same bits as the others, but for FMA, which is rounded twice here. */
#ifndef LH_SIMD_PLAIN_H
#define LH_SIMD_PLAIN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

typedef struct {
    float v[8];
} f32x8;
typedef struct {
    uint8_t v[32];
} bytes32;

#define F8_LANES(expression)                        \
    f32x8 r;                                        \
    for (int i = 0; i < 8; i++) r.v[i] = expression; \
    return r

static inline f32x8 f8_set1(float a) { F8_LANES(a); }
static inline f32x8 f8_zero(void) { return f8_set1(0); }
static inline f32x8 f8_load(const float *p) { F8_LANES(p[i]); }
static inline void f8_store(float *p, f32x8 a) { memcpy(p, a.v, sizeof a.v); }
static inline f32x8 f8_add(f32x8 a, f32x8 b) { F8_LANES(a.v[i] + b.v[i]); }
static inline f32x8 f8_sub(f32x8 a, f32x8 b) { F8_LANES(a.v[i] - b.v[i]); }
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { F8_LANES(a.v[i] * b.v[i]); }
static inline f32x8 f8_div(f32x8 a, f32x8 b) { F8_LANES(a.v[i] / b.v[i]); }
static inline f32x8 f8_max(f32x8 a, f32x8 b) { F8_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline f32x8 f8_min(f32x8 a, f32x8 b) { F8_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c) { F8_LANES(a.v[i] * b.v[i] + c.v[i]); }
static inline f32x8 f8_abs(f32x8 a) { F8_LANES(fabsf(a.v[i])); }
static inline f32x8 f8_round(f32x8 a) { F8_LANES(rintf(a.v[i])); }

/* ((0+4)+(2+6)) + ((1+5)+(3+7)), the same tree in every variant. */
static inline float f8_sum(f32x8 a) {
    const float *v = a.v;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
/* f8_sum of each: out[0] is a's. */
static inline void f8_sums4(float *out, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    out[0] = f8_sum(a);
    out[1] = f8_sum(b);
    out[2] = f8_sum(c);
    out[3] = f8_sum(d);
}

static inline float f8_largest(f32x8 a) {
    float m = a.v[0];
    for (int i = 1; i < 8; i++) m = a.v[i] > m ? a.v[i] : m;
    return m;
}
/* 2^n for whole n in [-126, 127]. */
static inline f32x8 f8_exp2_whole(f32x8 n) { F8_LANES(float_of_bits((uint32_t)((int)n.v[i] + 127) << 23)); }

static inline f32x8 f8_of_bf16(const uint16_t *p) { F8_LANES(float_of_bf16(p[i])); }
static inline f32x8 f8_of_f16(const uint16_t *p) { F8_LANES(float_of_f16(p[i])); }
/* Four, then zeros. */
static inline f32x8 f8_of_4_bf16(const uint16_t *p) { F8_LANES(i < 4 ? float_of_bf16(p[i]) : 0.0f); }
static inline f32x8 f8_of_4_f16(const uint16_t *p) { F8_LANES(i < 4 ? float_of_f16(p[i]) : 0.0f); }
static inline f32x8 f8_of_u8(const uint8_t *p) { F8_LANES((float)p[i]); }
static inline f32x8 f8_of_i8(const int8_t *p) { F8_LANES((float)p[i]); }
/* Eight 4-bit numbers, the low nibble of each byte first. */
static inline f32x8 f8_of_u4(const uint8_t *p) { F8_LANES((float)(p[i / 2] >> (i & 1) * 4 & 15)); }
/* Rounds to whole numbers in [-127, 127]. */
static inline void f8_to_i8(int8_t *p, f32x8 a) {
    for (int i = 0; i < 8; i++) p[i] = (int8_t)rintf(a.v[i]);
}
static inline void f8_to_f16(uint16_t *p, f32x8 a) {
    for (int i = 0; i < 8; i++) p[i] = f16_of_float(a.v[i]);
}

static inline bytes32 b32_load(const void *p) {
    bytes32 r;
    memcpy(r.v, p, 32);
    return r;
}
#define B32_LANES(expression)                                  \
    bytes32 r;                                                 \
    for (int i = 0; i < 32; i++) r.v[i] = (uint8_t)(expression); \
    return r
static inline bytes32 b32_low_nibbles(bytes32 w) { B32_LANES(w.v[i] & 15); }
static inline bytes32 b32_high_nibbles(bytes32 w) { B32_LANES(w.v[i] >> 4); }
/* Unsigned bytes less 128. */
static inline bytes32 b32_to_signed(bytes32 w) { B32_LANES(w.v[i] ^ 0x80); }

static inline int dot4(const uint8_t *w, const uint8_t *a) {
    int sum = 0;
    for (int j = 0; j < 4; j++) sum += (int8_t)w[j] * (int8_t)a[j];
    return sum;
}
/* Sums of products of nibbles and signed bytes, four columns to a 32-bit lane. */
typedef struct {
    int v[8];
} i32x8;
typedef i32x8 parts;

#define I8_LANES(expression)                        \
    i32x8 r;                                        \
    for (int i = 0; i < 8; i++) r.v[i] = expression; \
    return r

static inline parts parts_zero(void) { I8_LANES(0); }
static inline parts parts_add(parts sums, bytes32 nibbles, bytes32 a) {
    I8_LANES(sums.v[i] + dot4(nibbles.v + 4 * i, a.v + 4 * i));
}
/* i8_quads(parts_pairs(a, b), parts_pairs(c, d)): the sums of a, b, c and d over lanes 0 to 3, then those over lanes 4 to 7. */
static inline i32x8 parts_pairs(parts a, parts b) {
    I8_LANES(i % 2 ? b.v[i / 4 * 4 + i % 4 / 2] + b.v[i / 4 * 4 + i % 4 / 2 + 2]
                   : a.v[i / 4 * 4 + i % 4 / 2] + a.v[i / 4 * 4 + i % 4 / 2 + 2]);
}
static inline i32x8 i8_quads(i32x8 ab, i32x8 cd) {
    I8_LANES(i & 2 ? cd.v[i - 2] + cd.v[i] : ab.v[i] + ab.v[i + 2]);
}
static inline i32x8 i8_add(i32x8 a, i32x8 b) { I8_LANES(a.v[i] + b.v[i]); }
static inline i32x8 i8_lower(i32x8 a, i32x8 b) { I8_LANES(i < 4 ? a.v[i] : b.v[i - 4]); }
static inline i32x8 i8_upper(i32x8 a, i32x8 b) { I8_LANES(i < 4 ? a.v[i + 4] : b.v[i]); }
static inline f32x8 f8_of_ints(i32x8 a) { F8_LANES((float)a.v[i]); }

/* 16 bytes, twice. */
static inline bytes32 b32_repeat(const void *p) { B32_LANES(((const uint8_t *)p)[i % 16]); }
static inline bytes32 b32_lower(bytes32 a, bytes32 b) { B32_LANES(i < 16 ? a.v[i] : b.v[i - 16]); }
static inline bytes32 b32_upper(bytes32 a, bytes32 b) { B32_LANES(i < 16 ? a.v[i + 16] : b.v[i]); }
static inline void b32_store(uint8_t *p, bytes32 a) { memcpy(p, a.v, sizeof a.v); }

/* p0 p1 p2 p3, twice. */
static inline f32x8 f8_repeat(const float *p) { F8_LANES(p[i % 4]); }
/* Lane i of a, b, c and d to to + i * stride. */
static inline void f8_store_columns(float *to, int64_t stride, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    for (int i = 0; i < 8; i++) memcpy(to + i * stride, (float[]){a.v[i], b.v[i], c.v[i], d.v[i]}, 4 * sizeof *to);
}

/* The first halves of a and b, and their second halves. */
static inline f32x8 f8_lower(f32x8 a, f32x8 b) { F8_LANES(i < 4 ? a.v[i] : b.v[i - 4]); }
static inline f32x8 f8_upper(f32x8 a, f32x8 b) { F8_LANES(i < 4 ? a.v[i + 4] : b.v[i]); }
/* In each half: a0 a2 b0 b2, a1 a3 b1 b3, a0 a0 a1 a1, a2 a2 a3 a3. */
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { F8_LANES((i & 2 ? b : a).v[(i & 4) + (i & 1) * 2]); }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { F8_LANES((i & 2 ? b : a).v[(i & 4) + (i & 1) * 2 + 1]); }
static inline f32x8 f8_twice_low(f32x8 a) { F8_LANES(a.v[(i & 4) + (i & 2) / 2]); }
static inline f32x8 f8_twice_high(f32x8 a) { F8_LANES(a.v[(i & 4) + 2 + (i & 2) / 2]); }
/* In each half: the sums of a's, b's, c's and d's four lanes, as (0 + 1) + (2 + 3). */
static inline f32x8 f8_sums_of_fours(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    f32x8 r;
    for (int i = 0; i < 8; i += 4) {
        r.v[i] = (a.v[i] + a.v[i + 1]) + (a.v[i + 2] + a.v[i + 3]);
        r.v[i + 1] = (b.v[i] + b.v[i + 1]) + (b.v[i + 2] + b.v[i + 3]);
        r.v[i + 2] = (c.v[i] + c.v[i + 1]) + (c.v[i + 2] + c.v[i + 3]);
        r.v[i + 3] = (d.v[i] + d.v[i + 1]) + (d.v[i + 2] + d.v[i + 3]);
    }
    return r;
}

/* Lane i: the sum over bytes 4i .. 4i+3 of w * a, w in [-128, 127], a in [-127, 127]. */
static inline f32x8 dot_bytes(bytes32 w, bytes32 a) { F8_LANES((float)dot4(w.v + 4 * i, a.v + 4 * i)); }
static inline f32x8 dot_bytes2(bytes32 w0, bytes32 a0, bytes32 w1, bytes32 a1) {
    F8_LANES((float)(dot4(w0.v + 4 * i, a0.v + 4 * i) + dot4(w1.v + 4 * i, a1.v + 4 * i)));
}

/* a in lanes 0 to 3, b in lanes 4 to 7. */
static inline f32x8 f8_halves(float a, float b) { F8_LANES(i < 4 ? a : b); }

#define keep(v) ((void)(v))
#define forget_loads() ((void)0)
#define prefetch(p) ((void)(p))

#endif
