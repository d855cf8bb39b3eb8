// One step of the plain kernels, and the commit of its K/V rows into the pool.
namespace lh {

__device__ __forceinline__ Step plain_step_of(const PlainTable& table, u32 launch) {
    const int* words = table.step + (launch & 1) * table.step_words;
    return Step{words, words[ROWS], words[SAMPLE_ROWS]};
}

__device__ __forceinline__ void plain_heads(const Plain& p, const PlainLayer& layer, int index, Grid& grid) {
    const int kind = p.step.get(KV_KIND);
    if (kind == KIND_BF16) plain_rope<bf16>(p, layer, index);
    else if (kind == KIND_F16) plain_rope<__half>(p, layer, index);
    else plain_rope<float>(p, layer, index);
    grid.barrier();
    if (kind == KIND_BF16) plain_attention<bf16>(p, index);
    else if (kind == KIND_F16) plain_attention<__half>(p, index);
    else plain_attention<float>(p, index);
    grid.barrier();
    if (p.rows > SMALL_ROWS) return;
    plain_fold(p);
    grid.barrier();
}

__device__ __forceinline__ void plain_mixture(const Plain& p, const PlainLayer& layer, Grid& grid) {
    plain_router(p, layer);
    grid.barrier();
    plain_route(p);
    grid.barrier();
    plain_starts(p);
    grid.barrier();
    plain_group(p);
    grid.barrier();
    plain_gate_up(p, layer);
    grid.barrier();
    plain_down(p, layer);
    grid.barrier();
    plain_combine(p);
    grid.barrier();
}

__device__ __forceinline__ void run_plain(const PlainTable& table, int* done) {
    const u32 launch = *reinterpret_cast<volatile u32*>(table.launches);
    Grid grid{table.barriers + launch % 64, 0};
    const Step step = plain_step_of(table, launch);
    const Plain p(table, step);
    plain_embed(p);
    grid.barrier();
    for (int index = 0; index < int(table.num_layers); ++index) {
        const PlainLayer& layer = table.layers[index];
        plain_norm(p, layer.input_norm, nullptr, p.rows);
        grid.barrier();
        plain_qkv(p, layer);
        grid.barrier();
        plain_heads(p, layer, index, grid);
        plain_out_proj(p, layer);
        grid.barrier();
        plain_norm(p, layer.post_norm, nullptr, p.rows);
        grid.barrier();
        if (layer.is_moe) {
            plain_mixture(p, layer, grid);
        } else {
            plain_dense_gate_up(p, layer);
            grid.barrier();
            plain_dense_down(p, layer);
            grid.barrier();
        }
    }
    plain_norm(p, table.final_norm, step.array(AT_SAMPLE_ROWS), step.sample_rows);
    grid.barrier();
    const int vocab = int(table.vocab);
    plain_linear(p, table.head, vocab, p.hidden, table.normed, step.sample_rows,
                 [&](int row, int out, float value) { table.logits[u64(row) * vocab + out] = value; });
    grid.barrier();
    for (int index = blockIdx.x; index < step.sample_rows; index += gridDim.x)
        draw(table.logits + u64(index) * vocab, vocab, __int_as_float(step.array(AT_TEMPERATURES)[index]),
             __int_as_float(step.array(AT_NOISE)[index]), *reinterpret_cast<SampleShared*>(shared_bytes), table.results + 1 + index);
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        table.barriers[(launch + 32) % 64] = 0;
        table.launches[0] = launch + 1;
        done[0] = table.results[0] = int(launch + 1);
    }
}

// Rows of all layers to their slots, a warp for the K or the V of one head of one row.
__device__ __forceinline__ void plain_commit(const PlainTable& table) {
    const Plain p(table, plain_step_of(table, table.launches[0] - 1));
    const int bytes = p.dim * (p.step.get(KV_KIND) == KIND_F32 ? 4 : 2);
    const u64 jobs = table.num_layers * p.rows * 2 * p.kv_heads;
    for (u64 job = p.first_job(); job < jobs; job += p.stride()) {
        const int head = int(job % p.kv_heads), part = int(job / p.kv_heads % 2), row = int(job / (2 * p.kv_heads) % p.rows);
        const int layer = int(job / (2 * p.kv_heads * u64(p.rows)));
        const int* slots = p.step.array(AT_SLOTS) + row * 2; // block id, offset in the block
        char* to = p.step.pool() + u64(slots[0]) * p.step.stride() +
                   (p.step.block_row(layer, part, head) + u64(slots[1]) * p.step.get(TOKEN_ROWS)) * bytes;
        const uint4* from = reinterpret_cast<const uint4*>(table.kv + job * bytes);
        for (int i = threadIdx.x & 31; i < bytes / 16; i += 32) reinterpret_cast<uint4*>(to)[i] = from[i];
    }
}

} // namespace lh
