// Dense layers of a large step: blocks of 256 outputs by 64 rows, the rows' inputs in shared memory, the same order of sums as in a
// small step.
namespace lh {

constexpr int BLOCK_ROWS = 64, BLOCK_TILES = BLOCK_ROWS / 8, STAGE_UNITS = 2, STAGES = 3;
constexpr int STAGE_CHUNKS = STAGE_UNITS * 8; // of 16 bytes, of one row
constexpr int STAGE_BYTES = BLOCK_ROWS * STAGE_CHUNKS * 16;

struct LargeShared {
    int rows[BLOCK_ROWS]; // of the inputs; the last valid one again where there are fewer
    alignas(128) char stages[STAGES][STAGE_BYTES];
    float4 totals[WARPS][BLOCK_TILES][32]; // of the splits before: registers are for the present one
};

__device__ __forceinline__ LargeShared& large() { return *reinterpret_cast<LargeShared*>(turns()); }

// Rows lie 256 bytes apart; odd ones are swizzled so that eight threads read eight different chunks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return (row * STAGE_CHUNKS + (chunk ^ ((row & 1) << 2))) * 16; }

// Starts the copy of one stage: units [unit, unit + STAGE_UNITS) of all rows.
template <int TILES> __device__ __forceinline__ void fetch_stage(const bf16* inputs, int width, int units, int stage) {
    const int first = stage * STAGE_UNITS;
    char* to = large().stages[stage % STAGES];
    for (int i = threadIdx.x; i < TILES * 8 * STAGE_CHUNKS; i += THREADS) {
        const int row = i / STAGE_CHUNKS, chunk = i % STAGE_CHUNKS;
        if (first + chunk / 8 < units) {
            const bf16* from = inputs + u64(large().rows[row]) * width + first * UNIT + chunk * 8;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to + chunk_at(row, chunk)))),
                         "l"(from)
                         : "memory");
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// One unit's product for a warp's tile with `TILES` column tiles. Neighbouring products have accumulators of their own.
template <int BITS, int TILES>
__device__ __forceinline__ void block_unit(const Raw<BITS>& raw, const char* stage, int unit, float (&c)[TILES][4]) {
    constexpr int AT_ONCE = TILES < 4 ? TILES : 4;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int span = 0; span < 2; ++span) {
        u32 a[2][4];
        fragments<BITS>(raw, span, a);
        const char* from = stage + chunk_at(g, unit * 8 + span * 4 + t);
#pragma unroll
        for (int n = 0; n < TILES; n += AT_ONCE) {
            uint4 b[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) b[i] = *reinterpret_cast<const uint4*>(from + (n + i) * 8 * STAGE_CHUNKS * 16);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) mma(c[n + i], a[0], b[i].x, b[i].y);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) mma(c[n + i], a[1], b[i].z, b[i].w);
        }
    }
}

// Adds a split's sum to the total, which is left in shared memory.
template <int TILES> __device__ __forceinline__ void end_block_split(const float (&sum)[TILES][4], bool is_first) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        float4& at = large().totals[warp][n][lane];
        float4 total = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
        if (!is_first) {
            const float4 before = at;
            total = make_float4(before.x + total.x, before.y + total.y, before.z + total.z, before.w + total.w);
        }
        at = total;
    }
}

// All inputs of one block: each warp has tile `tile`, or none when that is negative. The totals are left in shared memory.
template <int BITS, int TILES>
__device__ __forceinline__ void block_sums(const Linear& w, long long tile, const Splits& splits, const bf16* inputs, int width) {
    float sum[TILES][4] = {};
    const int num_stages = (splits.units + STAGE_UNITS - 1) / STAGE_UNITS;
    const u64 base = u64(tile < 0 ? 0 : tile) * splits.units;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < num_stages) fetch_stage<TILES>(inputs, width, splits.units, i);
        else asm volatile("cp.async.commit_group;" ::: "memory");
    }
    Raw<BITS> next = load_unit<BITS>(w, base);
    int left = splits.length; // units of this split
    bool is_first = true;
    for (int stage = 0; stage < num_stages; ++stage) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        if (stage + STAGES - 1 < num_stages) fetch_stage<TILES>(inputs, width, splits.units, stage + STAGES - 1);
        else asm volatile("cp.async.commit_group;" ::: "memory");
