// The plain kernels: float32 activations, weights as the checkpoint has them, any sizes, known only at run time, so that one
// compilation serves every model. A sum over inputs is a warp's: eight neighbours a lane, 256 inputs a turn, then the lanes by halves;
// so an output's bits do not depend on how many rows share the weights.
#include <cuda_fp16.h>

namespace lh {

enum { KIND_Q4 = 4, KIND_Q8 = 8, KIND_BF16 = 16, KIND_F16 = 17, KIND_F32 = 32 }; // of weights, and of K/V

struct PlainLinear {
    const void* weight;   // [outputs, inputs], rows packed without padding
    const float2* groups; // [outputs, inputs / group_size], scale and bias
    const float* bias;    // [outputs], or null
    u64 kind, group_size;
};

struct PlainLayer {
    PlainLinear q, k, v, o, router, gate, up, down; // of a dense layer the router is unused
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    u64 is_moe, width;
};

struct PlainTable {
    u32 *barriers, *launches; // as in Table
    const int* step;
    u64 step_words;
    float *hidden, *normed, *qkv, *q; // [rows, hidden], the same, [rows, all heads], [rows, heads]
    char* kv;                         // [layers, rows of the step, 2, kv_heads, head_dim] as the pool stores them
    float *attended, *parts;          // [rows, heads]; [rows, num_heads, splits, head_dim + 2]
    float *router, *act, *wide;       // [rows, experts], [assignments, width], [assignments, hidden]
    int* groups;                      // of assignments to experts
    float *topk_weights, *logits;
    int* results;
    const float *inv_freq, *final_norm;
    u64 num_layers, hidden_size, num_heads, kv_heads, head_dim, vocab, num_experts, topk, norm_topk, window;
    double eps, scale, rope_factor;
    PlainLinear embedding, head;
    PlainLayer layers[1];
};

// What a stage knows: sizes as ints.
struct Plain {
    const PlainTable& t;
    Step step;
    int rows, hidden, heads, kv_heads, dim, q_size, kv_size, experts, topk;
    __device__ __forceinline__ Plain(const PlainTable& table, const Step& s)
        : t(table), step(s), rows(s.rows), hidden(table.hidden_size), heads(table.num_heads), kv_heads(table.kv_heads),
          dim(table.head_dim), q_size(heads * dim), kv_size(kv_heads * dim), experts(table.num_experts), topk(table.topk) {}
    __device__ __forceinline__ int first_job() const { return blockIdx.x + gridDim.x * (threadIdx.x >> 5); } // of this warp
    __device__ __forceinline__ int stride() const { return gridDim.x * WARPS; }
};

constexpr int DOT_ROWS = 8; // rows that share a load of weights

template <int KIND> __device__ __forceinline__ void load8(const PlainLinear& w, u64 at, float (&v)[8]) {
    if constexpr (KIND == KIND_F32) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(w.weight) + at);
        const float4 a = __ldg(from), b = __ldg(from + 1);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else if constexpr (KIND == KIND_BF16 || KIND == KIND_F16) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(w.weight) + at));
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (KIND == KIND_BF16) {
                v[i * 2] = __uint_as_float(pairs[i] << 16), v[i * 2 + 1] = __uint_as_float(pairs[i] & 0xFFFF0000u);
            } else {
                const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
                v[i * 2] = wide.x, v[i * 2 + 1] = wide.y;
            }
        }
    } else {
        const float2 group = __ldg(w.groups + at / w.group_size);
        const u32* words = static_cast<const u32*>(w.weight) + at * KIND / 32;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 word = __ldg(words + i * KIND / 32);
            v[i] = __fmaf_rn(float((word >> (i * KIND % 32)) & ((1u << KIND) - 1)), group.x, group.y);
        }
    }
}

