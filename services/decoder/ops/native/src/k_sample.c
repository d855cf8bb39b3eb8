/* The passes over a vocabulary's logits that sampling needs. */
#include "kernels.h"
#include "simd.h"

typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));

int ISA(block_maxima)(const float *x, int64_t n, float *largest) {
    f32x8 zeros = f8_zero(); /* until something times zero is NaN */
    for (int64_t block = 0; block * SAMPLE_TILE < n; block++) {
        const float *b = x + block * SAMPLE_TILE;
        int64_t size = n - block * SAMPLE_TILE < SAMPLE_TILE ? n - block * SAMPLE_TILE : SAMPLE_TILE, i = 0;
        float rest = b[size - 1];
        f32x8 m = f8_set1(rest);
        for (; i + 8 <= size; i += 8) {
            f32x8 v = f8_load(b + i);
            m = f8_max(m, v);
            zeros = f8_fma(v, f8_zero(), zeros);
        }
        for (int64_t j = i; j < size; j++) rest = b[j] > rest ? b[j] : rest;
        if (i < size) zeros = f8_fma(f8_load_some(b + i, (int)(size - i)), f8_zero(), zeros);
        float most = f8_largest(m);
        largest[block] = rest > most ? rest : most;
    }
    return f8_sum(zeros) == 0;
}

enum { PAIR = 2 }; /* vectors whose chains of additions run beside each other */

static const double series[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                1.0 / 2.0,         1.0,              1.0};

/* sampler.py's weights_of, operation for operation. A product is rounded before it is added to, here as there. */
INLINE void exponentials(f64x4 *x) {
    const double magic = 0x1.8p52; /* what is added to it is rounded to a whole number, in the low bits */
    f64x4 shifted[PAIR], r[PAIR], s[PAIR];
    for (int i = 0; i < PAIR; i++) {
        shifted[i] = x[i] * 1.4426950408889634 + magic;
        f64x4 whole = shifted[i] - magic;
        r[i] = x[i] - whole * 6.93147180369123816490e-01;
        r[i] -= whole * 1.90821492927058770002e-10;
        s[i] = (f64x4){0} + 1.0 / 6227020800.0;
    }
#if !defined(LH_ISA_plain)
    _Pragma("GCC unroll 16")
#endif
    for (int j = 0; j < (int)(sizeof series / sizeof *series); j++)
        for (int i = 0; i < PAIR; i++) s[i] = s[i] * r[i] + series[j];
    for (int i = 0; i < PAIR; i++) {
        u64x4 scaled = (u64x4)s[i] + ((u64x4)shifted[i] << 52);
        x[i] = (f64x4)(scaled & (u64x4)(x[i] >= -700.0));
    }
}

/* Eight logits; lanes[0] has the first four of each eight. */
INLINE void weigh8(const float *logits, double largest, double temperature, double *weights, f64x4 *lanes) {
    f64x4 x[PAIR];
    for (int i = 0; i < PAIR; i++) {
        f32x4 narrow;
        memcpy(&narrow, logits + 4 * i, sizeof narrow);
        x[i] = __builtin_convertvector(narrow, f64x4) - largest;
        if (temperature != 1.0) x[i] /= temperature;
    }
    exponentials(x);
    if (weights) memcpy(weights, x, sizeof x);
    for (int i = 0; i < PAIR; i++) lanes[i] += x[i];
}

INLINE double weigh_all(const float *logits, int64_t n, double largest, double temperature, double *weights) {
    f64x4 lanes[PAIR] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) weigh8(logits + i, largest, temperature, weights ? weights + i : NULL, lanes);
    if (i < n) {
        float rest[8];
        double made[8];
        for (int j = 0; j < 8; j++) rest[j] = i + j < n ? logits[i + j] : -__builtin_inff();
        weigh8(rest, largest, temperature, made, lanes);
        if (weights) memcpy(weights + i, made, (size_t)(n - i) * sizeof *made);
    }
    f64x4 sum = lanes[0] + lanes[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

double ISA(weigh)(const float *logits, int64_t n, double largest, double temperature, double *weights) {
    /* One copy of the loop for each, without the tests and the division in it. */
    if (temperature == 1.0 && !weights) return weigh_all(logits, n, largest, 1.0, NULL);
    if (!weights) return weigh_all(logits, n, largest, temperature, NULL);
    return weigh_all(logits, n, largest, temperature, weights);
}
