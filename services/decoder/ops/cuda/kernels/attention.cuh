// Rotary embedding, and attention of a small step over the pool in place and the step's own rows.
//
// Scores are summed over tiles of 32 keys and splits of 256 keys at fixed absolute positions. A tile has a maximum of its own, and
// tiles and splits are folded in their order, so a row's bits depend on its position and context alone.
namespace lh {

constexpr int TILE_KEYS = 32, SPLIT_KEYS = 256, SPLIT_TILES = SPLIT_KEYS / TILE_KEYS, GROUP_WARPS = 8;
constexpr int SPANS = HEAD_DIM / 32, DIM_TILES = HEAD_DIM / 16, ROW_CHUNKS = HEAD_DIM / 8; // of 16 bytes
constexpr int PART_FLOATS = 8 * HEAD_DIM + 16;                                             // of one split: outputs, maxima, sums
constexpr int ROW_BYTES = HEAD_DIM * int(sizeof(bf16));
constexpr float MASKED = -1e30f;

// Norm and rotation of q and k, rounding of k and v: a warp for each head of each row.
LH_STAGE void rope_rows(const Table& table, const Layer& layer, int index, Step step) {
    constexpr int JOBS = HEADS + 2 * KV_HEADS, PAIRS = HEAD_DIM / 64;
    const int lane = threadIdx.x & 31;
    for (int job = blockIdx.x + gridDim.x * (threadIdx.x >> 5); job < step.rows * JOBS; job += gridDim.x * WARPS) {
        const int row = job / JOBS, head = job % JOBS;
        const float* from = table.qkv + u64(row) * QKV_ROWS + head * HEAD_DIM;
        const bool is_q = head < HEADS, is_v = head >= HEADS + KV_HEADS;
        const int kv_head = is_v ? head - HEADS - KV_HEADS : head - HEADS;
        bf16* to = is_q ? table.q + (u64(row) * HEADS + head) * HEAD_DIM
                        : table.kv + ((u64(index) * step.rows + row) * 2 + is_v) * KV_ROWS + kv_head * HEAD_DIM;
        float low[PAIRS], high[PAIRS], square = 0.0f;
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            low[i] = from[i * 32 + lane], high[i] = from[i * 32 + lane + HEAD_DIM / 2];
            square = __fmaf_rn(low[i], low[i], __fmaf_rn(high[i], high[i], square));
        }
        if (!is_v) {
            const float* norm = is_q ? layer.q_norm : layer.k_norm;
            const float inverse = norm ? rsqrtf(__fmaf_rn(warp_sum(square), 1.0f / float(HEAD_DIM), float(LH_EPS))) : 1.0f;
            const float position = float(step.array(AT_POSITIONS)[row]);
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) {
                const int at = i * 32 + lane;
                float sine, cosine;
                sincosf(position * table.inv_freq[at], &sine, &cosine);
                sine *= float(LH_ROPE_FACTOR), cosine *= float(LH_ROPE_FACTOR);
                const float x = norm ? low[i] * inverse * norm[at] : low[i];
                const float y = norm ? high[i] * inverse * norm[at + HEAD_DIM / 2] : high[i];
                low[i] = __fmaf_rn(x, cosine, -__fmul_rn(y, sine)), high[i] = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
            }
        }
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            to[i * 32 + lane] = __float2bfloat16_rn(low[i]);
            to[i * 32 + lane + HEAD_DIM / 2] = __float2bfloat16_rn(high[i]);
        }
    }
}