#pragma unroll
        for (int i = 0; i < STAGE_UNITS; ++i) {
            const int unit = stage * STAGE_UNITS + i;
            if (unit >= splits.units || tile < 0) break;
            const Raw<BITS> raw = next;
            if (unit + 1 < splits.units) next = load_unit<BITS>(w, base + unit + 1);
            block_unit<BITS, TILES>(raw, large().stages[stage % STAGES], i, sum);
            if (--left == 0 || unit + 1 == splits.units) {
                end_block_split<TILES>(sum, is_first);
#pragma unroll
                for (int n = 0; n < TILES; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
                is_first = false, left = splits.length;
            }
        }
    }
    __syncthreads();
}

// As above, for any width and number of column tiles; `put(n, fragment)` gets each column tile.
template <int WIDTHS, class Put>
__device__ __forceinline__ void block_product_any(const Linear& w, long long tile, const Splits& splits, const bf16* inputs, int width,
                                                  int tiles, Put put) {
    if constexpr (WIDTHS & (WIDTHS - 1)) {
        constexpr int LOWEST = WIDTHS & -WIDTHS;
        if (w.bits == LOWEST) block_product_any<LOWEST>(w, tile, splits, inputs, width, tiles, put);
        else block_product_any<WIDTHS - LOWEST>(w, tile, splits, inputs, width, tiles, put);
    } else {
        if (tiles <= 2) block_sums<WIDTHS, 2>(w, tile, splits, inputs, width);
        else if (tiles <= 4) block_sums<WIDTHS, 4>(w, tile, splits, inputs, width);
        else block_sums<WIDTHS, 8>(w, tile, splits, inputs, width);
        if (tile >= 0)
            for (int n = 0; n < tiles; ++n) put(n, large().totals[threadIdx.x >> 5][n][threadIdx.x & 31]);
    }
}

// How many rows the blocks of a layer take: few where that occupies more of the GPU, for weights are unpacked once for all of them.
__device__ __forceinline__ int rows_of_blocks(int blocks_m, int rows) {
    constexpr int UNPACKING = 24; // what that takes, in rows
    int best = BLOCK_ROWS, least = 0x7FFFFFFF;
#pragma unroll
    for (int each = BLOCK_ROWS; each >= 16; each /= 2) {
        const int waves = (blocks_m * ((rows + each - 1) / each) + int(gridDim.x) - 1) / int(gridDim.x);
        if (waves * (each + UNPACKING) < least) least = waves * (each + UNPACKING), best = each;
    }
    return best;
}

// A layer of `tiles_m` tiles for all rows. Warps of one block have the same layer: `pick` names it and the tile in it for a block of
// 16 tiles, whose q, k and v are padded to whole blocks by the caller.
template <int WIDTHS, class Pick, class Put>
__device__ __forceinline__ void dense_large(int blocks_m, int rows, const Splits& splits, const bf16* inputs, int width, Pick pick,
                                            Put put) {
    const int each_n = rows_of_blocks(blocks_m, rows), blocks_n = (rows + each_n - 1) / each_n;
    for (int item = blockIdx.x; item < blocks_m * blocks_n; item += gridDim.x) {
        const int from = item / blocks_m * each_n, count = rows - from < each_n ? rows - from : each_n;
        if (threadIdx.x < BLOCK_ROWS) large().rows[threadIdx.x] = from + (int(threadIdx.x) < count ? threadIdx.x : count - 1);
        __syncthreads();
        Linear w;
        int output;
        const long long tile = pick(item % blocks_m, w, output);
        block_product_any<WIDTHS>(w, tile, splits, inputs, width, (count + 7) / 8,
                                  [&](int n, const float4& c) { each(c, n, count, [&](int row, int at, float value) { put(from + row, output + at, value); }); });
    }
}

