// Routing, and the experts of a small step.
namespace lh {

// The experts of one row, a warp: softmax over all, the best TOPK (of equals the lowest), in falling order.
__device__ __forceinline__ void route(const float* logits, int* experts, float* weights) {
    constexpr int EACH = (EXPERTS + 31) / 32;
    const int lane = threadIdx.x & 31;
    float values[EACH];
    float highest = -infinity();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        values[i] = i * 32 + lane < EXPERTS ? logits[i * 32 + lane] : -infinity();
        highest = fmaxf(highest, values[i]);
    }
#pragma unroll
    for (int m = 16; m; m >>= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, m));
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += values[i] > -infinity() ? __expf(values[i] - highest) : 0.0f;
    total = warp_sum(total);
    float chosen[TOPK], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < TOPK; ++k) {
        float best = -infinity();
        int at = EXPERTS;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (values[i] > best) best = values[i], at = i * 32 + lane;
#pragma unroll
        for (int m = 16; m; m >>= 1) {
            const float other = __shfl_xor_sync(~0u, best, m);
            const int other_at = __shfl_xor_sync(~0u, at, m);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        if (at >= EXPERTS) at = k; // logits that are not finite: any expert, but a real one
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (at == i * 32 + lane) values[i] = -infinity();
        chosen[k] = __expf(best - highest);
        sum += chosen[k];
        if (lane == 0) experts[k] = at;
    }
    const float scale = 1.0f / (LH_NORM_TOPK ? sum : total);
#pragma unroll
    for (int k = 0; k < TOPK; ++k)
        if (lane == 0) weights[k] = chosen[k] * scale;
}

// Every block routes all rows by itself and groups their assignments by expert: cheaper than another barrier.
LH_STAGE void group_small(const Table& table, Step step) {
    SmallShared& s = small();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, assignments = step.rows * TOPK;
    int* experts = reinterpret_cast<int*>(s.parts[0][warp]);
    for (int row = warp; row < step.rows; row += WARPS) {
        route(table.router + u64(row) * EXPERTS, experts, s.weights + row * TOPK);
        __syncwarp();
        if (lane < TOPK) s.chosen[row * TOPK + lane] = experts[lane];
        __syncwarp();
    }
    __syncthreads();
    for (int expert = warp; expert < EXPERTS; expert += WARPS) {
        int count = 0;
        for (int from = 0; from < assignments; from += 32) {
            const bool mine = from + lane < assignments && s.chosen[from + lane] == expert;
            const u32 found = __ballot_sync(~0u, mine);
            if (mine) s.lists[expert][count + __popc(found & ((1u << lane) - 1))] = from + lane;
            count += __popc(found);
        }
        if (lane == 0) s.counts[expert] = count;
    }
    __syncthreads();
    if (warp == 0) {
        int count = 0;
        for (int from = 0; from < EXPERTS; from += 32) {
            const bool mine = from + lane < EXPERTS && s.counts[from + lane] > 0;
            const u32 found = __ballot_sync(~0u, mine);
            if (mine) s.active[count + __popc(found & ((1u << lane) - 1))] = from + lane;
            count += __popc(found);
        }
        if (lane == 0) s.num_active = count;
    }
    __syncthreads();
}

// Columns of an expert: its assignments, each by its row (divide TOPK) or by itself (divide 1).
__device__ __forceinline__ void expert_columns(Columns& x, const bf16* inputs, int width, int expert, int divide) {
    const int column = (threadIdx.x & 31) >> 2, count = small().counts[expert];
    x.inputs = inputs, x.width = width, x.tiles = (count + 7) / 8;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        x.row[n] = small().lists[expert][n * 8 + column < count ? n * 8 + column : 0] / divide;
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

// Tiles of gate and up hold 8 rows of each, so a thread has both of an output. `inverse` of all rows is still in shared memory.
LH_STAGE void gate_up_small(const Table& table, const Layer& layer, Step step) {
    constexpr int TILES = INTER / 8;
    for_tiles<LH_EXPERT_WIDTHS>(
        small().num_active * TILES, Splits(HIDDEN, LONG_SPLIT),
        [&](int item, Linear& w, Columns& x) -> u64 {
            const int expert = small().active[item / TILES];
            expert_columns(x, table.normed, HIDDEN, expert, TOPK);
            w = layer.gate_up;
            return u64(expert) * TILES + item % TILES;
        },
        [] {},
        [&](int item, int n, const float4* parts, int splits) {
            const int expert = small().active[item / TILES], count = small().counts[expert];
            if (n * 8 >= count) return;
            const float4 c = sum_splits(parts, splits, n);
            const int lane = threadIdx.x & 31, column = n * 8 + (lane & 3) * 2;
            const int at = shuffled((item % TILES) * 8 + (lane >> 2));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (column + i >= count) break;
                const int assignment = small().lists[expert][column + i];
                const float inverse = small().inverse[assignment / TOPK];
                const float value = i ? gated(c.y * inverse, c.w * inverse) : gated(c.x * inverse, c.z * inverse);
                table.act[u64(assignment) * INTER + at] = __float2bfloat16_rn(value);
            }
        });
}

// A block owns 16 outputs and visits all active experts, so it can add a row's experts in their order and finish the layer.
LH_STAGE void down_small(const Table& table, const Layer& layer, Step step, const float* next_norm) {
    const Splits splits(INTER, LONG_SPLIT);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float4* mine = small().parts[0][warp];
    float* outputs = reinterpret_cast<float*>(small().parts[1]); // [assignment][split][16]
    for (int tile = blockIdx.x; tile < HIDDEN_TILES; tile += gridDim.x) {
        for (int item = warp; item < small().num_active * splits.count; item += WARPS) {
            const int expert = small().active[item / splits.count], split = item % splits.count;
            Columns x;
            expert_columns(x, table.act, INTER, expert, 1);
            const int first = split * splits.length, left = splits.units - first;
            direct_product_any<LH_EXPERT_WIDTHS>(layer.down, (u64(expert) * HIDDEN_TILES + tile) * splits.units + first, first,
                                                 left < splits.length ? left : splits.length, x, mine);
            for (int n = 0; n < x.tiles; ++n)
                each(mine[n * 32 + lane], n, small().counts[expert], [&](int column, int output, float value) {
                    outputs[(small().lists[expert][column] * splits.count + split) * 16 + output] = value;
                });
        }
        __syncthreads();
        for (int from = 0; from < step.rows * 16; from += THREADS) {
            const int at = from + threadIdx.x, row = at / 16, output = at % 16;
            const bool valid = row < step.rows;
            float sum = 0.0f;
            if (valid) {
                for (int k = 0; k < TOPK; ++k) {
                    const float* part = outputs + (row * TOPK + k) * splits.count * 16 + output;
                    float value = part[0];
                    for (int s = 1; s < splits.count; ++s) value += part[s * 16];
                    sum = fmaf(small().weights[row * TOPK + k], value, sum);
                }
                sum += table.hidden[u64(row) * HIDDEN + tile * 16 + output];
            }
            put_tile(table, valid, row, tile, sum, next_norm);
        }
        __syncthreads();
    }
}

} // namespace lh
