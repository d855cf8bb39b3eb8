/* Paged attention of a few rows: K/V is read in place, widened KV_TILE tokens at a time, and shared by all rows and heads.
 * The scores of a tile come first, for all of them, then its values: K and V at once would not fit the nearest cache.
 *
 * Tiles and splits begin at absolute positions, so a row's result depends on its own position alone. */
#include "kernels.h"
#include "simd.h"

enum { PAIR = 2, CACHE_LINE = 64 };

/* Rows of tokens that follow one another in memory, `stride` rows apart, and their scales. */
typedef struct {
    const uint8_t *rows;
    const float *scales;
    int64_t index, stride, count;
} kv_run;

/* The rows of tokens [at, at + n) of K (value 0) or V (value 1), as far as they lie in one block, or are the step's own. */
static kv_run run_of(const attention_task *task, int64_t at, int64_t n, int value) {
    if (at >= task->context_len) {
        int64_t index = (at - task->context_len) * task->num_kv_heads + task->kv_head;
        return (kv_run){value ? task->own_v : task->own_k, value ? task->own_v_scales : task->own_k_scales, index,
                        task->num_kv_heads, n};
    }
    int64_t number = at / task->block_size, offset = at - number * task->block_size;
    const uint8_t *block = (const uint8_t *)(uintptr_t)task->blocks[number];
    int64_t index = task->first_row + value * task->value_stride + offset * task->token_stride;
    if (n > task->block_size - offset) n = task->block_size - offset;
    if (n > task->context_len - at) n = task->context_len - at;
    return (kv_run){block + task->rows_offset, (const float *)block, index, task->token_stride, n};
}

/* Row `index` of a run. */
INLINE void widen_row(const kv_run *from, int64_t index, int64_t row_bytes, int64_t n, int format, float *out) {
    const uint8_t *row = from->rows + index * row_bytes;
    int64_t i = 0;
    if (format == FORMAT_I8) {
        const int8_t *p = (const int8_t *)row;
        float scale = from->scales[index];
        f32x8 factor = f8_set1(scale);
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_mul(f8_of_i8(p + i), factor));
        for (; i < n; i++) out[i] = (float)p[i] * scale;
    } else if (format == FORMAT_BF16) {
        const uint16_t *p = (const uint16_t *)row;
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_bf16(p + i));
        for (; i < n; i++) out[i] = float_of_bf16(p[i]);
    } else if (format == FORMAT_F16) {
        const uint16_t *p = (const uint16_t *)row;
        for (; i + 8 <= n; i += 8) f8_store(out + i, f8_of_f16(p + i));
        for (; i < n; i++) out[i] = float_of_f16(p[i]);
    } else {
        memcpy(out, row, (size_t)n * 4);
        i = n;
    }
    for (; i % 8; i++) out[i] = 0;
}

/* Tokens [begin, begin + n) to floats, `width` apart. */
static void widen_tile(const attention_task *task, int64_t begin, int n, int value, int64_t width, float *out) {
    for (int64_t i = 0; i < n;) {
        kv_run run = run_of(task, begin + i, n - i, value);
        for (int64_t j = 0; j < run.count; j++, i++)
            widen_row(&run, run.index + j * run.stride, task->row_bytes, task->head_dim, task->kv_format, out + i * width);
    }
}

/* Tokens [begin, begin + n) into the cache: a block's rows of one head are too few for the processor to foresee. A macro's user
 * is always inlined here, see `prefetch`. */
INLINE void fetch_tile(const attention_task *task, int64_t begin, int64_t n) {
    for (int value = 0; value < 2; value++)
        for (int64_t i = 0; i < n;) {
            kv_run run = run_of(task, begin + i, n - i, value);
            int64_t rows = run.stride == 1 ? 1 : run.count, bytes = run.stride == 1 ? run.count * task->row_bytes : task->row_bytes;
            for (int64_t j = 0; j < rows; j++) {
                const uint8_t *row = run.rows + (run.index + j * run.stride) * task->row_bytes;
                for (int64_t at = 0; at < bytes; at += CACHE_LINE) prefetch(row + at);
            }
            i += run.count;
        }
}

