/* Eight floats and the byte dot products, with AVX2, FMA and F16C; 256-bit VNNI where the file is compiled for it. */
#ifndef LH_SIMD_AVX2_H
#define LH_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef __m256 f32x8;
typedef __m256i bytes32;

static inline f32x8 f8_zero(void) { return _mm256_setzero_ps(); }
static inline f32x8 f8_set1(float a) { return _mm256_set1_ps(a); }
static inline f32x8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void f8_store(float *p, f32x8 a) { _mm256_storeu_ps(p, a); }
static inline f32x8 f8_add(f32x8 a, f32x8 b) { return _mm256_add_ps(a, b); }
static inline f32x8 f8_sub(f32x8 a, f32x8 b) { return _mm256_sub_ps(a, b); }
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { return _mm256_mul_ps(a, b); }
static inline f32x8 f8_div(f32x8 a, f32x8 b) { return _mm256_div_ps(a, b); }
static inline f32x8 f8_max(f32x8 a, f32x8 b) { return _mm256_max_ps(a, b); }
static inline f32x8 f8_min(f32x8 a, f32x8 b) { return _mm256_min_ps(a, b); }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
static inline f32x8 f8_abs(f32x8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline f32x8 f8_round(f32x8 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* ((0+4)+(2+6)) + ((1+5)+(3+7)), the same tree in every variant. */
static inline float f8_sum(f32x8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* f8_sum of each: out[0] is a's. */
static inline void f8_sums4(float *out, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    f32x8 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    f32x8 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
    /* a0 a1 c0 c1, b0 b1 d0 d1 */
    f32x8 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    __m128 ac = _mm256_castps256_ps128(pairs), bd = _mm256_extractf128_ps(pairs, 1);
    __m128 sums = _mm_add_ps(_mm_shuffle_ps(ac, bd, 0x88), _mm_shuffle_ps(ac, bd, 0xDD)); /* a c b d */
    _mm_storeu_ps(out, _mm_shuffle_ps(sums, sums, 0xD8));
}

static inline float f8_largest(f32x8 a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* 2^n for whole n in [-126, 127]. */
static inline f32x8 f8_exp2_whole(f32x8 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

static inline f32x8 f8_of_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline f32x8 f8_of_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
/* Four, then zeros. */
static inline f32x8 f8_of_4_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline f32x8 f8_of_4_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)); }
static inline f32x8 f8_of_u8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline f32x8 f8_of_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
/* Eight 4-bit numbers, the low nibble of each byte first. */
static inline f32x8 f8_of_u4(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32((int)word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)));
}
/* Rounds to whole numbers in [-127, 127]. */
static inline void f8_to_i8(int8_t *p, f32x8 a) {
    __m256i words = _mm256_cvtps_epi32(a);
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}
static inline void f8_to_f16(uint16_t *p, f32x8 a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline bytes32 b32_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline bytes32 b32_low_nibbles(bytes32 w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline bytes32 b32_high_nibbles(bytes32 w) {
    return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15));
}
/* Unsigned bytes less 128. */
static inline bytes32 b32_to_signed(bytes32 w) { return _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80)); }

/* Sums of products of nibbles and signed bytes, four columns to a 32-bit lane; of at most four additions, so that what
 * parts_pairs adds in 16 bits fits. */
typedef __m256i parts;
typedef __m256i i32x8;

static inline parts parts_zero(void) { return _mm256_setzero_si256(); }
static inline parts parts_add(parts sums, bytes32 nibbles, bytes32 a) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, nibbles, a);
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(nibbles, a));
#endif
}
/* i8_quads(parts_pairs(a, b), parts_pairs(c, d)): the sums of a, b, c and d over lanes 0 to 3, then those over lanes 4 to 7. */
static inline i32x8 parts_pairs(parts a, parts b) {
    __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_add_epi32(low, high);
#else
    return _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));
