// What all kernels share: the tables that the host fills, bf16 tiles on tensor cores, and the barrier over the whole grid.
//
// The step is one persistent kernel, a block of 16 warps on every multiprocessor: launches would cost more than the work of a
// small step. Stages are separated by `grid_barrier`. The LH_* geometry is defined by the host before this text.
#include <cuda_bf16.h>

// A stage of the step: a function of its own, so that each has all registers.
#define LH_STAGE __device__ __noinline__

namespace lh {

typedef unsigned int u32;
typedef unsigned long long u64;
typedef __nv_bfloat16 bf16;

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int UNIT = 64;       // inputs of one quantisation group, and of one tile
constexpr int SMALL_ROWS = 32; // rows up to which a step is a small one: all of them at once in registers
constexpr int HIDDEN = LH_HIDDEN, HEADS = LH_HEADS, KV_HEADS = LH_KV_HEADS, HEAD_DIM = LH_HEAD_DIM;
constexpr int GQA = HEADS / KV_HEADS, LAYERS = LH_LAYERS, VOCAB = LH_VOCAB, WINDOW = LH_WINDOW;
constexpr int EXPERTS = LH_EXPERTS, TOPK = LH_TOPK, INTER = LH_INTER;
constexpr int Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM, QKV_ROWS = Q_ROWS + 2 * KV_ROWS;
constexpr int HIDDEN_TILES = HIDDEN / 16;

// A linear layer in tiles of 16 outputs by 64 inputs; see layout.py.
struct Linear {
    const uint4* tiles;
    const u32* scales; // [tile row][unit][16], scale and bias of the group as two bf16
    u64 bits;          // 4, 8 or 16
};

struct Layer {
    Linear q, k, v, o, router, gate_up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm;
};

// Filled by the host once.
struct Table {
    u32* barriers;       // [64], one counter a launch, in turn
    u32* launches;       // [0]: launches so far
    const int* step;     // two slots that the host fills in turn
    u64 step_words;      // of a slot
    float* hidden;       // [rows, HIDDEN]
    bf16* normed;        // [rows, HIDDEN], hidden * norm weight, shuffled for the tensor cores
    float* squares;      // [rows, HIDDEN / 16], sums of squares
    float* qkv;          // [rows, QKV_ROWS]
    bf16* q;             // [rows, HEADS, HEAD_DIM]
    bf16* kv;            // [LAYERS, rows of the step, 2, KV_HEADS, HEAD_DIM]
    bf16* attended;      // [rows, Q_ROWS], shuffled
    float* parts;        // of attention over splits: see attention.cuh
    u32* arrivals;       // [rows, KV_HEADS], splits that are done
    float* router;       // [rows, EXPERTS]
    bf16* act;           // [rows * TOPK, INTER], shuffled
    float* wide;         // [rows * TOPK, HIDDEN], outputs of experts in large steps
    int* groups;         // of large steps: see moe_large.cuh
    float* topk_weights; // [rows, TOPK]
    float* logits;       // [sample rows, VOCAB]
    float* inverse;      // [rows], of large steps: reciprocal root mean squares
    int* results;        // in host memory: [0] launches done, then one id a sample row
    const float* inv_freq;
    const float* final_norm;
    Linear embedding, head;
    Layer layers[LAYERS];
};

// The step's header, in words of `step`; arrays follow at the offsets it names.
enum {
    ROWS, SAMPLE_ROWS, WORDS, TABLE_WIDTH, BLOCK_SIZE, MAX_SPLITS, POOL_LO, POOL_HI, STRIDE_LO, STRIDE_HI,
    AT_TOKENS, AT_POSITIONS, AT_SEQS, AT_STARTS, AT_CONTEXTS, AT_SLOTS, AT_SAMPLE_ROWS, AT_TEMPERATURES, AT_NOISE, AT_TABLES,
    WANT_LOGITS, HEADER_WORDS = 32
};

struct Step {
    const int* words;
    int rows, sample_rows;
    __device__ __forceinline__ int get(int index) const { return words[index]; }
    __device__ __forceinline__ const int* array(int index) const { return words + words[index]; }
    __device__ __forceinline__ char* pool() const {
        return reinterpret_cast<char*>((u64(u32(words[POOL_HI])) << 32) | u32(words[POOL_LO]));
    }
    __device__ __forceinline__ u64 stride() const { return (u64(u32(words[STRIDE_HI])) << 32) | u32(words[STRIDE_LO]); }
};

// Inputs of a unit lie so that a thread's eight are one 16-byte load, in the order in which nibbles come out of a word.
__device__ __forceinline__ int shuffled(int k) { return (k & ~7) | ((k & 3) << 1) | ((k >> 2) & 1); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c += a * b on one 16 x 8 x 16 tile: weights (or keys, or values) on the m side, rows of the step on the n side. Columns do not
// mix, so a row's bits do not depend on its neighbours.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once a step: they need not stay in the first-level cache.
__device__ __forceinline__ uint4 load_weights(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(~0u, v, lane);
    return v;
}

// Every block of the grid arrives before any leaves; stores before it are seen after it. All blocks are resident at once.
struct Grid {
    u32* counter;
    u32 target;
    __device__ void barrier() {
        __syncthreads();
        target += gridDim.x;
        if (threadIdx.x == 0) {
            u32 seen;
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
            } while (seen < target);
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
        }
        __syncthreads();
    }
};

// Shared memory begins with a copy of the table, because each stage begins with its addresses.
extern __shared__ __align__(128) char shared_bytes[];
constexpr int TABLE_BYTES = (sizeof(Table) + 127) / 128 * 128;

__device__ __forceinline__ const Table& fetch_table(const void* from) {
    const uint2* words = static_cast<const uint2*>(from);
    for (int i = threadIdx.x; i < int(sizeof(Table) / 8); i += THREADS) reinterpret_cast<uint2*>(shared_bytes)[i] = words[i];
    __syncthreads();
    return *reinterpret_cast<const Table*>(shared_bytes);
}

} // namespace lh