// Where the keys of one row's sequence are, in the pool and among the step's own rows.
struct Keys {
    const char* pool;
    const char* own;  // K of the sequence's first row in this step
    const int* table;
    u64 stride;
    int block_size, context, token_bytes, value_bytes;
    __device__ __forceinline__ Keys(const Table& t, const Step& step, int layer, int row, int kv_head) {
        block_size = step.get(BLOCK_SIZE), context = step.array(AT_CONTEXTS)[row], stride = step.stride();
        table = step.array(AT_TABLES) + u64(step.array(AT_SEQS)[row]) * step.get(TABLE_WIDTH);
        pool = step.pool() + step.block_row(layer, 0, kv_head) * ROW_BYTES;
        token_bytes = step.get(TOKEN_ROWS) * ROW_BYTES, value_bytes = step.get(VALUE_ROWS) * ROW_BYTES;
        const int start = step.array(AT_STARTS)[row];
        own = reinterpret_cast<const char*>(t.kv + (u64(layer) * step.rows + start) * 2 * KV_ROWS + kv_head * HEAD_DIM);
    }
    __device__ __forceinline__ const char* key(int position) const {
        if (position >= context) return own + u64(position - context) * 2 * KV_ROWS * sizeof(bf16);
        return pool + table[position / block_size] * stride + (position % block_size) * token_bytes;
    }
    __device__ __forceinline__ u64 value_offset(int position) const { // from a key to its value
        return position >= context ? KV_ROWS * int(sizeof(bf16)) : value_bytes;
    }
};

__device__ __forceinline__ uint4 load16(const char* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Starts the copy of 32 values into shared memory; 16-byte chunks are swizzled so that reading columns meets no bank twice.
__device__ __forceinline__ void fetch_values(const Keys& keys, int first, int last, char* to) {
    constexpr int AT_ONCE = 32 / ROW_CHUNKS;
    const int lane = threadIdx.x & 31, position = first + lane < last ? first + lane : last;
    const u64 mine = reinterpret_cast<u64>(keys.key(position)) + keys.value_offset(position);
#pragma unroll
    for (int i = 0; i < TILE_KEYS / AT_ONCE; ++i) {
        const int key = i * AT_ONCE + lane / ROW_CHUNKS, chunk = lane % ROW_CHUNKS;
        const u64 from = __shfl_sync(~0u, mine, key) + chunk * 16;
        const u32 at = shared_address(to + key * HEAD_DIM * 2 + ((chunk ^ (key & 7)) * 16));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// The 16 x 16 tile of transposed values: dims on the m side, keys on the k side.
__device__ __forceinline__ void load_values(const char* values, int key_tile, int dim_tile, u32 (&a)[4]) {
    const int lane = threadIdx.x & 31, key = key_tile * 16 + (lane & 7) + (lane >> 4) * 8, chunk = dim_tile * 2 + ((lane >> 3) & 1);
    const u32 at = shared_address(values + key * HEAD_DIM * 2 + ((chunk ^ (key & 7)) * 16));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Scores of a tile become weights: masked, less their maximum, exponentiated. A thread has heads 2t and 2t + 1; `b` are the weights
// as columns for the product with the values.
__device__ __forceinline__ void tile_weights(float (&s)[2][4], int first, int low, int length, float (&top)[2], float (&sum)[2],
                                             u32 (&b)[2][2]) {
    const int g = (threadIdx.x & 31) >> 2;
    top[0] = top[1] = MASKED, sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int position = first + (i >> 2) * 16 + ((i >> 1) & 1) * 8 + g;
        float& score = s[i >> 2][i & 3];
        score = position < length && position >= low ? score * (float(LH_SCALE) * 1.44269504f) : MASKED;
        top[i & 1] = fmaxf(top[i & 1], score);
    }
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) {
        top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], m));
        top[1] = fmaxf(top[1], __shfl_xor_sync(~0u, top[1], m));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float& score = s[i >> 2][i & 3];
        score = score > MASKED ? exp2_fast(score - top[i & 1]) : 0.0f;
        sum[i & 1] += score;
    }
#pragma unroll
    for (int m = 4; m < 32; m <<= 1) {
        sum[0] += __shfl_xor_sync(~0u, sum[0], m);
        sum[1] += __shfl_xor_sync(~0u, sum[1], m);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        b[i][0] = transpose(pack(s[i][0], s[i][1]));
        b[i][1] = transpose(pack(s[i][2], s[i][3]));
    }
}

