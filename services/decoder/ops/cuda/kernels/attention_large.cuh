// Attention of a large step: 16 rows of one sequence share tiles of keys and values in shared memory, a row a warp. The sums are
// those of attention.cuh: tile by tile within a split, split by split.
namespace lh {

constexpr int WINDOW_ROWS = 16, WARP_ROWS = WINDOW_ROWS / WARPS;

struct WindowShared {
    char keys[2][TILE_KEYS * HEAD_DIM * 2], values[2][TILE_KEYS * HEAD_DIM * 2];
    float4 totals[WARPS][WARP_ROWS][DIM_TILES * 32];
    float2 tops[WARPS][WARP_ROWS][32], sums[WARPS][WARP_ROWS][32];
};
static_assert(TURNS_AT + sizeof(WindowShared) <= LH_SHARED_BYTES, "");

__device__ __forceinline__ int key_chunk(int key, int chunk) { return key * HEAD_DIM * 2 + ((chunk ^ ((key & 1) << 2)) * 16); }

// Starts the copy of a tile's keys and values by the whole block.
__device__ __forceinline__ void fetch_tile(WindowShared& shared, const Keys& keys, int tile, int last) {
    const int buffer = tile & 1;
    for (int i = threadIdx.x; i < TILE_KEYS * ROW_CHUNKS; i += THREADS) {
        const int key = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        const int position = tile * TILE_KEYS + key < last ? tile * TILE_KEYS + key : last;
        const char* from = keys.key(position) + chunk * 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared.keys[buffer] + key_chunk(key, chunk))),
                     "l"(from) : "memory");
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         shared_address(shared.values[buffer] + key * HEAD_DIM * 2 + ((chunk ^ (key & 7)) * 16))),
                     "l"(from + keys.value_offset(position)) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// What a warp knows of one of its rows: the fold of the present split. That of earlier splits is in shared memory.
struct RowState {
    float top[2], sum[2];
    float o[DIM_TILES][4];
};

__device__ __forceinline__ void clear_split(RowState& state) {
    state.top[0] = state.top[1] = MASKED, state.sum[0] = state.sum[1] = 0.0f;
#pragma unroll
    for (int dim = 0; dim < DIM_TILES; ++dim) state.o[dim][0] = state.o[dim][1] = state.o[dim][2] = state.o[dim][3] = 0.0f;
}

__device__ __forceinline__ void window_tile(const WindowShared& shared, int tile, const char* q, int length, RowState& state) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, buffer = tile & 1;
    float s[2][4] = {};
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
        const uint4 b = g < GQA ? load16(q + span * 64) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4 x = load16(shared.keys[buffer] + key_chunk(i * 16 + g, span * 4 + t));
            const uint4 y = load16(shared.keys[buffer] + key_chunk(i * 16 + g + 8, span * 4 + t));
            const u32 a0[4] = {x.x, y.x, x.y, y.y}, a1[4] = {x.z, y.z, x.w, y.w};
            mma(s[i], a0, b.x, b.y);
            mma(s[i], a1, b.z, b.w);
        }
    }
    float top[2], sum[2];
    u32 b[2][2];
    tile_weights(s, tile * TILE_KEYS, WINDOW && length > WINDOW ? length - WINDOW : 0, length, top, sum, b);
    const Fold first(state.top[0], state.sum[0], top[0], sum[0]), second(state.top[1], state.sum[1], top[1], sum[1]);
#pragma unroll
    for (int dim = 0; dim < DIM_TILES; ++dim) {
        float next[4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 a[4];
            load_values(shared.values[buffer], i, dim, a);
            mma(next, a, b[i][0], b[i][1]);
        }
        first(state.o[dim][0], next[0]), second(state.o[dim][1], next[1]);
        first(state.o[dim][2], next[2]), second(state.o[dim][3], next[3]);
    }
}

// Folds a finished split into the total of row `r` of this warp.
__device__ __forceinline__ void end_split(const RowState& state, WindowShared& shared, int r, bool is_first) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float2 top = make_float2(MASKED, MASKED), sum = make_float2(0.0f, 0.0f);
    if (!is_first) top = shared.tops[warp][r][lane], sum = shared.sums[warp][r][lane];
    const Fold a(top.x, sum.x, state.top[0], state.sum[0]), b(top.y, sum.y, state.top[1], state.sum[1]);
    shared.tops[warp][r][lane] = top, shared.sums[warp][r][lane] = sum;
