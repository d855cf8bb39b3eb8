// Dense layers of a small step (up to SMALL_ROWS rows), and the hidden state between them.
namespace lh {

constexpr int COLUMN_TILES = SMALL_ROWS / 8;

// Shared memory of a small step. What begins at `arriving` is used in turns with the areas of attention and of large steps.
struct SmallShared {
    float inverse[SMALL_ROWS]; // 1 / root mean square of each row
    int num_active, last_split[2];
    unsigned short chosen[SMALL_ROWS * TOPK];           // expert of each assignment: row * TOPK + rank
    unsigned short lists[EXPERTS][SMALL_ROWS];          // assignments of each expert, in the order of rows
    unsigned short counts[EXPERTS], active[EXPERTS];
    float weights[SMALL_ROWS * TOPK];
    alignas(128) char arriving[WARPS][WEIGHT_BYTES];
    alignas(128) float4 parts[2][WARPS][COLUMN_TILES * 32];
};

__device__ __forceinline__ SmallShared& small() { return *reinterpret_cast<SmallShared*>(shared_bytes + TABLE_BYTES); }

__device__ __forceinline__ char* turns() { return small().arriving[0]; }
__device__ __forceinline__ char* weight_area() { return small().arriving[threadIdx.x >> 5]; }
constexpr int TURNS_AT = TABLE_BYTES + int(sizeof(SmallShared) - sizeof(SmallShared::parts) - sizeof(SmallShared::arriving));

// The reciprocal root mean square of a row, from the sums of squares of its tiles. All 32 lanes of a warp.
__device__ __forceinline__ float inverse_rms(const float* squares, int row) {
    float sum = 0.0f;
    for (int i = threadIdx.x & 31; i < HIDDEN_TILES; i += 32) sum += squares[row * HIDDEN_TILES + i];
    return rsqrtf(__fmaf_rn(warp_sum(sum), 1.0f / float(HIDDEN), float(LH_EPS)));
}

// inverse[i] of rows ids[i], or of row i when ids is null. The caller synchronises.
__device__ __forceinline__ void load_inverses(const Table& table, const int* ids, int count) {
    for (int i = threadIdx.x >> 5; i < count; i += WARPS) {
        const float value = inverse_rms(table.squares, ids ? ids[i] : i);
        if ((threadIdx.x & 31) == 0) small().inverse[i] = value;
    }
}

// Writes one element of the hidden state and of the next layer's input; returns its square.
__device__ __forceinline__ float put_hidden(const Table& table, int row, int at, float value, const float* norm) {
    table.hidden[u64(row) * HIDDEN + at] = value;
    table.normed[u64(row) * HIDDEN + shuffled(at)] = __float2bfloat16_rn(value * norm[at]);
    return __fmul_rn(value, value); // never fused with what it is added to: all paths add squares alike
}

// As above, 16 neighbouring lanes for the 16 elements of a tile; every lane of the warp takes part.
__device__ __forceinline__ void put_tile(const Table& table, bool valid, int row, int tile, float value, const float* norm) {
    const int lane = threadIdx.x & 15;
    float square = valid ? put_hidden(table, row, tile * 16 + lane, value, norm) : 0.0f;
    square += __shfl_xor_sync(~0u, square, 8);
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    square += __shfl_xor_sync(~0u, square, 4);
    if (valid && lane == 0) table.squares[u64(row) * HIDDEN_TILES + tile] = square;
}

// The sum of a tile's splits in their order, as a fragment.
__device__ __forceinline__ float4 sum_splits(const float4* parts, int splits, int n) {
    const int lane = threadIdx.x & 31;
    float4 sum = parts[n * 32 + lane];
    for (int s = 1; s < splits; ++s) {
        const float4 part = parts[s * COLUMN_TILES * 32 + n * 32 + lane];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
}

// Runs all tiles of a stage: `work(index, layer, columns)` names layer, tile and columns of work item `index`, and `finish(index, n,
// parts, splits)` gets each column tile of it. Splits of a tile are warps of one block. `ready()` is called once the first weights are
// on their way: what `work` says must not depend on what it waits for.
template <int WIDTHS, class Work, class Ready, class Finish>
__device__ __forceinline__ void for_tiles(int num_items, const Splits& splits, Work work, Ready ready, Finish finish) {
    const int warp = threadIdx.x >> 5, at_once = WARPS / splits.count;
    const int slot = warp / splits.count, first = warp % splits.count * splits.length, left = splits.units - first;
    const int count = left < splits.length ? left : splits.length;
    AnySplit<WIDTHS> split;
    Linear w;
    Columns x;
    u64 base = 0;
    int item = blockIdx.x + gridDim.x * slot;
    const auto start = [&] {
        if (slot >= at_once || item >= num_items) return;
        base = work(item, w, x) * splits.units + first;
        split.load(w, base, count);
    };
    start();
    ready();
    int buffer = 0;
    for (int round = 0; blockIdx.x + gridDim.x * (round * at_once) < num_items; ++round, buffer ^= 1) {
        if (slot < at_once && item < num_items) split.product(w, base, first, count, x, small().parts[buffer][warp]);
        item += gridDim.x * at_once;
        start();
        __syncthreads();
        for (int job = warp; job < at_once * COLUMN_TILES; job += WARPS) {
            const int done = blockIdx.x + gridDim.x * (round * at_once + job / COLUMN_TILES);
            if (done < num_items)
                finish(done, job % COLUMN_TILES, small().parts[buffer][(job / COLUMN_TILES) * splits.count], splits.count);
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void row_columns(Columns& x, const bf16* inputs, int width, int rows) {
    const int column = (threadIdx.x & 31) >> 2;
    x.inputs = inputs, x.width = width, x.tiles = (rows + 7) / 8;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
        x.row[n] = n * 8 + column < rows ? n * 8 + column : 0;
        asm volatile("" : "+r"(x.row[n])); // else the compiler keeps an address for each unit and runs out of registers
    }
}

// Calls put(row, output, value) for the valid elements of a fragment: outputs g and g + 8, columns 2t and 2t + 1.
template <class Put> __device__ __forceinline__ void each(const float4& c, int n, int rows, Put put) {
    const int lane = threadIdx.x & 31, g = lane >> 2, row = n * 8 + (lane & 3) * 2;
    if (row < rows) put(row, g, c.x), put(row, g + 8, c.z);
    if (row + 1 < rows) put(row + 1, g, c.y), put(row + 1, g + 8, c.w);
}

LH_STAGE void qkv_small(const Table& table, const Layer& layer, Step step, Grid& grid) {
    constexpr int Q_TILES = Q_ROWS / 16, KV_TILES = KV_ROWS / 16;
    for_tiles<LH_ATTENTION_WIDTHS>(
        QKV_ROWS / 16, Splits(HIDDEN, LONG_SPLIT),
        [&](int item, Linear& w, Columns& x) -> u64 {
            row_columns(x, table.normed, HIDDEN, step.rows);
            w = item < Q_TILES ? layer.q : item < Q_TILES + KV_TILES ? layer.k : layer.v;
            return item < Q_TILES ? item : (item - Q_TILES) % KV_TILES;
        },
        [&] { grid.barrier(), load_inverses(table, nullptr, step.rows), __syncthreads(); },
        [&](int item, int n, const float4* parts, int splits) {
            if (n * 8 >= step.rows) return;
            each(sum_splits(parts, splits, n), n, step.rows, [&](int row, int output, float value) {
                table.qkv[u64(row) * QKV_ROWS + item * 16 + output] = value * small().inverse[row];
            });
        });
}

LH_STAGE void out_proj_small(const Table& table, const Layer& layer, Step step, Grid& grid) {
    for_tiles<LH_ATTENTION_WIDTHS>(
        HIDDEN_TILES, Splits(Q_ROWS, LONG_SPLIT),
        [&](int item, Linear& w, Columns& x) -> u64 {
            row_columns(x, table.attended, Q_ROWS, step.rows);
            w = layer.o;
            return item;
        },
        [&] { grid.barrier(); },
        [&](int item, int n, const float4* parts, int splits) {
            if (n * 8 >= step.rows) return;
            const float4 c = sum_splits(parts, splits, n);
            const int lane = threadIdx.x & 31, g = lane >> 2, row = n * 8 + (lane & 3) * 2, at = item * 16 + g;
            const float values[2][2] = {{c.x, c.z}, {c.y, c.w}};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float square = 0.0f;
                if (row + i < step.rows) {
                    const float* old = table.hidden + u64(row + i) * HIDDEN + at;
                    const float first = old[0] + values[i][0], second = old[8] + values[i][1];
                    square = put_hidden(table, row + i, at, first, layer.post_norm);
                    square += put_hidden(table, row + i, at + 8, second, layer.post_norm);
                }
                square += __shfl_xor_sync(~0u, square, 4);
                square += __shfl_xor_sync(~0u, square, 8);
                square += __shfl_xor_sync(~0u, square, 16);
                if (row + i < step.rows && g == 0) table.squares[u64(row + i) * HIDDEN_TILES + item] = square;
            }
        });
}

LH_STAGE void router_small(const Table& table, const Layer& layer, Step step, Grid& grid) {
    for_tiles<LH_ROUTER_WIDTHS>(
        (EXPERTS + 15) / 16, Splits(HIDDEN, ROUTER_SPLIT),
        [&](int item, Linear& w, Columns& x) -> u64 {
            row_columns(x, table.normed, HIDDEN, step.rows);
            w = layer.router;
            return item;
        },
        [&] { grid.barrier(), load_inverses(table, nullptr, step.rows), __syncthreads(); },
        [&](int item, int n, const float4* parts, int splits) {
            if (n * 8 >= step.rows) return;
            each(sum_splits(parts, splits, n), n, step.rows, [&](int row, int output, float value) {
                if (item * 16 + output < EXPERTS)
                    table.router[u64(row) * EXPERTS + item * 16 + output] = value * small().inverse[row];
            });
        });
}

// Logits of sample rows [from, from + rows), at most SMALL_ROWS.
LH_STAGE void head_small(const Table& table, Step step, int from, int rows) {
    const int* ids = step.array(AT_SAMPLE_ROWS) + from;
    for_tiles<LH_HEAD_WIDTHS>(
        (VOCAB + 15) / 16, Splits(HIDDEN, LONG_SPLIT),
        [&](int item, Linear& w, Columns& x) -> u64 {
            row_columns(x, table.normed, HIDDEN, rows);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) x.row[n] = ids[x.row[n]];
            w = table.head;
            return item;
        },
        [&] { load_inverses(table, ids, rows), __syncthreads(); },
        [&](int item, int n, const float4* parts, int splits) {
            if (n * 8 >= rows) return;
            each(sum_splits(parts, splits, n), n, rows, [&](int row, int output, float value) {
                if (item * 16 + output < VOCAB)
                    table.logits[u64(from + row) * VOCAB + item * 16 + output] = value * small().inverse[row];
            });
        });
}

} // namespace lh