// (top, sum, o) of what came before, folded with the next; written out so that both paths round alike.
struct Fold {
    float before, after;
    __device__ __forceinline__ Fold(float& top, float& sum, float next_top, float next_sum) {
        const float highest = fmaxf(top, next_top);
        before = exp2_fast(top - highest), after = exp2_fast(next_top - highest);
        top = highest, sum = __fmaf_rn(next_sum, after, __fmul_rn(sum, before));
    }
    __device__ __forceinline__ void operator()(float& o, float next) const {
        o = __fmaf_rn(next, after, __fmul_rn(o, before));
    }
};

struct AttentionShared {
    char values[2][GROUP_WARPS][TILE_KEYS * HEAD_DIM * 2]; // later the tile's outputs, 8 heads in fragments
    float tops[2][SPLIT_TILES][8], sums[2][SPLIT_TILES][8];
    int is_last[2];
};

static_assert(TURNS_AT + sizeof(AttentionShared) <= LH_SHARED_BYTES, "");
static_assert(TABLE_BYTES + sizeof(SmallShared) <= LH_SHARED_BYTES, "");

__device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(GROUP_WARPS * 32) : "memory");
}

// One tile of 32 keys by one warp, left in shared memory.
__device__ __forceinline__ void attend_tile(const Table& table, const Keys& keys, int row, int kv_head, int first, int low, int length,
                                            char* values, float* tops, float* sums) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    fetch_values(keys, first, length - 1, values);
    const char* q = reinterpret_cast<const char*>(table.q + (u64(row) * HEADS + kv_head * GQA + g) * HEAD_DIM) + t * 16;
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int position = first + i * 16 + g;
        const char* k0 = keys.key(position < length ? position : length - 1) + t * 16;
        const char* k1 = keys.key(position + 8 < length ? position + 8 : length - 1) + t * 16;
#pragma unroll
        for (int span = 0; span < SPANS; ++span) {
            const uint4 x = load16(k0 + span * 64), y = load16(k1 + span * 64);
            const uint4 b = g < GQA ? load16(q + span * 64) : make_uint4(0, 0, 0, 0);
            const u32 a0[4] = {x.x, y.x, x.y, y.y}, a1[4] = {x.z, y.z, x.w, y.w};
            mma(s[i], a0, b.x, b.y);
            mma(s[i], a1, b.z, b.w);
        }
    }
    float top[2], sum[2];
    u32 b[2][2];
    tile_weights(s, first, low, length, top, sum, b);
    if (g == 0) {
        tops[t * 2] = top[0], tops[t * 2 + 1] = top[1];
        sums[t * 2] = sum[0], sums[t * 2 + 1] = sum[1];
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
    float o[DIM_TILES][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int dim = 0; dim < DIM_TILES; ++dim) {
            u32 a[4];
            load_values(values, i, dim, a);
            mma(o[dim], a, b[i][0], b[i][1]);
        }
    __syncwarp();
#pragma unroll
    for (int dim = 0; dim < DIM_TILES; ++dim)
        reinterpret_cast<float4*>(values)[dim * 32 + lane] = make_float4(o[dim][0], o[dim][1], o[dim][2], o[dim][3]);
}

// Outputs dims g and g + 8 of heads 2t and 2t + 1, as the next layer's input.
__device__ __forceinline__ void put_attended(const Table& table, int row, int kv_head, int dim, const float (&o)[4], const float (&sum)[2]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, head = (lane & 3) * 2;
    bf16* to = table.attended + u64(row) * Q_ROWS;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int h = head + (i & 1), at = (kv_head * GQA + h) * HEAD_DIM + dim * 16 + g + (i >> 1) * 8;
        if (h < GQA) to[shuffled(at)] = __float2bfloat16_rn(o[i] / sum[i & 1]);
    }
}

