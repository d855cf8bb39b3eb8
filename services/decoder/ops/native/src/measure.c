/* What benchmarks ask: how fast memory can be read, and how many experts a step reads. */
#include "forward.h"

enum { PIECE_WORDS = 1 << 15 };

typedef struct {
    const uint64_t *words;
    int64_t num_words;
    uint64_t sums[256]; /* one a member */
} read_job;

static void read_piece(void *arg, int64_t item, int member) {
    read_job *job = arg;
    int64_t first = item * PIECE_WORDS, rest = job->num_words - first;
    uint64_t sums[8] = {0};
    for (int64_t i = 0; i + 8 <= (rest < PIECE_WORDS ? rest : PIECE_WORDS); i += 8)
        for (int j = 0; j < 8; j++) sums[j] += job->words[first + i + j];
    for (int j = 0; j < 8; j++) job->sums[member & 255] += sums[j];
}

uint64_t lh_read(context *c, const void *memory, int64_t num_bytes) {
    read_job job = {.words = memory, .num_words = num_bytes / 8};
    team_for(c->team, (job.num_words + PIECE_WORDS - 1) / PIECE_WORDS, read_piece, &job);
    uint64_t sum = 0;
    for (int i = 0; i < 256; i++) sum += job.sums[i];
    return sum;
}

void lh_take_routing(context *c, int64_t *blocks, int64_t *experts) {
    *blocks = c->routed_blocks;
    *experts = c->routed_experts;
    c->routed_blocks = c->routed_experts = 0;
}
