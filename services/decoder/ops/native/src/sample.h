/* Drawing tokens: services/decoder/sampler.py in C, with the same bits. */
#ifndef LH_SAMPLE_H
#define LH_SAMPLE_H

#include "context.h"

/* How the token of one row is drawn, and what came of it (layout.py mirrors it). */
typedef struct {
    const float *logits; /* [vocab_size], as penalties, biases and bans left them */
    const float *raw;    /* [vocab_size], as the model computed them; NULL where no logprobs are wanted */
    double temperature;  /* 0: greedy, and the rest up to `noise` means nothing */
    double top_p, min_p, noise;
    int64_t top_k; /* 0: all */
    int32_t *alternatives; /* [num_alternatives], ids of the best raw logits, filled in falling order */
    int32_t num_alternatives;
    int32_t token_id;                 /* drawn; -1 where a logit is NaN or above all numbers, or all are below */
    double raw_largest, raw_mass; /* of the raw logits: log-sum-exp = raw_largest + log(raw_mass) */
} sample_row;

#endif