#pragma unroll
    for (int dim = 0; dim < DIM_TILES; ++dim) {
        float4& at = shared.totals[warp][r][dim * 32 + lane];
        float4 total = is_first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : at;
        a(total.x, state.o[dim][0]), b(total.y, state.o[dim][1]), a(total.z, state.o[dim][2]), b(total.w, state.o[dim][3]);
        at = total;
    }
}

// Rows [from, from + count) of one sequence, count at most WINDOW_ROWS.
__device__ __forceinline__ void attend_window(const Table& table, const Step& step, int layer, int from, int count, int kv_head) {
    WindowShared& shared = *reinterpret_cast<WindowShared*>(turns());
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const Keys keys(table, step, layer, from, kv_head);
    // Rows of a sequence follow each other; those past the last one repeat work that nobody reads.
    const int shortest = step.array(AT_POSITIONS)[from] + 1, longest = shortest + count - 1;
    const int low = WINDOW && shortest > WINDOW ? shortest - WINDOW : 0;
    const int first_tile = low / SPLIT_KEYS * SPLIT_TILES, tiles = (longest + TILE_KEYS - 1) / TILE_KEYS;
    const int mine = warp * WARP_ROWS + WARP_ROWS <= count ? warp * WARP_ROWS : count > WARP_ROWS ? count - WARP_ROWS : 0;
    const char* q = reinterpret_cast<const char*>(table.q + (u64(from + mine) * HEADS + kv_head * GQA + g) * HEAD_DIM) + t * 16;
    RowState state[WARP_ROWS];
    fetch_tile(shared, keys, first_tile, longest - 1);
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) clear_split(state[r]);
    for (int tile = first_tile; tile < tiles; ++tile) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        if (tile + 1 < tiles) fetch_tile(shared, keys, tile + 1, longest - 1);
#pragma unroll
        for (int r = 0; r < WARP_ROWS; ++r) {
            const int row = r < count ? r : 0;
            window_tile(shared, tile, q + row * HEADS * HEAD_DIM * 2, shortest + mine + row, state[r]);
            asm volatile("" ::: "memory"); // one row after the other: their registers do not fit side by side
        }
        if (tile % SPLIT_TILES == SPLIT_TILES - 1 || tile + 1 == tiles) {
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) {
                end_split(state[r], shared, r, tile / SPLIT_TILES == first_tile / SPLIT_TILES);
                clear_split(state[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) {
        if (warp * WARP_ROWS >= count || mine + r >= count) break;
        const float sum[2] = {shared.sums[warp][r][lane].x, shared.sums[warp][r][lane].y};
#pragma unroll
        for (int dim = 0; dim < DIM_TILES; ++dim) {
            const float4 total = shared.totals[warp][r][dim * 32 + lane];
            const float o[4] = {total.x, total.y, total.z, total.w};
            put_attended(table, from + mine + r, kv_head, dim, o, sum);
        }
    }
    __syncthreads();
}

// Blocks take windows of 16 rows, the last (which have the longest contexts) first; one that holds rows of several sequences is done
// sequence by sequence.
LH_STAGE void attention_large(const Table& table, Step step, int layer) {
    const int windows = (step.rows + WINDOW_ROWS - 1) / WINDOW_ROWS;
    const int* seqs = step.array(AT_SEQS);
    for (int item = blockIdx.x; item < windows * KV_HEADS; item += gridDim.x) {
        int from = (windows - 1 - item / KV_HEADS) * WINDOW_ROWS;
        const int end = from + WINDOW_ROWS < step.rows ? from + WINDOW_ROWS : step.rows;
        while (from < end) {
            int count = 1;
            while (from + count < end && seqs[from + count] == seqs[from]) ++count;
            attend_window(table, step, layer, from, count, item % KV_HEADS);
            from += count;
        }
    }
    __syncthreads();
}

} // namespace lh