// sums[r] = weights of output `out` times x[r], for R rows.
template <int KIND, int R>
__device__ __noinline__ void dot_rows(const PlainLinear& w, u64 out, int inputs, const float* const* rows, float* sums) {
    const float* x[R];
    float sum[R];
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = rows[r], sum[r] = 0.0f;
    const u64 base = out * inputs;
#pragma unroll(R == 1 ? 4 : 1)
    for (int k = (threadIdx.x & 31) * 8; k < inputs; k += 256) {
        float v[8];
        load8<KIND>(w, base + k, v);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float4 a = *reinterpret_cast<const float4*>(x[r] + k), b = *reinterpret_cast<const float4*>(x[r] + k + 4);
            const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[r] = __fmaf_rn(v[j], y[j], sum[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) sums[r] = warp_sum(sum[r]);
}

template <int KIND>
__device__ __forceinline__ void dot_kind(const PlainLinear& w, u64 out, int inputs, const float* const* x, int count, float* sums) {
    if (count == 1) dot_rows<KIND, 1>(w, out, inputs, x, sums);
    else if (count <= 4) dot_rows<KIND, 4>(w, out, inputs, x, sums);
    else dot_rows<KIND, 8>(w, out, inputs, x, sums);
}

// As above for any kind of weights and count of rows up to DOT_ROWS; x[r] past the count must be readable.
__device__ __noinline__ void dot(const PlainLinear& w, u64 out, int inputs, const float* const* x, int count, float* sums) {
    switch (w.kind) {
    case KIND_Q4: return dot_kind<KIND_Q4>(w, out, inputs, x, count, sums);
    case KIND_Q8: return dot_kind<KIND_Q8>(w, out, inputs, x, count, sums);
    case KIND_BF16: return dot_kind<KIND_BF16>(w, out, inputs, x, count, sums);
    case KIND_F16: return dot_kind<KIND_F16>(w, out, inputs, x, count, sums);
    default: return dot_kind<KIND_F32>(w, out, inputs, x, count, sums);
    }
}

__device__ __forceinline__ float biased(const PlainLinear& w, int out, float sum) { return w.bias ? sum + w.bias[out] : sum; }

// A layer for rows [0, rows) of x: `put(row, out, value)` by one lane each.
template <class Put>
__device__ __forceinline__ void plain_linear(const Plain& p, const PlainLinear& w, int outputs, int inputs, const float* x, int rows, Put put) {
    const int blocks = (rows + DOT_ROWS - 1) / DOT_ROWS, lane = threadIdx.x & 31;
    for (u64 job = p.first_job(); job < u64(outputs) * blocks; job += p.stride()) {
        const int out = int(job % outputs), from = int(job / outputs) * DOT_ROWS, count = rows - from < DOT_ROWS ? rows - from : DOT_ROWS;
        const float* at[DOT_ROWS];
        float sums[DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; ++r) at[r] = x + u64(from + (r < count ? r : count - 1)) * inputs;
        dot(w, out, inputs, at, count, sums);
        if (lane < count) put(from + lane, out, biased(w, out, sums[lane]));
    }
}

// x / rms(x) * weight for rows `ids` (null: all) into rows of `to`.
LH_STAGE void plain_norm(const Plain& p, const float* weight, const int* ids, int rows) {
    const int lane = threadIdx.x & 31;
    for (int row = p.first_job(); row < rows; row += p.stride()) {
        const float* x = p.t.hidden + u64(ids ? ids[row] : row) * p.hidden;
        float sum = 0.0f;
        for (int k = lane; k < p.hidden; k += 32) sum = __fmaf_rn(x[k], x[k], sum);
        const float inverse = 1.0f / sqrtf(warp_sum(sum) / float(p.hidden) + float(p.t.eps));
        for (int k = lane; k < p.hidden; k += 32) p.t.normed[u64(row) * p.hidden + k] = x[k] * inverse * weight[k];
    }
}

LH_STAGE void plain_embed(const Plain& p) {
    const int lane = threadIdx.x & 31;
    for (int row = p.first_job(); row < p.rows; row += p.stride()) {
        const u64 base = u64(p.step.array(AT_TOKENS)[row]) * p.hidden;
        for (int k = lane * 8; k < p.hidden; k += 256) {
            float v[8];
            const PlainLinear& w = p.t.embedding;
            if (w.kind == KIND_Q4) load8<KIND_Q4>(w, base + k, v);
            else if (w.kind == KIND_Q8) load8<KIND_Q8>(w, base + k, v);
            else if (w.kind == KIND_BF16) load8<KIND_BF16>(w, base + k, v);
            else if (w.kind == KIND_F16) load8<KIND_F16>(w, base + k, v);
            else load8<KIND_F32>(w, base + k, v);
            for (int i = 0; i < 8; ++i) p.t.hidden[u64(row) * p.hidden + k + i] = v[i];
        }
    }
}

LH_STAGE void plain_qkv(const Plain& p, const PlainLayer& layer) {
    const int all = p.q_size + 2 * p.kv_size;
    const auto put_at = [&](int offset) {
        return [=, &p](int row, int out, float value) { p.t.qkv[u64(row) * all + offset + out] = value; };
    };
    plain_linear(p, layer.q, p.q_size, p.hidden, p.t.normed, p.rows, put_at(0));
    plain_linear(p, layer.k, p.kv_size, p.hidden, p.t.normed, p.rows, put_at(p.q_size));
    plain_linear(p, layer.v, p.kv_size, p.hidden, p.t.normed, p.rows, put_at(p.q_size + p.kv_size));
}

LH_STAGE void plain_out_proj(const Plain& p, const PlainLayer& layer) {
    plain_linear(p, layer.o, p.hidden, p.q_size, p.t.attended, p.rows,
                 [&](int row, int out, float value) { p.t.hidden[u64(row) * p.hidden + out] += value; });
}

__device__ __forceinline__ float plain_gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

LH_STAGE void plain_dense_gate_up(const Plain& p, const PlainLayer& layer) {
    const int width = int(layer.width), blocks = (p.rows + DOT_ROWS - 1) / DOT_ROWS, lane = threadIdx.x & 31;
    for (u64 job = p.first_job(); job < u64(width) * blocks; job += p.stride()) {
        const int out = int(job % width), from = int(job / width) * DOT_ROWS, count = p.rows - from < DOT_ROWS ? p.rows - from : DOT_ROWS;
        const float* at[DOT_ROWS];
        float gate[DOT_ROWS], up[DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; ++r) at[r] = p.t.normed + u64(from + (r < count ? r : count - 1)) * p.hidden;
        dot(layer.gate, out, p.hidden, at, count, gate);
        dot(layer.up, out, p.hidden, at, count, up);
        if (lane < count)
            p.t.act[u64(from + lane) * width + out] = plain_gated(biased(layer.gate, out, gate[lane]), biased(layer.up, out, up[lane]));
    }
}

LH_STAGE void plain_dense_down(const Plain& p, const PlainLayer& layer) {
    plain_linear(p, layer.down, p.hidden, int(layer.width), p.t.act, p.rows,
                 [&](int row, int out, float value) { p.t.hidden[u64(row) * p.hidden + out] += value; });
}

// In `groups`: experts of assignments, assignments by expert, counts, cursors, where each expert's assignments and blocks begin.
struct PlainGroups {
    int *chosen, *list, *counts, *cursors, *lists, *blocks;
    __device__ __forceinline__ PlainGroups(const Plain& p)
        : chosen(p.t.groups), list(chosen + p.rows * p.topk), counts(list + p.rows * p.topk), cursors(counts + p.experts),
          lists(cursors + p.experts), blocks(lists + p.experts + 1) {}
};

LH_STAGE void plain_router(const Plain& p, const PlainLayer& layer) {
    const PlainGroups groups(p);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < 2 * p.experts; i += THREADS) groups.counts[i] = 0;
    plain_linear(p, layer.router, p.experts, p.hidden, p.t.normed, p.rows,
                 [&](int row, int out, float value) { p.t.router[u64(row) * p.experts + out] = value; });
}

// Softmax over all experts, the best topk in falling order (of equals the lowest), a warp a row. Chosen logits are overwritten.
LH_STAGE void plain_route(const Plain& p) {
    const PlainGroups groups(p);
    const int lane = threadIdx.x & 31;
    for (int row = p.first_job(); row < p.rows; row += p.stride()) {
        float* logits = p.t.router + u64(row) * p.experts;
        float* weights = p.t.topk_weights + row * p.topk;
        float highest = -infinity(), total = 0.0f, sum = 0.0f;
        for (int e = lane; e < p.experts; e += 32) highest = fmaxf(highest, logits[e]);
        for (int m = 16; m; m >>= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, m));
        for (int e = lane; e < p.experts; e += 32) total += expf(logits[e] - highest);
        total = warp_sum(total);
        for (int k = 0; k < p.topk; ++k) {
            float best = -infinity();
            int at = p.experts;
            for (int e = lane; e < p.experts; e += 32)
                if (logits[e] > best) best = logits[e], at = e;
            for (int m = 16; m; m >>= 1) {
                const float other = __shfl_xor_sync(~0u, best, m);
                const int other_at = __shfl_xor_sync(~0u, at, m);
                if (other > best || (other == best && other_at < at)) best = other, at = other_at;
            }
            if (at >= p.experts) at = k; // logits that are not finite: any expert, but a real one
            const float weight = expf(best - highest);
            sum += weight;
            __syncwarp();
            if (lane == 0) {
                logits[at] = -infinity(), weights[k] = weight, groups.chosen[row * p.topk + k] = at;
                atomicAdd(groups.counts + at, 1);
            }
            __syncwarp();
        }
        const float scale = 1.0f / (p.t.norm_topk ? sum : total);
        for (int k = lane; k < p.topk; k += 32) weights[k] *= scale;
    }
}