/* scores[h * WEIGHTS + i] = scale * q[h] . k[i] for HEADS heads and n tokens (rounded up to whole fours, which are there). */
INLINE void score_tile(const int HEADS, const float *const *q, const float *k, int64_t width, int n, float scale,
                       float *scores) {
    for (int i = 0; i < n; i += 4) {
        f32x8 acc[PAIR][4];
        UNROLL for (int h = 0; h < HEADS; h++)
            UNROLL for (int j = 0; j < 4; j++) acc[h][j] = f8_zero();
        for (int64_t d = 0; d < width; d += 8) {
            f32x8 row[4];
            UNROLL for (int j = 0; j < 4; j++) row[j] = f8_load(k + (i + j) * width + d);
            UNROLL for (int j = 0; j < 4; j++) keep(row[j]);
            UNROLL for (int h = 0; h < HEADS; h++) {
                f32x8 query = f8_load(q[h] + d);
                UNROLL for (int j = 0; j < 4; j++) acc[h][j] = f8_fma(query, row[j], acc[h][j]);
            }
        }
        UNROLL for (int h = 0; h < HEADS; h++) {
            float sums[4];
            f8_sums4(sums, acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
            for (int j = 0; j < 4; j++) scores[h * WEIGHTS + i + j] = sums[j] * scale;
        }
    }
}

/* Turns scores [first, end) into weights, all others into 0, and folds them into the running largest and total.
 * Returns what the values so far must be multiplied by. */
INLINE float weigh(float *scores, int first, int end, float *largest, float *total) {
    for (int i = 0; i < first; i++) scores[i] = -__builtin_inff();
    for (int i = end; i < KV_TILE; i++) scores[i] = -__builtin_inff();
    f32x8 peaks = f8_set1(*largest);
    for (int i = 0; i < KV_TILE; i += 8) peaks = f8_max(f8_load(scores + i), peaks);
    float peak = f8_largest(peaks);
    f32x8 sum = f8_zero(), m = f8_set1(peak);
    for (int i = 0; i < KV_TILE; i += 8) f8_store(scores + i, f8_exp(f8_sub(f8_load(scores + i), m)));
    for (int i = 0; i < first; i++) scores[i] = 0;
    for (int i = end; i < KV_TILE; i++) scores[i] = 0;
    for (int i = 0; i < KV_TILE; i += 8) sum = f8_add(sum, f8_load(scores + i));
    float fade[8];
    f8_store(fade, f8_exp(f8_sub(f8_set1(*total > 0 ? *largest : peak), m)));
    *total = *total * fade[0] + f8_sum(sum);
    *largest = peak;
    return fade[0];
}

/* values[h] = fade * values[h] + the weighted sum of v[i], first <= i < end; a head's weights end with its fade. */
INLINE void add_values(const int HEADS, float *values, const float *weights, const float *v, int64_t width, int first, int end) {
    int64_t d = 0;
    for (; d + 32 <= width; d += 32) {
        f32x8 acc[PAIR][4];
        UNROLL for (int h = 0; h < HEADS; h++) {
            f32x8 fade = f8_set1(weights[h * WEIGHTS + KV_TILE]);
            UNROLL for (int j = 0; j < 4; j++) acc[h][j] = f8_mul(f8_load(values + h * width + d + 8 * j), fade);
        }
        for (int i = first; i < end; i++) {
            f32x8 row[4];
            UNROLL for (int j = 0; j < 4; j++) row[j] = f8_load(v + i * width + d + 8 * j);
            UNROLL for (int j = 0; j < 4; j++) keep(row[j]);
            UNROLL for (int h = 0; h < HEADS; h++) {
                f32x8 weight = f8_set1(weights[h * WEIGHTS + i]);
                UNROLL for (int j = 0; j < 4; j++) acc[h][j] = f8_fma(weight, row[j], acc[h][j]);
            }
        }
        UNROLL for (int h = 0; h < HEADS; h++)
            UNROLL for (int j = 0; j < 4; j++) f8_store(values + h * width + d + 8 * j, acc[h][j]);
    }
    for (; d < width; d += 8) {
        UNROLL for (int h = 0; h < HEADS; h++) {
            f32x8 acc = f8_mul(f8_load(values + h * width + d), f8_set1(weights[h * WEIGHTS + KV_TILE]));
            for (int i = first; i < end; i++)
                acc = f8_fma(f8_set1(weights[h * WEIGHTS + i]), f8_load(v + i * width + d), acc);
            f8_store(values + h * width + d, acc);
        }
    }
}

/* Some tokens of the tile at hand: [first, end) of it are seen. */
typedef struct {
    int first, end;
} seen;

/* What row i sees of the tile that begins at `begin` and has n tokens. */
static seen seen_by(const attention_task *task, int64_t i, int64_t begin, int n) {
    int64_t position = task->first_position + i;
    int64_t from = task->window && position >= task->window ? position - task->window + 1 - begin : 0;
    return (seen){from < 0 ? 0 : from > n ? n : (int)from, position - begin + 1 < n ? (int)(position - begin + 1) : n};
}

/* The weights of all heads of row i for a tile of K. */
static void weigh_row(const attention_task *task, int64_t i, seen tokens, const float *k, int64_t width, float *padded,
                      softmax_state out) {
    int64_t heads = task->num_heads / task->num_kv_heads;
    for (int64_t h = 0; h < heads; h += PAIR) {
        const float *q[PAIR];
        int count = heads - h < PAIR ? 1 : PAIR;
        for (int j = 0; j < count; j++) {
            q[j] = task->q + i * task->q_stride + (task->kv_head * heads + h + j) * task->head_dim;
            if (width != task->head_dim) {
                memcpy(padded + j * width, q[j], (size_t)task->head_dim * sizeof *padded);
                q[j] = padded + j * width;
            }
        }
        float *weights = out.weights + (i * heads + h) * WEIGHTS;
        if (count == PAIR) {
            score_tile(PAIR, q, k, width, tokens.end, task->scale, weights);
        } else {
            score_tile(1, q, k, width, tokens.end, task->scale, weights);
        }
        for (int j = 0; j < count; j++, weights += WEIGHTS) {
            int64_t head = i * heads + h + j;
            weights[KV_TILE] = weigh(weights, tokens.first, tokens.end, out.largest + head, out.total + head);
        }
    }
}

/* Adds a tile of V to the values of all heads of row i. */
static void add_row(const attention_task *task, int64_t i, seen tokens, const float *v, int64_t width, softmax_state out) {
    int64_t heads = task->num_heads / task->num_kv_heads;
    for (int64_t h = 0; h < heads; h += PAIR) {
        float *values = out.values + (i * heads + h) * width;
        const float *weights = out.weights + (i * heads + h) * WEIGHTS;
        if (heads - h >= PAIR) {
            add_values(PAIR, values, weights, v, width, tokens.first, tokens.end);
        } else {
            add_values(1, values, weights, v, width, tokens.first, tokens.end);
        }
    }
}

/* The first token of a split that one of the rows sees, at the begin of a tile, and the end of those that one sees. */
static int64_t begin_of(const attention_task *task, int64_t split) {
    int64_t begin = split * KV_SPLIT;
    if (!task->window || task->first_position < task->window) return begin;
    int64_t seen = (task->first_position - task->window + 1) / KV_TILE * KV_TILE;
    return seen > begin ? seen : begin;
}

static int64_t end_of(const attention_task *task, int64_t split) {
    int64_t end = task->first_position + task->num_rows;
    return end > (split + 1) * KV_SPLIT ? (split + 1) * KV_SPLIT : end;
}

INLINE int64_t tile_tokens(int64_t begin, int64_t stop) {
    return stop - begin < 0 ? 0 : stop - begin < KV_TILE ? stop - begin : KV_TILE;
}

void ISA(attend)(const attention_task *task, int64_t split, const attention_task *next, int64_t next_split,
                 softmax_state out) {
    int64_t width = (task->head_dim + 7) / 8 * 8, heads = task->num_heads / task->num_kv_heads;
    _Alignas(64) float tile[KV_TILE * MAX_HEAD_DIM], padded[PAIR * MAX_HEAD_DIM];
    for (int64_t i = 0; i < task->num_rows * heads; i++) out.largest[i] = -__builtin_inff();
    memset(out.total, 0, (size_t)(task->num_rows * heads) * sizeof *out.total);
    memset(out.values, 0, (size_t)(task->num_rows * heads * width) * sizeof *out.values);
    if (width != task->head_dim) memset(padded, 0, sizeof padded);
    int64_t begin = begin_of(task, split), stop = end_of(task, split);
    if (next) {
        int64_t first = begin_of(next, next_split);
        fetch_tile(next, first, tile_tokens(first, end_of(next, next_split)));
    }
    for (; begin < stop; begin += KV_TILE) {
        int n = (int)tile_tokens(begin, stop);
        fetch_tile(task, begin + KV_TILE, tile_tokens(begin + KV_TILE, stop));
        widen_tile(task, begin, n, 0, width, tile);
        for (int i = n; i % 4; i++) memset(tile + i * width, 0, (size_t)width * sizeof *tile);
        for (int64_t i = 0; i < task->num_rows; i++) {
            seen tokens = seen_by(task, i, begin, n);
            if (tokens.first < tokens.end) weigh_row(task, i, tokens, tile, width, padded, out);
        }
        widen_tile(task, begin, n, 1, width, tile);
        for (int64_t i = 0; i < task->num_rows; i++) {
            seen tokens = seen_by(task, i, begin, n);
            if (tokens.first < tokens.end) add_row(task, i, tokens, tile, width, out);
        }
    }
}

void ISA(merge)(softmax_state sum, softmax_state part, int64_t num_rows, int64_t head_dim) {
    int64_t width = (head_dim + 7) / 8 * 8;
    for (int64_t r = 0; r < num_rows; r++) {
        if (!(part.total[r] > 0)) continue;
        float *values = sum.values + r * width;
        const float *more = part.values + r * width;
        if (!(sum.total[r] > 0)) {
            sum.largest[r] = part.largest[r];
            sum.total[r] = part.total[r];
            memcpy(values, more, (size_t)width * sizeof *values);
            continue;
        }
        float peak = sum.largest[r] > part.largest[r] ? sum.largest[r] : part.largest[r], fades[8];
        f8_store(fades, f8_exp(f8_sub(f8_halves(sum.largest[r], part.largest[r]), f8_set1(peak))));
        f32x8 fade = f8_set1(fades[0]), gain = f8_set1(fades[4]);
        for (int64_t d = 0; d < width; d += 8)
            f8_store(values + d, f8_fma(f8_load(values + d), fade, f8_mul(f8_load(more + d), gain)));
        sum.total[r] = sum.total[r] * fades[0] + part.total[r] * fades[4];
        sum.largest[r] = peak;
    }
}

void ISA(scale_out)(const float *values, float total, int64_t n, float *out) {
    float factor = 1.0f / total;
    for (int64_t i = 0; i < n; i++) out[i] = values[i] * factor;
}
