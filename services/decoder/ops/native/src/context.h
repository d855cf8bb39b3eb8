/* One engine's state: its kernels, its team, and buffers that grow to the largest step seen. */
#ifndef LH_CONTEXT_H
#define LH_CONTEXT_H

#include "kernels.h"
#include "team.h"

/* Buffers by purpose. Two purposes share a buffer only where one is over before the other begins. */
enum buffer {
    BUFFER_HIDDEN,
    BUFFER_NORMED,
    BUFFER_Q,
    BUFFER_KV,
    BUFFER_ATTENDED,
    BUFFER_COS_SIN,
    BUFFER_ACT_BYTES,
    BUFFER_ACT_FLOATS,
    BUFFER_ACT_HEADS,
    BUFFER_ROUTER_SCORES,
    BUFFER_ROUTES,
    BUFFER_PAIR_ACTS,
    BUFFER_GATED,
    BUFFER_EXPERT_OUT,
    BUFFER_SOFTMAX,
    BUFFER_TASKS,
    BUFFER_MEMBER_SCRATCH,
    BUFFER_HEAD_ROWS,
    BUFFER_SAMPLE_VIEWS,
    BUFFER_SAMPLE_WEIGHINGS,
    BUFFER_SAMPLE_POINTERS,
    BUFFER_SAMPLE_TILES,
    BUFFER_SAMPLE_FINITE,
    BUFFER_SAMPLE_MASSES,
    BUFFER_SAMPLE_SCRATCH,
    BUFFERS
};

typedef struct {
    const kernels *k;
    team *team;
    int fast; /* quantise activations where the weights are quantised */
    int failed; /* memory ran out in this step */
    const matrix *coming; /* what is multiplied first after the operation at hand, or NULL */
    const void *angles_of; /* the inverse frequencies whose angles BUFFER_COS_SIN has for this step, or NULL */
    int64_t routed_blocks, routed_experts; /* counted for benchmarks */
    struct {
        void *memory;
        int64_t bytes;
    } buffers[BUFFERS];
} context;

/* At least `bytes` of memory, aligned for vectors, whose contents do not survive growth; NULL (and `failed`) without memory. */
void *context_buffer(context *c, enum buffer which, int64_t bytes);

#define NEW(c, which, type, count) ((type *)context_buffer(c, which, (int64_t)sizeof(type) * (count)))

#endif
