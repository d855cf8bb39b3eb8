// One step of the model, and the commit of its K/V rows into the pool.
namespace lh {

// A weight (row, k) of a tiled layer, for the embedding.
__device__ __forceinline__ float weight_at(const Linear& w, int units, int row, int k) {
    const int tile = row / 16, half = (row % 16) / 8, g = row % 8, unit = k / UNIT, span = k % UNIT / 32, t = k % 32 / 8, j = k % 8;
    const u64 at = u64(tile) * units + unit;
    const u32* words = reinterpret_cast<const u32*>(w.tiles + at * w.bits * 8);
    const int lane = g * 4 + t;
    if (w.bits == 16) {
        const u32 word = words[(span * 2 + half) * 128 + lane * 4 + (j & 3)];
        return __uint_as_float(j < 4 ? word << 16 : word & 0xFFFF0000u);
    }
    const float2 scale = widen(reinterpret_cast<const Scale*>(w.scales)[at * 16 + row % 16]);
    u32 q;
    if (w.bits == 4) q = words[lane * 4 + span * 2 + half] >> (4 * j) & 15;
    else q = words[span * 128 + lane * 4 + half * 2 + j / 4] >> (8 * (j & 3)) & 255;
    return fmaf(float(q), scale.x, scale.y);
}

LH_STAGE void embed(const Table& table, Step step) {
    const int jobs = step.rows * HIDDEN; // a multiple of 16
    for (int from = blockIdx.x * THREADS; from < jobs; from += gridDim.x * THREADS) {
        const int job = from + threadIdx.x, row = job / HIDDEN, at = job % HIDDEN;
        const bool valid = job < jobs;
        const float value = valid ? weight_at(table.embedding, HIDDEN / UNIT, step.array(AT_TOKENS)[row], at) : 0.0f;
        put_tile(table, valid, row, at / 16, value, table.layers[0].input_norm);
    }
}

LH_STAGE void sample_row(const Table& table, Step step, int index) {
    draw(table.logits + u64(index) * VOCAB, VOCAB, __int_as_float(step.array(AT_TEMPERATURES)[index]),
         __int_as_float(step.array(AT_NOISE)[index]), *reinterpret_cast<SampleShared*>(turns()), table.results + 1 + index);
}

// Stages that begin with weights start to load them before they wait for the stage before.
__device__ __forceinline__ void layer_small(const Table& table, const Step& step, int index, Grid& grid) {
    const Layer& layer = table.layers[index];
    qkv_small(table, layer, step, grid);
    grid.barrier();
    rope_rows(table, layer, index, step);
    grid.barrier();
    attention_small(table, step, index);
    out_proj_small(table, layer, step, grid);
    router_small(table, layer, step, grid);
    grid.barrier();
    load_inverses(table, nullptr, step.rows);
    group_small(table, step);
    gate_up_small(table, layer, step);
    grid.barrier();
    down_small(table, layer, step, index + 1 < LAYERS ? table.layers[index + 1].input_norm : table.final_norm);
}

__device__ __forceinline__ void layer_large(const Table& table, const Step& step, int index, Grid& grid) {
    const Layer& layer = table.layers[index];
    inverses_large(table, step);
    clear_groups(table, step);
    grid.barrier();
    qkv_large(table, layer, step);
    grid.barrier();
    rope_rows(table, layer, index, step);
    grid.barrier();
    attention_large(table, step, index);
    grid.barrier();
    out_proj_large(table, layer, step);
    grid.barrier();
    residual_large(table, layer, step);
    grid.barrier();
    inverses_large(table, step);
    grid.barrier();
    router_large(table, layer, step);
    grid.barrier();
    route_large(table, step);
    grid.barrier();
    group_large(table, step);
    grid.barrier();
    gate_up_large(table, layer, step);
    grid.barrier();
    down_large(table, layer, step);
    grid.barrier();
    combine_large(table, step, index + 1 < LAYERS ? table.layers[index + 1].input_norm : table.final_norm);
    grid.barrier();
}

// The step of launch number `launch`; the host fills its slot before.
__device__ __forceinline__ Step step_of(const Table& table, u32 launch) {
    const int* words = table.step + (launch & 1) * table.step_words;
    return Step{words, words[ROWS], words[SAMPLE_ROWS]};
}

template <bool IS_LARGE> __device__ __forceinline__ void run_step(const Table& table, int* done) {
    const u32 launch = *reinterpret_cast<volatile u32*>(table.launches);
    Grid grid{table.barriers + launch % 64, 0};
    const Step step = step_of(table, launch);
    embed(table, step);
    if constexpr (IS_LARGE) grid.barrier();
    for (int index = 0; index < LAYERS; ++index) {
        if constexpr (IS_LARGE) layer_large(table, step, index, grid);
        else layer_small(table, step, index, grid);
    }
    if constexpr (!IS_LARGE) grid.barrier();
    for (int from = 0; from < step.sample_rows; from += SMALL_ROWS)
        head_small(table, step, from, step.sample_rows - from < SMALL_ROWS ? step.sample_rows - from : SMALL_ROWS);
    grid.barrier();
    for (int index = blockIdx.x; index < step.sample_rows; index += gridDim.x) sample_row(table, step, index);
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        table.barriers[(launch + 32) % 64] = 0;
        table.launches[0] = launch + 1;
        done[0] = table.results[0] = int(launch + 1);
    }
}

// Rows of all layers to their slots: a warp copies the K and the V of one head.
__device__ __forceinline__ void commit_rows(const Table& table) {
    constexpr int CHUNKS = HEAD_DIM / 8; // of 16 bytes
    const Step step = step_of(table, table.launches[0] - 1);
    const int lane = threadIdx.x & 31;
    const int jobs = LAYERS * step.rows * 2 * KV_HEADS, at_once = 32 / CHUNKS;
    for (int from = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * at_once; from < jobs; from += gridDim.x * WARPS * at_once) {
        const int job = from + lane / CHUNKS, head = job % KV_HEADS, part = job / KV_HEADS % 2, row = job / (2 * KV_HEADS) % step.rows;
        if (job >= jobs) continue;
        const int layer = job / (2 * KV_HEADS * step.rows);
        const int* slots = step.array(AT_SLOTS) + row * 2; // block id, offset in the block
        char* to = step.pool() + u64(slots[0]) * step.stride() +
                   (step.block_row(layer, part, head) + u64(slots[1]) * step.get(TOKEN_ROWS)) * ROW_BYTES;
        reinterpret_cast<uint4*>(to)[lane % CHUNKS] = reinterpret_cast<const uint4*>(table.kv)[u64(job) * CHUNKS + lane % CHUNKS];
    }
}

} // namespace lh
