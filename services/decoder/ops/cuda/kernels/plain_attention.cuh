// Rotary embedding and attention of the plain kernels, over the pool in place and the step's own rows.
//
// A warp has one head of one row. Keys are taken in tiles of 32 within splits of 256 at fixed absolute positions, each split with a sum
// of its own; splits are folded in their order. Few rows spread their splits over the GPU, many do not: the bits are the same.
namespace lh {

constexpr int PLAIN_SPLIT = 256, PLAIN_DIMS = 8; // keys; head_dim is at most 32 * PLAIN_DIMS
constexpr float PLAIN_MASKED = -1e30f;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrowed(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrowed(float x, bf16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrowed(float x, __half* to) { *to = __float2half_rn(x); }

// Four neighbours.
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
template <class T> __device__ __forceinline__ float4 load4(const T* from) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const T* x = reinterpret_cast<const T*>(&words);
    return make_float4(widened(x[0]), widened(x[1]), widened(x[2]), widened(x[3]));
}

// Norm and rotation of q and k, rounding of k and v: a warp for each head of each row. Angles are computed in double, so that they are
// as good at position 40,000 as at 4.
template <class T> __device__ __noinline__ void plain_rope(const Plain& p, const PlainLayer& layer, int index) {
    const int lane = threadIdx.x & 31, jobs = p.heads + 2 * p.kv_heads, half = p.dim / 2;
    for (int job = p.first_job(); job < p.rows * jobs; job += p.stride()) {
        const int row = job / jobs, head = job % jobs;
        const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
        const float* from = p.t.qkv + u64(row) * jobs * p.dim + head * p.dim;
        const int kv_head = head - p.heads - (is_v ? p.kv_heads : 0);
        float* q = p.t.q + u64(row) * p.q_size + head * p.dim;
        T* kv = reinterpret_cast<T*>(p.t.kv) + ((u64(index) * p.rows + row) * 2 + is_v) * p.kv_size + kv_head * p.dim;
        const float* norm = is_v ? nullptr : is_q ? layer.q_norm : layer.k_norm;
        float inverse = 1.0f;
        if (norm) {
            float sum = 0.0f;
            for (int i = lane; i < p.dim; i += 32) sum = __fmaf_rn(from[i], from[i], sum);
            inverse = 1.0f / sqrtf(warp_sum(sum) / float(p.dim) + float(p.t.eps));
        }
        const double position = p.step.array(AT_POSITIONS)[row];
        for (int i = lane; i < half; i += 32) {
            float low = from[i], high = from[i + half];
            if (norm) low = low * inverse * norm[i], high = high * inverse * norm[i + half];
            if (!is_v) {
                double sine, cosine;
                sincos(position * double(p.t.inv_freq[i]), &sine, &cosine);
                const float s = float(sine * p.t.rope_factor), c = float(cosine * p.t.rope_factor), x = low, y = high;
                low = __fmaf_rn(x, c, -__fmul_rn(y, s)), high = __fmaf_rn(y, c, __fmul_rn(x, s));
            }
            if (is_q) q[i] = low, q[i + half] = high;
            else narrowed(low, kv + i), narrowed(high, kv + i + half);
        }
    }
}

// Where the keys of a row's sequence are.
template <class T> struct PlainKeys {
    const char* pool;
    const T* own;
    const int* table;
    u64 stride, value_bytes;
    int block_size, context, token, own_stride, own_value;
    __device__ __forceinline__ PlainKeys(const Plain& p, int layer, int row, int kv_head) {
        block_size = p.step.get(BLOCK_SIZE), context = p.step.array(AT_CONTEXTS)[row], stride = p.step.stride();
        const int dim = p.dim;
        table = p.step.array(AT_TABLES) + u64(p.step.array(AT_SEQS)[row]) * p.step.get(TABLE_WIDTH);
        pool = p.step.pool() + p.step.block_row(layer, 0, kv_head) * dim * sizeof(T);
        token = p.step.get(TOKEN_ROWS) * dim, value_bytes = u64(p.step.get(VALUE_ROWS)) * dim * sizeof(T);
        own_stride = 2 * p.kv_size, own_value = p.kv_size;
        own = reinterpret_cast<const T*>(p.t.kv) + (u64(layer) * p.rows + p.step.array(AT_STARTS)[row]) * own_stride + kv_head * dim;
    }
    __device__ __forceinline__ const T* key(int position) const {
        if (position >= context) return own + u64(position - context) * own_stride;
        return reinterpret_cast<const T*>(pool + table[position / block_size] * stride) + u64(position % block_size) * token;
    }
    __device__ __forceinline__ const T* value(const T* key, int position) const {
        return position >= context ? key + own_value : reinterpret_cast<const T*>(reinterpret_cast<const char*>(key) + value_bytes);
    }
};

// (top, sum, out) of some keys; a lane has dims lane, lane + 32, ... of `out`.
struct PlainSums {
    float top, sum, out[PLAIN_DIMS];
    __device__ __forceinline__ PlainSums() : top(PLAIN_MASKED), sum(0.0f), out{} {}
    // Adds what comes after.
    __device__ __forceinline__ void fold(float next_top, float next_sum, const float (&next)[PLAIN_DIMS]) {
        const float highest = fmaxf(top, next_top), before = expf(top - highest), after = expf(next_top - highest);
        top = highest, sum = __fmaf_rn(next_sum, after, __fmul_rn(sum, before));
#pragma unroll
        for (int i = 0; i < PLAIN_DIMS; ++i) out[i] = __fmaf_rn(next[i], after, __fmul_rn(out[i], before));
    }
};

template <class T>
__device__ __forceinline__ PlainSums plain_split(const Plain& p, const PlainKeys<T>& keys, const float* q, int split, int low, int length) {
    const int lane = threadIdx.x & 31, first = split * PLAIN_SPLIT;
    const int end = first + PLAIN_SPLIT < length ? first + PLAIN_SPLIT : length;
    PlainSums all;
    for (int tile = first; tile < end; tile += 32) {
        const int position = tile + lane;
        const bool seen = position < end && position >= low;
        const T* key = keys.key(position < end ? position : end - 1);
        float score = 0.0f;
#pragma unroll 4
        for (int d = 0; d < p.dim; d += 4) {
            const float4 x = load4(q + d), y = load4(key + d);
            score = __fmaf_rn(x.w, y.w, __fmaf_rn(x.z, y.z, __fmaf_rn(x.y, y.y, __fmaf_rn(x.x, y.x, score))));
        }
        score = seen ? score * float(p.t.scale) : PLAIN_MASKED;
        float top = score;
        for (int m = 16; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
        const float weight = seen ? expf(score - top) : 0.0f, sum = warp_sum(weight);
        const T* value = keys.value(key, position < end ? position : end - 1);
        float next[PLAIN_DIMS] = {};
        for (int j = 0; j < 32; ++j) {
            const T* v = reinterpret_cast<const T*>(__shfl_sync(~0u, reinterpret_cast<u64>(value), j));
            const float w = __shfl_sync(~0u, weight, j);
#pragma unroll
            for (int i = 0; i < PLAIN_DIMS; ++i)
                if (i * 32 + lane < p.dim) next[i] = __fmaf_rn(w, widened(v[i * 32 + lane]), next[i]);
        }
        all.fold(top, sum, next);
    }
    return all;
}

struct PlainSpan { // of one row: its splits
    int length, low, first, end;
    __device__ __forceinline__ PlainSpan(const Plain& p, int row)
        : length(p.step.array(AT_POSITIONS)[row] + 1), low(p.t.window && length > int(p.t.window) ? length - int(p.t.window) : 0),
          first(low / PLAIN_SPLIT), end((length - 1) / PLAIN_SPLIT + 1) {}
};

__device__ __forceinline__ void put_plain(const Plain& p, int row, int head, const PlainSums& all) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < PLAIN_DIMS; ++i)
        if (i * 32 + lane < p.dim) p.t.attended[u64(row) * p.q_size + head * p.dim + i * 32 + lane] = all.out[i] / all.sum;
}

__device__ __forceinline__ float* plain_part(const Plain& p, int pair, int split) {
    return p.t.parts + (u64(pair) * p.step.get(MAX_SPLITS) + split) * (p.dim + 2);
}

// Few rows: a warp a split, then, after a barrier, `plain_fold`. Many: a warp folds all splits of its row by itself.
template <class T> __device__ __noinline__ void plain_attention(const Plain& p, int layer) {
    const int lane = threadIdx.x & 31, pairs = p.rows * p.heads, group = p.heads / p.kv_heads;
    const bool is_small = p.rows <= SMALL_ROWS;
    const u64 jobs = u64(pairs) * (is_small ? p.step.get(MAX_SPLITS) : 1);
    for (u64 job = p.first_job(); job < jobs; job += p.stride()) {
        const int pair = int(job % pairs), row = pair / p.heads, head = pair % p.heads, split = int(job / pairs);
        const PlainSpan span(p, row);
        const PlainKeys<T> keys(p, layer, row, head / group);
        const float* q = p.t.q + u64(row) * p.q_size + head * p.dim;
        if (!is_small) {
            PlainSums all;
            for (int s = span.first; s < span.end; ++s) {
                const PlainSums next = plain_split(p, keys, q, s, span.low, span.length);
                all.fold(next.top, next.sum, next.out);
            }
            put_plain(p, row, head, all);
        } else if (split >= span.first && split < span.end) {
            const PlainSums next = plain_split(p, keys, q, split, span.low, span.length);
            float* part = plain_part(p, pair, split);
#pragma unroll
            for (int i = 0; i < PLAIN_DIMS; ++i)
                if (i * 32 + lane < p.dim) part[i * 32 + lane] = next.out[i];
            if (lane == 0) part[p.dim] = next.top, part[p.dim + 1] = next.sum;
        }
    }
}

LH_STAGE void plain_fold(const Plain& p) {
    const int lane = threadIdx.x & 31;
    for (int pair = p.first_job(); pair < p.rows * p.heads; pair += p.stride()) {
        const PlainSpan span(p, pair / p.heads);
        PlainSums all;
        for (int s = span.first; s < span.end; ++s) {
            const float* part = plain_part(p, pair, s);
            float next[PLAIN_DIMS];
#pragma unroll
            for (int i = 0; i < PLAIN_DIMS; ++i) next[i] = i * 32 + lane < p.dim ? part[i * 32 + lane] : 0.0f;
            all.fold(part[p.dim], part[p.dim + 1], next);
        }
        put_plain(p, pair / p.heads, pair % p.heads, all);
    }
}

} // namespace lh
