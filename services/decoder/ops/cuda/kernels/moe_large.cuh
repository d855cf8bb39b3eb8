// The experts of a large step: assignments grouped by expert in global memory. Their order within an expert is any: columns do not
// mix, so it changes no bits.
namespace lh {

// In `groups`: experts of assignments, assignments by expert, counts and cursors.
struct Groups {
    int *chosen, *list, *counts, *cursors;
    __device__ __forceinline__ Groups(const Table& table, const Step& step)
        : chosen(table.groups), list(table.groups + step.rows * TOPK), counts(list + step.rows * TOPK), cursors(counts + EXPERTS) {}
};

LH_STAGE void clear_groups(const Table& table, Step step) {
    const Groups groups(table, step);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < 2 * EXPERTS; i += THREADS) groups.counts[i] = 0;
}

LH_STAGE void route_large(const Table& table, Step step) {
    const Groups groups(table, step);
    const int lane = threadIdx.x & 31;
    for (int row = blockIdx.x + gridDim.x * (threadIdx.x >> 5); row < step.rows; row += gridDim.x * WARPS) {
        route(table.router + u64(row) * EXPERTS, groups.chosen + row * TOPK, table.topk_weights + row * TOPK);
        __syncwarp();
        if (lane < TOPK) atomicAdd(groups.counts + groups.chosen[row * TOPK + lane], 1);
    }
}

// Where each expert's assignments and blocks begin, in shared memory: every block of the grid adds them up by itself.
struct ExpertStarts {
    int lists[EXPERTS + 1], blocks[EXPERTS + 1];
};

__device__ __forceinline__ ExpertStarts& expert_starts() { return *reinterpret_cast<ExpertStarts*>(small().lists); }

__device__ __forceinline__ void add_up_experts(const Groups& groups) {
    ExpertStarts& starts = expert_starts();
    if (threadIdx.x < 32) {
        int list = 0, block = 0;
        for (int from = 0; from < EXPERTS; from += 32) {
            const int lane = threadIdx.x, count = from + lane < EXPERTS ? groups.counts[from + lane] : 0;
            int upto = count, blocks = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
            const int mine = blocks;
#pragma unroll
            for (int m = 1; m < 32; m <<= 1) {
                const int a = __shfl_up_sync(~0u, upto, m), b = __shfl_up_sync(~0u, blocks, m);
                if (lane >= m) upto += a, blocks += b;
            }
            if (from + lane < EXPERTS) starts.lists[from + lane] = list + upto - count, starts.blocks[from + lane] = block + blocks - mine;
            list += __shfl_sync(~0u, upto, 31), block += __shfl_sync(~0u, blocks, 31);
        }
        if (threadIdx.x == 0) starts.lists[EXPERTS] = list, starts.blocks[EXPERTS] = block;
    }
    __syncthreads();
}

LH_STAGE void group_large(const Table& table, Step step) {
    const Groups groups(table, step);
    add_up_experts(groups);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < step.rows * TOPK; i += gridDim.x * THREADS) {
        const int expert = groups.chosen[i];
        groups.list[expert_starts().lists[expert] + atomicAdd(groups.cursors + expert, 1)] = i;
    }
}

// All blocks of all experts: `tiles` tiles an expert, inputs of assignment / divide.
template <class Put>
__device__ __forceinline__ void experts_large(const Table& table, const Step& step, const Linear& linear, int tiles, const bf16* inputs,
                                              int width, int divide, Put put) {
    const Groups groups(table, step);
    const ExpertStarts& starts = expert_starts();
    const int blocks_m = (tiles + WARPS - 1) / WARPS;
    for (int item = blockIdx.x; item < starts.blocks[EXPERTS] * blocks_m; item += gridDim.x) {
        const int block = item / blocks_m;
        int low = 0, high = EXPERTS; // the last expert that begins at or before this block
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (starts.blocks[middle] <= block) low = middle;
            else high = middle;
        }
        const int first = starts.lists[low] + (block - starts.blocks[low]) * BLOCK_ROWS;
        const int left = starts.lists[low + 1] - first, count = left < BLOCK_ROWS ? left : BLOCK_ROWS;
        const int* list = groups.list + first;
        if (threadIdx.x < BLOCK_ROWS) large().rows[threadIdx.x] = list[int(threadIdx.x) < count ? threadIdx.x : count - 1] / divide;
        __syncthreads();
        const int tile = item % blocks_m * WARPS + (threadIdx.x >> 5);
        block_product_any<LH_EXPERT_WIDTHS>(linear, tile < tiles ? (long long)low * tiles + tile : -1, Splits(width, LONG_SPLIT), inputs,
                                            width, (count + 7) / 8, [&](int n, const float4& c) { put(list, count, tile, n, c); });
    }
}

LH_STAGE void gate_up_large(const Table& table, const Layer& layer, Step step) {
    experts_large(table, step, layer.gate_up, INTER / 8, table.normed, HIDDEN, TOPK,
                  [&](const int* list, int count, int tile, int n, const float4& c) {
                      const int lane = threadIdx.x & 31, column = n * 8 + (lane & 3) * 2, at = shuffled(tile * 8 + (lane >> 2));
#pragma unroll
                      for (int i = 0; i < 2; ++i) {
                          if (column + i >= count) break;
                          const int assignment = list[column + i];
                          const float inverse = table.inverse[assignment / TOPK];
                          const float value = i ? gated(c.y * inverse, c.w * inverse) : gated(c.x * inverse, c.z * inverse);
                          table.act[u64(assignment) * INTER + at] = __float2bfloat16_rn(value);
                      }
                  });
}

LH_STAGE void down_large(const Table& table, const Layer& layer, Step step) {
    experts_large(table, step, layer.down, HIDDEN_TILES, table.act, INTER, 1,
                  [&](const int* list, int count, int tile, int n, const float4& c) {
                      each(c, n, count, [&](int column, int output, float value) {
                          table.wide[u64(list[column]) * HIDDEN + tile * 16 + output] = value;
                      });
                  });
}

// A row's experts in their order, and the residual.
LH_STAGE void combine_large(const Table& table, Step step, const float* next_norm) {
    const u64 jobs = u64(step.rows) * HIDDEN;
    for (u64 from = u64(blockIdx.x) * THREADS; from < jobs; from += u64(gridDim.x) * THREADS) {
        const u64 job = from + threadIdx.x;
        const bool valid = job < jobs;
        const int row = int(job / HIDDEN), at = int(job % HIDDEN);
        float sum = 0.0f;
        if (valid) {
            for (int k = 0; k < TOPK; ++k)
                sum = fmaf(table.topk_weights[row * TOPK + k], table.wide[u64(row * TOPK + k) * HIDDEN + at], sum);
            sum += table.hidden[job];
        }
        put_tile(table, valid, row, at / 16, sum, next_norm);
    }
}

} // namespace lh
