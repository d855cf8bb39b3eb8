// The step's ids: the best token of a row, or one drawn at a temperature from the whole vocabulary by the host's noise.
namespace lh {

struct SampleShared {
    float best[WARPS];
    int at[WARPS];
    double mass[WARPS];
    float highest;
    int chosen;
};

// A block a row. The order of every sum is fixed: a warp's share of the vocabulary, lanes within 32 neighbours, warps in turn.
__device__ __forceinline__ void draw(const float* logits, int vocab, float temperature, float noise, SampleShared& shared, int* result) {
    const int share = (vocab + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int from = warp * share, to = from + share < vocab ? from + share : vocab;
    float best = -infinity();
    int at = vocab;
    for (int i = from + lane; i < to; i += 32) {
        const float value = logits[i];
        if (value > best || value != value) best = value != value ? infinity() : value, at = value != value ? -1 : i;
    }
#pragma unroll
    for (int m = 16; m; m >>= 1) {
        const float other = __shfl_xor_sync(~0u, best, m);
        const int other_at = __shfl_xor_sync(~0u, at, m);
        if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    if (lane == 0) shared.best[warp] = best, shared.at[warp] = at;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; ++w)
            if (shared.best[w] > best) best = shared.best[w], at = shared.at[w];
        shared.highest = best;
        shared.chosen = best < infinity() && at < vocab ? at : -1; // -1: not finite, and the host says so
    }
    __syncthreads();
    if (temperature > 0.0f && shared.chosen >= 0) {
        const float highest = shared.highest, scale = 1.44269504f / temperature;
        float mass = 0.0f;
        for (int i = from + lane; i < to; i += 32) mass += exp2_fast((logits[i] - highest) * scale);
        mass = warp_sum(mass);
        if (lane == 0) shared.mass[warp] = mass;
        __syncthreads();
        double total = 0.0, before = 0.0;
        int owner = WARPS - 1;
        for (int w = 0; w < WARPS; ++w) total += shared.mass[w];
        const double target = double(noise) * total;
        for (int w = 0; w < WARPS; ++w) {
            if (target < before + shared.mass[w]) { owner = w; break; }
            if (w < WARPS - 1) before += shared.mass[w];
        }
        if (warp == owner) {
            float sum = float(before);
            int found = -1, last = -1;
            for (int base = from; base < to && found < 0; base += 32) {
                const int i = base + lane;
                const float weight = i < to ? exp2_fast((logits[i] - highest) * scale) : 0.0f;
                float upto = weight;
#pragma unroll
                for (int m = 1; m < 32; m <<= 1) {
                    const float left = __shfl_up_sync(~0u, upto, m);
                    if (lane >= m) upto += left;
                }
                const u32 past = __ballot_sync(~0u, weight > 0.0f && double(sum + upto) > target);
                const u32 some = __ballot_sync(~0u, weight > 0.0f);
                if (past) found = base + __ffs(past) - 1;
                if (some) last = base + 31 - __clz(some);
                sum += __shfl_sync(~0u, upto, 31);
            }
            if (lane == 0) shared.chosen = found >= 0 ? found : last >= 0 ? last : shared.chosen;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *result = shared.chosen;
    __syncthreads();
}

} // namespace lh
