/* The largest of many, without sorting them all: top-k, top-p and min-p. */
#ifndef LH_SELECT_H
#define LH_SELECT_H

#include <stdint.h>

/* Sorts by falling rank, then by rising id. */
typedef struct {
    uint64_t rank;
    int64_t id;
} candidate;

/* The k best of n logits, of equals the lowest ids, to the front of `found` [n], in any order. `tiles` are the largest of each
 * SAMPLE_TILE of them. */
void select_best(const float *logits, int64_t n, const float *tiles, int64_t k, candidate *found);

void sort_candidates(candidate *c, int64_t n);

/* Keep the weights that reach top_p of their sum, the largest first, or that are at least min_p, where the largest is 1; they
 * return how many, in the order they had. `found` [n] is for their use. */
int64_t keep_top_p(double top_p, double *weights, int32_t *ids, int64_t n, candidate *found);
int64_t keep_min_p(double min_p, double *weights, int32_t *ids, int64_t n);

#endif