// The reciprocal root mean squares of all rows.
LH_STAGE void inverses_large(const Table& table, Step step) {
    for (int row = blockIdx.x + gridDim.x * (threadIdx.x >> 5); row < step.rows; row += gridDim.x * WARPS) {
        const float value = inverse_rms(table.squares, row);
        if ((threadIdx.x & 31) == 0) table.inverse[row] = value;
    }
}

LH_STAGE void qkv_large(const Table& table, const Layer& layer, Step step) {
    constexpr int Q_TILES = Q_ROWS / 16, KV_TILES = KV_ROWS / 16;
    constexpr int Q_BLOCKS = (Q_TILES + WARPS - 1) / WARPS, KV_BLOCKS = (KV_TILES + WARPS - 1) / WARPS;
    dense_large<LH_ATTENTION_WIDTHS>(
        Q_BLOCKS + 2 * KV_BLOCKS, step.rows, Splits(HIDDEN, LONG_SPLIT), table.normed, HIDDEN,
        [&](int block, Linear& w, int& output) -> long long {
            const int part = block < Q_BLOCKS ? 0 : 1 + (block - Q_BLOCKS) / KV_BLOCKS;
            const int tile = (part ? (block - Q_BLOCKS) % KV_BLOCKS : block) * WARPS + (threadIdx.x >> 5);
            w = part == 0 ? layer.q : part == 1 ? layer.k : layer.v;
            output = (part ? Q_ROWS + (part - 1) * KV_ROWS : 0) + tile * 16;
            return tile < (part ? KV_TILES : Q_TILES) ? tile : -1;
        },
        [&](int row, int output, float value) { table.qkv[u64(row) * QKV_ROWS + output] = value * table.inverse[row]; });
}

LH_STAGE void out_proj_large(const Table& table, const Layer& layer, Step step) {
    dense_large<LH_ATTENTION_WIDTHS>(
        (HIDDEN_TILES + WARPS - 1) / WARPS, step.rows, Splits(Q_ROWS, LONG_SPLIT), table.attended, Q_ROWS,
        [&](int block, Linear& w, int& output) -> long long {
            const int tile = block * WARPS + (threadIdx.x >> 5);
            w = layer.o, output = tile * 16;
            return tile < HIDDEN_TILES ? tile : -1;
        },
        [&](int row, int output, float value) { table.wide[u64(row) * HIDDEN + output] = value; });
}

LH_STAGE void router_large(const Table& table, const Layer& layer, Step step) {
    constexpr int TILES = (EXPERTS + 15) / 16;
    dense_large<LH_ROUTER_WIDTHS>(
        (TILES + WARPS - 1) / WARPS, step.rows, Splits(HIDDEN, ROUTER_SPLIT), table.normed, HIDDEN,
        [&](int block, Linear& w, int& output) -> long long {
            const int tile = block * WARPS + (threadIdx.x >> 5);
            w = layer.router, output = tile * 16;
            return tile < TILES ? tile : -1;
        },
        [&](int row, int output, float value) {
            if (output < EXPERTS) table.router[u64(row) * EXPERTS + output] = value * table.inverse[row];
        });
}

// hidden + wide, where wide is the output projection.
LH_STAGE void residual_large(const Table& table, const Layer& layer, Step step) {
    const u64 jobs = u64(step.rows) * HIDDEN;
    for (u64 from = u64(blockIdx.x) * THREADS; from < jobs; from += u64(gridDim.x) * THREADS) {
        const u64 job = from + threadIdx.x;
        const bool valid = job < jobs;
        put_tile(table, valid, int(job / HIDDEN), int(job % HIDDEN) / 16, valid ? table.hidden[job] + table.wide[job] : 0.0f,
                 layer.post_norm);
    }
}

} // namespace lh
