/* Chooses the kernels for the processor at hand. */
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

extern const kernels kernels_plain;
#if defined(__x86_64__)
extern const kernels kernels_avx2, kernels_vnni;

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
extern const kernels kernels_neon;

static int has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every Apple silicon has it */
#endif
}
#endif

/* Best first. */
static int candidates(const kernels **found) {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_vnni()) found[n++] = &kernels_vnni;
    if (has_avx2()) found[n++] = &kernels_avx2;
#elif defined(__aarch64__)
    if (has_dotprod()) found[n++] = &kernels_neon;
#endif
    found[n++] = &kernels_plain;
    return n;
}

const kernels *kernels_for(const char *name) {
    const kernels *found[4];
    int n = candidates(found);
    if (!name || !*name) return found[0];
    for (int i = 0; i < n; i++)
        if (!strcmp(found[i]->name, name)) return found[i];
    return NULL;
}
