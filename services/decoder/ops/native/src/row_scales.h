/* Scales and biases of a row's groups as floats. Included by kernels, once for each instruction set. */
#ifndef LH_ROW_SCALES_H
#define LH_ROW_SCALES_H

#include "kernels.h"
#include "simd.h"

/* Scales i .. i + 7 of n, zeros beyond n. Nothing behind them is read. */
INLINE f32x8 load_scales(const uint8_t *p, int64_t i, int64_t n, int format) {
    if (format == FORMAT_F32) {
        const float *from = (const float *)p + i;
        return n - i >= 8 ? f8_load(from) : f8_load_some(from, (int)(n - i));
    }
    const uint16_t *from = (const uint16_t *)p + i;
    if (n - i >= 8) return format == FORMAT_BF16 ? f8_of_bf16(from) : f8_of_f16(from);
    if (n - i == 4) return format == FORMAT_BF16 ? f8_of_4_bf16(from) : f8_of_4_f16(from);
    uint16_t rest[8] = {0};
    for (int64_t j = 0; j < n - i; j++) rest[j] = from[j];
    return format == FORMAT_BF16 ? f8_of_bf16(rest) : f8_of_f16(rest);
}

#endif
