#include "select.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static int comes_before(candidate a, candidate b) { return a.rank != b.rank ? a.rank > b.rank : a.id < b.id; }

static int compare(const void *a, const void *b) {
    candidate x = *(const candidate *)a, y = *(const candidate *)b;
    return comes_before(x, y) ? -1 : comes_before(y, x);
}

void sort_candidates(candidate *c, int64_t n) { qsort(c, (size_t)n, sizeof *c, compare); }

static void swap(candidate *a, candidate *b) {
    candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* Candidates [.., end_of_left) come before those of [end_of_left, right), one at most, and these before the rest. */
typedef struct {
    int64_t end_of_left, right;
} range;

static range partition(candidate *c, int64_t low, int64_t high) {
    candidate *middle = c + low + (high - low) / 2;
    if (comes_before(*middle, c[low])) swap(middle, c + low);
    if (comes_before(c[high], c[low])) swap(c + high, c + low);
    if (comes_before(c[high], *middle)) swap(c + high, middle);
    candidate pivot = *middle;
    int64_t i = low, j = high;
    while (i <= j) {
        while (comes_before(c[i], pivot)) i++;
        while (comes_before(pivot, c[j])) j--;
        if (i <= j) swap(c + i++, c + j--);
    }
    return (range){j + 1, i};
}

/* Brings the first k of n candidates to the front, in any order. */
static void select_first(candidate *c, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high && k > low && k <= high) {
        range part = partition(c, low, high);
        if (k < part.end_of_left) high = part.end_of_left - 1;
        else if (k > part.right) low = part.right;
        else return;
    }
}

/* Numbers that order as floats do; the two zeros are equal. */
static uint64_t rank_of_float(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* k tiles whose largest is at least a bound have k logits of at least that bound, so that few tiles are looked into. */
void select_best(const float *logits, int64_t n, const float *tiles, int64_t k, candidate *found) {
    int64_t num_tiles = (n + SAMPLE_TILE - 1) / SAMPLE_TILE, num_found = 0;
    uint64_t bound = 0;
    if (k <= num_tiles) {
        for (int64_t i = 0; i < num_tiles; i++) found[i] = (candidate){rank_of_float(tiles[i]), i};
        select_first(found, num_tiles, k);
        bound = found[0].rank;
        for (int64_t i = 1; i < k; i++) bound = found[i].rank < bound ? found[i].rank : bound;
    }
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        if (rank_of_float(tiles[tile]) < bound) continue;
        for (int64_t i = tile * SAMPLE_TILE; i < n && i < (tile + 1) * SAMPLE_TILE; i++) {
            uint64_t rank = rank_of_float(logits[i]);
            if (rank >= bound) found[num_found++] = (candidate){rank, i};
        }
    }
    select_first(found, num_found, k);
}

static candidate candidate_of(double weight, int64_t id) {
    candidate c = {0, id};
    memcpy(&c.rank, &weight, sizeof weight); /* the bits of what is not negative order as it does */
    return c;
}

/* Weights as whole numbers, whose sums do not depend on an order. */
static int64_t share_of(double weight, double scale) { return (int64_t)rint(weight * scale); }

/* So that n weights of at most 1 add up to less than 2^63. */
static double share_scale(int64_t n) {
    int bits = 0;
    for (; n >> bits; bits++) continue;
    return ldexp(1.0, 62 - bits);
}

static int64_t shares_of(const candidate *c, int64_t n, double scale) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double weight;
        memcpy(&weight, &c[i].rank, sizeof weight);
        sum += share_of(weight, scale);
    }
    return sum;
}

/* The last candidate, in order, before which the shares add up to less than the limit. */
static candidate last_within(candidate *c, int64_t n, int64_t limit, double scale) {
    int64_t low = 0, high = n - 1, before = 0;
    while (low < high) {
        range part = partition(c, low, high);
        int64_t left = before + shares_of(c + low, part.end_of_left - low, scale);
        if (left >= limit) {
            high = part.end_of_left - 1;
            continue;
        }
        int64_t middle = left + shares_of(c + part.end_of_left, part.right - part.end_of_left, scale);
        if (part.right > high || middle >= limit) { /* the pivot, or all there are */
            low = part.right - 1;
            break;
        }
        before = middle;
        low = part.right;
    }
    return c[low];
}

int64_t keep_top_p(double top_p, double *weights, int32_t *ids, int64_t n, candidate *found) {
    int64_t total = 0, count = 0, kept = 0;
    double scale = share_scale(n);
    for (int64_t i = 0; i < n; i++) total += share_of(weights[i], scale);
    int64_t limit = top_p > 0 ? (int64_t)ceil(top_p * (double)total) : 1;
    /* One that is kept and all after it have what is beyond the limit, so that it has an nth of that; some slack for rounding. */
    double least = ((1.0 - top_p) * (double)total * (1.0 - 1e-9) - 4) / (double)n;
    for (int64_t i = 0; i < n; i++)
        if ((double)share_of(weights[i], scale) >= least) found[count++] = candidate_of(weights[i], i);
    candidate last = last_within(found, count, limit, scale);
    for (int64_t i = 0; i < n; i++) {
        if (comes_before(last, candidate_of(weights[i], i))) continue;
        weights[kept] = weights[i];
        ids[kept++] = ids[i];
    }
    return kept;
}

int64_t keep_min_p(double min_p, double *weights, int32_t *ids, int64_t n) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
        if (weights[i] < min_p) continue; /* the largest weight is 1 */
        weights[kept] = weights[i];
        ids[kept++] = ids[i];
    }
    return kept;
}
