/* The element-wise rest: norms, rotary positions, SiLU, softmax, sums. */
#include "kernels.h"
#include "simd.h"

/* 1 / sqrt(mean(x^2) + eps) */
static float inverse_rms(const float *x, int64_t n, float eps) {
    f32x8 sum = f8_zero();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) sum = f8_fma(f8_load(x + i), f8_load(x + i), sum);
    if (i < n) {
        f32x8 v = f8_load_some(x + i, (int)(n - i));
        sum = f8_fma(v, v, sum);
    }
    return 1.0f / __builtin_sqrtf(f8_sum(sum) / (float)n + eps);
}

void ISA(rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *out) {
    f32x8 factor = f8_set1(inverse_rms(x, n, eps));
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) f8_store(out + i, f8_mul(f8_mul(f8_load(x + i), factor), f8_load(weight + i)));
    if (i < n) {
        int rest = (int)(n - i);
        f32x8 scaled = f8_mul(f8_load_some(x + i, rest), factor);
        f8_store_some(out + i, f8_mul(scaled, f8_load_some(weight + i, rest)), rest);
    }
}

/* The pairs are (i, i + half). */
static void rotate(float *head, const float *cos, const float *sin, int64_t half) {
    int64_t i = 0;
    for (; i + 8 <= half; i += 8) {
        f32x8 a = f8_load(head + i), b = f8_load(head + half + i), c = f8_load(cos + i), s = f8_load(sin + i);
        f8_store(head + i, f8_sub(f8_mul(a, c), f8_mul(b, s)));
        f8_store(head + half + i, f8_add(f8_mul(b, c), f8_mul(a, s)));
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

void ISA(norm_rope)(float *head, const float *weight, float eps, const float *cos, const float *sin, int64_t head_dim) {
    if (weight) ISA(rms_norm)(head, weight, eps, head_dim, head);
    rotate(head, cos, sin, head_dim / 2);
}

int ISA(all_finite)(const float *x, int64_t n);

void ISA(narrow)(const float *x, int64_t n, int format, void *out) {
    if (format == FORMAT_F32) {
        memcpy(out, x, (size_t)n * 4);
    } else if (format == FORMAT_BF16) {
        for (int64_t i = 0; i < n; i++) ((uint16_t *)out)[i] = bf16_of_float(x[i]);
    } else {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) f8_to_f16((uint16_t *)out + i, f8_load(x + i));
        for (; i < n; i++) ((uint16_t *)out)[i] = f16_of_float(x[i]);
    }
}

float ISA(to_int8)(const float *x, int64_t n, int8_t *out) {
    f32x8 peaks = f8_zero();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) peaks = f8_max(peaks, f8_abs(f8_load(x + i)));
    if (i < n) peaks = f8_max(peaks, f8_abs(f8_load_some(x + i, (int)(n - i))));
    float scale = f8_largest(peaks) / 127.0f;
    int finite = ISA(all_finite)(x, n);
    if (!finite || scale == 0) { /* of the smallest numbers a 127th is zero */
        memset(out, 0, (size_t)n);
        return finite ? 0 : __builtin_nanf("");
    }
    f32x8 divisor = f8_set1(scale), most = f8_set1(127.0f), least = f8_set1(-127.0f);
    for (i = 0; i + 8 <= n; i += 8) f8_to_i8(out + i, f8_max(f8_min(f8_div(f8_load(x + i), divisor), most), least));
    if (i < n) {
        int8_t rest[8];
        f8_to_i8(rest, f8_max(f8_min(f8_div(f8_load_some(x + i, (int)(n - i)), divisor), most), least));
        memcpy(out + i, rest, (size_t)(n - i));
    }
    return scale;
}

INLINE f32x8 silu_times(f32x8 gate, f32x8 up) {
    f32x8 one = f8_set1(1.0f);
    return f8_mul(f8_div(gate, f8_add(one, f8_exp(f8_sub(f8_zero(), gate)))), up);
}

void ISA(silu_mul)(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) f8_store(gate + i, silu_times(f8_load(gate + i), f8_load(up + i)));
    if (i < n) {
        int rest = (int)(n - i);
        f8_store_some(gate + i, silu_times(f8_load_some(gate + i, rest), f8_load_some(up + i, rest)), rest);
    }
}

void ISA(add_scaled)(float *sum, const float *x, float factor, int64_t n) {
    f32x8 f = f8_set1(factor);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) f8_store(sum + i, f8_fma(f8_load(x + i), f, f8_load(sum + i)));
    if (i < n) {
        int rest = (int)(n - i);
        f8_store_some(sum + i, f8_fma(f8_load_some(x + i, rest), f, f8_load_some(sum + i, rest)), rest);
    }
}

static float largest_of(const float *x, int64_t n) {
    float largest = x[0];
    int64_t i = 0;
    if (n >= 8) {
        f32x8 m = f8_load(x);
        for (i = 8; i + 8 <= n; i += 8) m = f8_max(m, f8_load(x + i));
        largest = f8_largest(m);
    }
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* e^(x - largest) where i < n, zero after. */
INLINE f32x8 exp_some(const float *x, f32x8 largest, int n) {
    float e[8] = {0}, all[8];
    f8_store(all, f8_exp(f8_sub(f8_load_some(x, n), largest)));
    for (int i = 0; i < n; i++) e[i] = all[i];
    return f8_load(e);
}

float ISA(softmax)(float *scores, int64_t n, float *total) {
    float largest = largest_of(scores, n);
    f32x8 m = f8_set1(largest), sum = f8_zero();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        f32x8 e = f8_exp(f8_sub(f8_load(scores + i), m));
        f8_store(scores + i, e);
        sum = f8_add(sum, e);
    }
    if (i < n) {
        f32x8 e = exp_some(scores + i, m, (int)(n - i));
        f8_store_some(scores + i, e, (int)(n - i));
        sum = f8_add(sum, e);
    }
    *total = f8_sum(sum);
    return largest;
}

int64_t ISA(argmax)(const float *x, int64_t n) {
    float largest = largest_of(x, n);
    for (int64_t i = 0; i < n; i++)
        if (x[i] == largest) return i;
    return 0; /* only NaN is unlike itself */
}

int ISA(all_finite)(const float *x, int64_t n) {
    f32x8 zeros = f8_zero(); /* until something times zero is NaN */
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) zeros = f8_fma(f8_load(x + i), f8_zero(), zeros);
    if (i < n) zeros = f8_fma(f8_load_some(x + i, (int)(n - i)), f8_zero(), zeros);
    return f8_sum(zeros) == 0;
}