// One thread adds the experts up; then, after a barrier, assignments find their places. Their order within an expert changes no bits.
LH_STAGE void plain_starts(const Plain& p) {
    const PlainGroups groups(p);
    if (blockIdx.x || threadIdx.x) return;
    int list = 0, block = 0;
    for (int e = 0; e < p.experts; ++e) {
        groups.lists[e] = list, groups.blocks[e] = block;
        list += groups.counts[e], block += (groups.counts[e] + DOT_ROWS - 1) / DOT_ROWS;
    }
    groups.lists[p.experts] = list, groups.blocks[p.experts] = block;
}

LH_STAGE void plain_group(const Plain& p) {
    const PlainGroups groups(p);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.rows * p.topk; i += gridDim.x * THREADS) {
        const int expert = groups.chosen[i];
        groups.list[groups.lists[expert] + atomicAdd(groups.cursors + expert, 1)] = i;
    }
}

// All blocks of up to DOT_ROWS assignments of all experts, for `outputs` outputs each.
template <class Work> __device__ __forceinline__ void plain_experts(const Plain& p, int outputs, Work work) {
    const PlainGroups groups(p);
    for (u64 job = p.first_job(); job < u64(groups.blocks[p.experts]) * outputs; job += p.stride()) {
        const int block = int(job / outputs);
        int low = 0, high = p.experts; // the last expert that begins at or before this block
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (groups.blocks[middle] <= block) low = middle;
            else high = middle;
        }
        const int first = groups.lists[low] + (block - groups.blocks[low]) * DOT_ROWS, left = groups.lists[low + 1] - first;
        work(low, groups.list + first, left < DOT_ROWS ? left : DOT_ROWS, int(job % outputs));
    }
}

