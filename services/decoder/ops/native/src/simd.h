/* Eight-float vectors for the kernels, whose files are compiled once per instruction set.
 *
 * Every variant has eight lanes and sums them in one order, and products are fused only where f8_fma says so
 * (-ffp-contract=off), so AVX2, AVX-512 VNNI and NEON give the same bits. */
#ifndef LH_SIMD_H
#define LH_SIMD_H

#if defined(LH_ISA_plain)
#include "simd_plain.h"
#define ISA(name) name##_plain
#elif defined(LH_ISA_avx2)
#include "simd_avx2.h"
#define ISA(name) name##_avx2
#elif defined(LH_ISA_vnni)
#include "simd_avx2.h"
#define ISA(name) name##_vnni
#elif defined(LH_ISA_neon)
#include "simd_neon.h"
#define ISA(name) name##_neon
#else
#error "compile with -DLH_ISA_<name>"
#endif

#include "half.h"

#if defined(LH_ISA_plain)
#define INLINE static inline
#else
#define INLINE static inline __attribute__((always_inline))
#endif
#if defined(LH_ISA_plain)
#define UNROLL /* there are no registers to keep the lanes in, and the compiler takes a minute over it */
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/* The first n < 8 floats, then zeros. */
static inline f32x8 f8_load_some(const float *p, int n) {
    float v[8] = {0};
    memcpy(v, p, (size_t)n * sizeof *p);
    return f8_load(v);
}
static inline void f8_store_some(float *p, f32x8 a, int n) {
    float v[8];
    f8_store(v, a);
    memcpy(p, v, (size_t)n * sizeof *p);
}

/* e^a within 2 units in the last place; arguments beyond what a float holds are clamped. */
static inline f32x8 f8_exp(f32x8 a) {
    a = f8_min(f8_max(a, f8_set1(-87.0f)), f8_set1(88.0f));
    f32x8 n = f8_round(f8_mul(a, f8_set1(1.44269504088896341f)));
    f32x8 r = f8_fma(n, f8_set1(-0.693359375f), a);
    r = f8_fma(n, f8_set1(2.12194440e-4f), r);
    f32x8 p = f8_set1(1.9875691500e-4f);
    p = f8_fma(p, r, f8_set1(1.3981999507e-3f));
    p = f8_fma(p, r, f8_set1(8.3334519073e-3f));
    p = f8_fma(p, r, f8_set1(4.1665795894e-2f));
    p = f8_fma(p, r, f8_set1(1.6666665459e-1f));
    p = f8_fma(p, r, f8_set1(5.0000001201e-1f));
    p = f8_add(f8_fma(f8_mul(r, r), p, r), f8_set1(1.0f));
    return f8_mul(p, f8_exp2_whole(n));
}

#endif