// One split of one row and K/V head by a group of 8 warps; the group that ends last folds the splits.
__device__ __forceinline__ void attend_split(const Table& table, const Step& step, int layer, int row, int kv_head, int split) {
    AttentionShared& shared = *reinterpret_cast<AttentionShared*>(turns());
    const int warp = threadIdx.x >> 5, group = warp / GROUP_WARPS, mine = warp % GROUP_WARPS, lane = threadIdx.x & 31;
    const int length = step.array(AT_POSITIONS)[row] + 1, low = WINDOW && length > WINDOW ? length - WINDOW : 0;
    const int first_split = low / SPLIT_KEYS, splits = (length - 1) / SPLIT_KEYS + 1 - first_split;
    if (split < first_split || split >= first_split + splits) return;
    const Keys keys(table, step, layer, row, kv_head);
    const int first = split * SPLIT_KEYS, left = (length - first + TILE_KEYS - 1) / TILE_KEYS;
    const int tiles = left < SPLIT_TILES ? left : SPLIT_TILES;
    if (mine < tiles)
        attend_tile(table, keys, row, kv_head, first + mine * TILE_KEYS, low, length, shared.values[group][mine],
                    shared.tops[group][mine], shared.sums[group][mine]);
    group_sync(group);
    const int head = (lane & 3) * 2;
    float top[2] = {MASKED, MASKED}, sum[2] = {0.0f, 0.0f}, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const bool folds = mine < DIM_TILES;
    for (int j = 0; folds && j < tiles; ++j) {
        const float4 next = reinterpret_cast<const float4*>(shared.values[group][j])[mine * 32 + lane];
        const Fold a(top[0], sum[0], shared.tops[group][j][head], shared.sums[group][j][head]);
        const Fold b(top[1], sum[1], shared.tops[group][j][head + 1], shared.sums[group][j][head + 1]);
        a(o[0], next.x), b(o[1], next.y), a(o[2], next.z), b(o[3], next.w);
    }
    if (splits == 1) {
        if (folds) put_attended(table, row, kv_head, mine, o, sum);
        group_sync(group);
        return;
    }
    float* parts = table.parts + u64(row * KV_HEADS + kv_head) * step.get(MAX_SPLITS) * PART_FLOATS;
    float* part = parts + u64(split) * PART_FLOATS;
    if (folds) reinterpret_cast<float4*>(part)[mine * 32 + lane] = make_float4(o[0], o[1], o[2], o[3]);
    if (mine == 0 && lane < 4) {
        float* at = part + 8 * HEAD_DIM + head;
        at[0] = top[0], at[1] = top[1], at[8] = sum[0], at[9] = sum[1];
    }
    __threadfence();
    group_sync(group);
    if (threadIdx.x % (GROUP_WARPS * 32) == 0) {
        u32* arrivals = table.arrivals + row * KV_HEADS + kv_head;
        shared.is_last[group] = atomicAdd(arrivals, 1) == u32(splits - 1);
        if (shared.is_last[group]) *arrivals = 0;
        __threadfence();
    }
    group_sync(group);
    if (shared.is_last[group] && folds) {
        top[0] = top[1] = MASKED, sum[0] = sum[1] = o[0] = o[1] = o[2] = o[3] = 0.0f;
        for (int i = first_split; i < first_split + splits; ++i) {
            const float* from = parts + u64(i) * PART_FLOATS;
            const float4 next = __ldcg(reinterpret_cast<const float4*>(from) + mine * 32 + lane);
            const float* at = from + 8 * HEAD_DIM + head;
            const Fold a(top[0], sum[0], __ldcg(at), __ldcg(at + 8)), b(top[1], sum[1], __ldcg(at + 1), __ldcg(at + 9));
            a(o[0], next.x), b(o[1], next.y), a(o[2], next.z), b(o[3], next.w);
        }
        put_attended(table, row, kv_head, mine, o, sum);
    }
    group_sync(group);
}

LH_STAGE void attention_small(const Table& table, Step step, int layer) {
    const int group = threadIdx.x / (GROUP_WARPS * 32), pairs = step.rows * KV_HEADS;
    for (int item = blockIdx.x + gridDim.x * group; item < pairs * step.get(MAX_SPLITS); item += gridDim.x * 2)
        attend_split(table, step, layer, item % pairs / KV_HEADS, item % KV_HEADS, item / pairs);
    __syncthreads();
}

} // namespace lh