LH_STAGE void plain_gate_up(const Plain& p, const PlainLayer& layer) {
    const int width = int(layer.width), lane = threadIdx.x & 31;
    plain_experts(p, width, [&](int expert, const int* list, int count, int out) {
        const float* at[DOT_ROWS];
        float gate[DOT_ROWS], up[DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; ++r) at[r] = p.t.normed + u64(list[r < count ? r : count - 1] / p.topk) * p.hidden;
        dot(layer.gate, u64(expert) * width + out, p.hidden, at, count, gate);
        dot(layer.up, u64(expert) * width + out, p.hidden, at, count, up);
        if (lane < count) p.t.act[u64(list[lane]) * width + out] = plain_gated(gate[lane], up[lane]);
    });
}

LH_STAGE void plain_down(const Plain& p, const PlainLayer& layer) {
    const int width = int(layer.width), lane = threadIdx.x & 31;
    plain_experts(p, p.hidden, [&](int expert, const int* list, int count, int out) {
        const float* at[DOT_ROWS];
        float sums[DOT_ROWS];
        for (int r = 0; r < DOT_ROWS; ++r) at[r] = p.t.act + u64(list[r < count ? r : count - 1]) * width;
        dot(layer.down, u64(expert) * p.hidden + out, width, at, count, sums);
        if (lane < count) p.t.wide[u64(list[lane]) * p.hidden + out] = sums[lane];
    });
}

// A row's experts in their order, and the residual.
LH_STAGE void plain_combine(const Plain& p) {
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < u64(p.rows) * p.hidden; i += u64(gridDim.x) * THREADS) {
        const int row = int(i / p.hidden), at = int(i % p.hidden);
        float sum = 0.0f;
        for (int k = 0; k < p.topk; ++k)
            sum = __fmaf_rn(p.t.topk_weights[row * p.topk + k], p.t.wide[u64(row * p.topk + k) * p.hidden + at], sum);
        p.t.hidden[i] += sum;
    }
}

} // namespace lh