#endif
}
static inline i32x8 i8_quads(i32x8 ab, i32x8 cd) {
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
static inline i32x8 i8_add(i32x8 a, i32x8 b) { return _mm256_add_epi32(a, b); }
static inline i32x8 i8_lower(i32x8 a, i32x8 b) { return _mm256_permute2x128_si256(a, b, 0x20); }
static inline i32x8 i8_upper(i32x8 a, i32x8 b) { return _mm256_permute2x128_si256(a, b, 0x31); }
static inline f32x8 f8_of_ints(i32x8 a) { return _mm256_cvtepi32_ps(a); }

/* 16 bytes, twice. */
static inline bytes32 b32_repeat(const void *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
}
static inline bytes32 b32_lower(bytes32 a, bytes32 b) { return _mm256_permute2x128_si256(a, b, 0x20); }
static inline bytes32 b32_upper(bytes32 a, bytes32 b) { return _mm256_permute2x128_si256(a, b, 0x31); }
static inline void b32_store(uint8_t *p, bytes32 a) { _mm256_storeu_si256((__m256i *)p, a); }

/* p0 p1 p2 p3, twice. */
static inline f32x8 f8_repeat(const float *p) { return _mm256_broadcast_ps((const __m128 *)p); }
/* Lane i of a, b, c and d to to + i * stride. */
static inline void f8_store_columns(float *to, int64_t stride, f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    __m256 ab0 = _mm256_unpacklo_ps(a, b), ab2 = _mm256_unpackhi_ps(a, b);
    __m256 cd0 = _mm256_unpacklo_ps(c, d), cd2 = _mm256_unpackhi_ps(c, d);
    __m256 columns[4] = {_mm256_shuffle_ps(ab0, cd0, 0x44), _mm256_shuffle_ps(ab0, cd0, 0xEE),
                         _mm256_shuffle_ps(ab2, cd2, 0x44), _mm256_shuffle_ps(ab2, cd2, 0xEE)};
    for (int i = 0; i < 4; i++) {
        _mm_storeu_ps(to + i * stride, _mm256_castps256_ps128(columns[i]));
        _mm_storeu_ps(to + (i + 4) * stride, _mm256_extractf128_ps(columns[i], 1));
    }
}

/* The first halves of a and b, and their second halves. */
static inline f32x8 f8_lower(f32x8 a, f32x8 b) { return _mm256_permute2f128_ps(a, b, 0x20); }
static inline f32x8 f8_upper(f32x8 a, f32x8 b) { return _mm256_permute2f128_ps(a, b, 0x31); }
/* In each half: a0 a2 b0 b2, a1 a3 b1 b3, a0 a0 a1 a1, a2 a2 a3 a3. */
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { return _mm256_shuffle_ps(a, b, 0x88); }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { return _mm256_shuffle_ps(a, b, 0xDD); }
static inline f32x8 f8_twice_low(f32x8 a) { return _mm256_unpacklo_ps(a, a); }
static inline f32x8 f8_twice_high(f32x8 a) { return _mm256_unpackhi_ps(a, a); }
/* In each half: the sums of a's, b's, c's and d's four lanes, as (0 + 1) + (2 + 3). */
static inline f32x8 f8_sums_of_fours(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}

/* Lane i: the sum over bytes 4i .. 4i+3 of w * a, w in [-128, 127], a in [-127, 127]. |w| * a stays within an int16 pair. */
static inline __m256i dot_signed(bytes32 w, bytes32 a) {
    __m256i magnitude = _mm256_abs_epi8(w), with_sign = _mm256_sign_epi8(a, w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), magnitude, with_sign);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, with_sign), _mm256_set1_epi16(1));
#endif
}
static inline f32x8 dot_bytes(bytes32 w, bytes32 a) { return _mm256_cvtepi32_ps(dot_signed(w, a)); }
static inline f32x8 dot_bytes2(bytes32 w0, bytes32 a0, bytes32 w1, bytes32 a1) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(dot_signed(w0, a0), dot_signed(w1, a1)));
}

/* Keeps a vector in its register: the compiler would read it from memory again for each use. */
#define keep(v) __asm__("" : "+x"(v))
/* Has the compiler read memory again behind it: kept, what was read before would not fit the registers. */
#define forget_loads() __asm__ volatile("" ::: "memory")

/* a in lanes 0 to 3, b in lanes 4 to 7. */
static inline f32x8 f8_halves(float a, float b) { return _mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a)); }

/* Macros: GCC takes a function that only prefetches for one without effect, and drops its calls. */
#define prefetch(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#endif
