/* The table of one instruction set's kernels. */
#include "kernels.h"
#include "simd.h"

#if defined(LH_ISA_plain)
#define ISA_NAME "plain"
#elif defined(LH_ISA_avx2)
#define ISA_NAME "avx2"
#elif defined(LH_ISA_vnni)
#define ISA_NAME "avx512_vnni"
#else
#define ISA_NAME "neon_dotprod"
#endif

rows_kernel ISA(rows_exact), ISA(rows_fast);
void ISA(quantise)(const float *, int64_t, int, int64_t, int8_t *, float *, float *);
void ISA(widen)(const matrix *, int64_t, int64_t, int64_t, float *);
void ISA(rms_norm)(const float *, const float *, float, int64_t, float *);
void ISA(norm_rope)(float *, const float *, float, const float *, const float *, int64_t);
void ISA(narrow)(const float *, int64_t, int, void *);
float ISA(to_int8)(const float *, int64_t, int8_t *);
void ISA(silu_mul)(float *, const float *, int64_t);
void ISA(add_scaled)(float *, const float *, float, int64_t);
float ISA(softmax)(float *, int64_t, float *);
void ISA(attend)(const attention_task *, int64_t, const attention_task *, int64_t, softmax_state);
void ISA(merge)(softmax_state, softmax_state, int64_t, int64_t);
void ISA(scale_out)(const float *, float, int64_t, float *);
int64_t ISA(argmax)(const float *, int64_t);
int ISA(all_finite)(const float *, int64_t);
int ISA(block_maxima)(const float *, int64_t, float *);
double ISA(weigh)(const float *, int64_t, double, double, double *);

const kernels ISA(kernels) = {
    .name = ISA_NAME,
    .rows_exact = ISA(rows_exact),
    .rows_fast = ISA(rows_fast),
    .quantise = ISA(quantise),
    .widen = ISA(widen),
    .rms_norm = ISA(rms_norm),
    .norm_rope = ISA(norm_rope),
    .narrow = ISA(narrow),
    .to_int8 = ISA(to_int8),
    .silu_mul = ISA(silu_mul),
    .add_scaled = ISA(add_scaled),
    .softmax = ISA(softmax),
    .attend = ISA(attend),
    .merge = ISA(merge),
    .scale_out = ISA(scale_out),
    .argmax = ISA(argmax),
    .all_finite = ISA(all_finite),
    .block_maxima = ISA(block_maxima),
    .weigh = ISA(weigh),
};
