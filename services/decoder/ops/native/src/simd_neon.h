/* Eight floats and the byte dot products, with NEON and its dot product (armv8.2-a+dotprod). */
#ifndef LH_SIMD_NEON_H
#define LH_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float32x4_t lo, hi;
} f32x8;
typedef struct {
    uint8x16_t lo, hi;
} bytes32;

static inline f32x8 f8_set1(float a) { return (f32x8){vdupq_n_f32(a), vdupq_n_f32(a)}; }
static inline f32x8 f8_zero(void) { return f8_set1(0); }
static inline f32x8 f8_load(const float *p) { return (f32x8){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void f8_store(float *p, f32x8 a) {
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}
static inline f32x8 f8_add(f32x8 a, f32x8 b) { return (f32x8){vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_sub(f32x8 a, f32x8 b) { return (f32x8){vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { return (f32x8){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_div(f32x8 a, f32x8 b) { return (f32x8){vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_max(f32x8 a, f32x8 b) { return (f32x8){vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_min(f32x8 a, f32x8 b) { return (f32x8){vminq_f32(a.lo, b.lo), vminq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c) {
    return (f32x8){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
static inline f32x8 f8_abs(f32x8 a) { return (f32x8){vabsq_f32(a.lo), vabsq_f32(a.hi)}; }
static inline f32x8 f8_round(f32x8 a) { return (f32x8){vrndnq_f32(a.lo), vrndnq_f32(a.hi)}; }

/* ((0+4)+(2+6)) + ((1+5)+(3+7)), the same tree in every variant. */
static inline float f8_sum(f32x8 a) {
    float32x4_t s = vaddq_f32(a.lo, a.hi);
    float32x2_t pair = vadd_f32(vget_low_f32(s), vget_high_f32(s));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
/* f8_sum of each: out[0] is a's. */
static inline void f8_sums4(float *out, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    out[0] = f8_sum(a);
    out[1] = f8_sum(b);
    out[2] = f8_sum(c);
    out[3] = f8_sum(d);
}

static inline float f8_largest(f32x8 a) { return vmaxvq_f32(vmaxq_f32(a.lo, a.hi)); }

static inline float32x4_t exp2_whole4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
/* 2^n for whole n in [-126, 127]. */
static inline f32x8 f8_exp2_whole(f32x8 n) { return (f32x8){exp2_whole4(n.lo), exp2_whole4(n.hi)}; }

static inline f32x8 f8_of_bf16(const uint16_t *p) {
    uint16x8_t h = vld1q_u16(p);
    return (f32x8){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
                   vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(h), 16))};
}
static inline f32x8 f8_of_f16(const uint16_t *p) {
    float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    return (f32x8){vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
}
/* Four, then zeros. */
static inline f32x8 f8_of_4_bf16(const uint16_t *p) {
    return (f32x8){vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)), vdupq_n_f32(0)};
}
static inline f32x8 f8_of_4_f16(const uint16_t *p) {
    return (f32x8){vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vdupq_n_f32(0)};
}
static inline f32x8 f8_of_u16x8(uint16x8_t h) {
    return (f32x8){vcvtq_f32_u32(vmovl_u16(vget_low_u16(h))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(h)))};
}
static inline f32x8 f8_of_u8(const uint8_t *p) { return f8_of_u16x8(vmovl_u8(vld1_u8(p))); }
static inline f32x8 f8_of_i8(const int8_t *p) {
    int16x8_t h = vmovl_s8(vld1_s8(p));
    return (f32x8){vcvtq_f32_s32(vmovl_s16(vget_low_s16(h))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(h)))};
}
/* Eight 4-bit numbers, the low nibble of each byte first. */
static inline f32x8 f8_of_u4(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
    uint8x8_t low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
    return f8_of_u16x8(vmovl_u8(vzip1_u8(low, high)));
}
/* Rounds to whole numbers in [-127, 127]. */
static inline void f8_to_i8(int8_t *p, f32x8 a) {
    int16x8_t h = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.lo)), vqmovn_s32(vcvtnq_s32_f32(a.hi)));
    vst1_s8(p, vqmovn_s16(h));
}
static inline void f8_to_f16(uint16_t *p, f32x8 a) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(a.lo), vcvt_f16_f32(a.hi))));
}

static inline bytes32 b32_load(const void *p) { return (bytes32){vld1q_u8(p), vld1q_u8((const uint8_t *)p + 16)}; }
/* 16 bytes, then zeros. */
static inline bytes32 b32_low_nibbles(bytes32 w) {
    return (bytes32){vandq_u8(w.lo, vdupq_n_u8(15)), vandq_u8(w.hi, vdupq_n_u8(15))};
}
static inline bytes32 b32_high_nibbles(bytes32 w) { return (bytes32){vshrq_n_u8(w.lo, 4), vshrq_n_u8(w.hi, 4)}; }
/* Unsigned bytes less 128. */
static inline bytes32 b32_to_signed(bytes32 w) {
    return (bytes32){veorq_u8(w.lo, vdupq_n_u8(0x80)), veorq_u8(w.hi, vdupq_n_u8(0x80))};
}

static inline int32x4_t dot4(int32x4_t sum, uint8x16_t w, uint8x16_t a) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(a));
}
static inline f32x8 f8_of_i32(int32x4_t lo, int32x4_t hi) { return (f32x8){vcvtq_f32_s32(lo), vcvtq_f32_s32(hi)}; }

/* Sums of products of nibbles and signed bytes, four columns to a 32-bit lane. */
typedef struct {
    int32x4_t lo, hi;
} i32x8;
typedef i32x8 parts;

static inline parts parts_zero(void) { return (parts){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline parts parts_add(parts sums, bytes32 nibbles, bytes32 a) {
    return (parts){dot4(sums.lo, nibbles.lo, a.lo), dot4(sums.hi, nibbles.hi, a.hi)};
}
/* i8_quads(parts_pairs(a, b), parts_pairs(c, d)): the sums of a, b, c and d over lanes 0 to 3, then those over lanes 4 to 7. */
static inline i32x8 parts_pairs(parts a, parts b) { return (i32x8){vpaddq_s32(a.lo, b.lo), vpaddq_s32(a.hi, b.hi)}; }
static inline i32x8 i8_quads(i32x8 ab, i32x8 cd) { return parts_pairs(ab, cd); }
static inline i32x8 i8_add(i32x8 a, i32x8 b) { return (i32x8){vaddq_s32(a.lo, b.lo), vaddq_s32(a.hi, b.hi)}; }
static inline i32x8 i8_lower(i32x8 a, i32x8 b) { return (i32x8){a.lo, b.lo}; }
static inline i32x8 i8_upper(i32x8 a, i32x8 b) { return (i32x8){a.hi, b.hi}; }
static inline f32x8 f8_of_ints(i32x8 a) { return f8_of_i32(a.lo, a.hi); }

/* 16 bytes, twice. */
static inline bytes32 b32_repeat(const void *p) { return (bytes32){vld1q_u8(p), vld1q_u8(p)}; }
static inline bytes32 b32_lower(bytes32 a, bytes32 b) { return (bytes32){a.lo, b.lo}; }
static inline bytes32 b32_upper(bytes32 a, bytes32 b) { return (bytes32){a.hi, b.hi}; }
static inline void b32_store(uint8_t *p, bytes32 a) {
    vst1q_u8(p, a.lo);
    vst1q_u8(p + 16, a.hi);
}

/* p0 p1 p2 p3, twice. */
static inline f32x8 f8_repeat(const float *p) { return (f32x8){vld1q_f32(p), vld1q_f32(p)}; }

static inline void store_columns4(float *to, int64_t stride, float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    float32x4_t ab0 = vzip1q_f32(a, b), ab2 = vzip2q_f32(a, b), cd0 = vzip1q_f32(c, d), cd2 = vzip2q_f32(c, d);
    vst1q_f32(to, vcombine_f32(vget_low_f32(ab0), vget_low_f32(cd0)));
    vst1q_f32(to + stride, vcombine_f32(vget_high_f32(ab0), vget_high_f32(cd0)));
    vst1q_f32(to + 2 * stride, vcombine_f32(vget_low_f32(ab2), vget_low_f32(cd2)));
    vst1q_f32(to + 3 * stride, vcombine_f32(vget_high_f32(ab2), vget_high_f32(cd2)));
}
/* Lane i of a, b, c and d to to + i * stride. */
static inline void f8_store_columns(float *to, int64_t stride, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    store_columns4(to, stride, a.lo, b.lo, c.lo, d.lo);
    store_columns4(to + 4 * stride, stride, a.hi, b.hi, c.hi, d.hi);
}

/* The first halves of a and b, and their second halves. */
static inline f32x8 f8_lower(f32x8 a, f32x8 b) { return (f32x8){a.lo, b.lo}; }
static inline f32x8 f8_upper(f32x8 a, f32x8 b) { return (f32x8){a.hi, b.hi}; }
/* In each half: a0 a2 b0 b2, a1 a3 b1 b3, a0 a0 a1 a1, a2 a2 a3 a3. */
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { return (f32x8){vuzp1q_f32(a.lo, b.lo), vuzp1q_f32(a.hi, b.hi)}; }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { return (f32x8){vuzp2q_f32(a.lo, b.lo), vuzp2q_f32(a.hi, b.hi)}; }
static inline f32x8 f8_twice_low(f32x8 a) { return (f32x8){vzip1q_f32(a.lo, a.lo), vzip1q_f32(a.hi, a.hi)}; }
static inline f32x8 f8_twice_high(f32x8 a) { return (f32x8){vzip2q_f32(a.lo, a.lo), vzip2q_f32(a.hi, a.hi)}; }
/* In each half: the sums of a's, b's, c's and d's four lanes, as (0 + 1) + (2 + 3). */
static inline f32x8 f8_sums_of_fours(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    return (f32x8){vpaddq_f32(vpaddq_f32(a.lo, b.lo), vpaddq_f32(c.lo, d.lo)),
                   vpaddq_f32(vpaddq_f32(a.hi, b.hi), vpaddq_f32(c.hi, d.hi))};
}

/* Lane i: the sum over bytes 4i .. 4i+3 of w * a, w in [-128, 127], a in [-127, 127]. */
static inline f32x8 dot_bytes(bytes32 w, bytes32 a) {
    int32x4_t zero = vdupq_n_s32(0);
    return f8_of_i32(dot4(zero, w.lo, a.lo), dot4(zero, w.hi, a.hi));
}
static inline f32x8 dot_bytes2(bytes32 w0, bytes32 a0, bytes32 w1, bytes32 a1) {
    int32x4_t zero = vdupq_n_s32(0);
    return f8_of_i32(dot4(dot4(zero, w0.lo, a0.lo), w1.lo, a1.lo), dot4(dot4(zero, w0.hi, a0.hi), w1.hi, a1.hi));
}

/* a in lanes 0 to 3, b in lanes 4 to 7. */
static inline f32x8 f8_halves(float a, float b) { return (f32x8){vdupq_n_f32(a), vdupq_n_f32(b)}; }

#define keep(v) ((void)(v))
#define forget_loads() ((void)0)
#define prefetch(p) __builtin_prefetch(p, 0, 2)

#endif
