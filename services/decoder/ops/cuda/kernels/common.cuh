// What all kernels share: the step that the host fills, bf16 tiles on tensor cores, and the barrier over the whole grid.
//
// The step is one persistent kernel, a block of 16 warps on every multiprocessor: launches would cost more than the work of a
// small step. Stages are separated by `Grid::barrier`.
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

// The step's header, in words of `step`; arrays follow at the offsets it names.
enum {
    ROWS, SAMPLE_ROWS, WORDS, TABLE_WIDTH, BLOCK_SIZE, MAX_SPLITS, POOL_LO, POOL_HI, STRIDE_LO, STRIDE_HI,
    AT_TOKENS, AT_POSITIONS, AT_SEQS, AT_STARTS, AT_CONTEXTS, AT_SLOTS, AT_SAMPLE_ROWS, AT_TEMPERATURES, AT_NOISE, AT_TABLES,
    KV_KIND, LAYER_ROWS, VALUE_ROWS, HEAD_ROWS, TOKEN_ROWS, HEADER_WORDS = 32 // distances in a block, in rows of head_dim elements
};

struct Step {
    const int* words;
    int rows, sample_rows;
    __device__ __forceinline__ int get(int index) const { return words[index]; }
    __device__ __forceinline__ const int* array(int index) const { return words + words[index]; }
    __device__ __forceinline__ char* pool() const {
        return reinterpret_cast<char*>((u64(u32(words[POOL_HI])) << 32) | u32(words[POOL_LO]));
    }
    // The row of a layer, K (0) or V (1), and a head, at a block's first token.
    __device__ __forceinline__ u64 block_row(int layer, int part, int head) const {
        return u64(layer) * words[LAYER_ROWS] + u64(part) * words[VALUE_ROWS] + u64(head) * words[HEAD_ROWS];
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

extern __shared__ __align__(128) char shared_bytes[];

} // namespace lh
