// CRC-32, as zlib computes it, of blocks of a pool in GPU memory: the part that is linear in the data (cuda_checksum.py adds the rest).
//
// All threads of a row of the grid take a block's words in turns: thread i of n has words i, i + n, i + 2n, ... It multiplies what it has
// by x^(32 n) and adds its next word, and in the end by x^(32 d), d being the distance from its last word to the block's end. Bits are
// reflected, so bit 31 is the coefficient of x^0, as in zlib's own words.
//
// The driver compiles cuda_checksum.ptx, which is made of this file: python -m services.cuda_checksum

typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define LH_DEVICE __device__ __forceinline__
#else
#define LH_DEVICE static inline
#endif

// a * b modulo the polynomial.
LH_DEVICE u32 multiply(u32 a, u32 b) {
    u32 product = 0;
    for (int i = 0; i < 32; i++) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = (b >> 1) ^ (0xEDB88320u & (0u - (b & 1u)));
    }
    return product;
}

// What one thread of num_threads adds to the sum. tables [4][256]: each byte of a word times x^(32 num_threads); powers [num_threads + 1]:
// x^(32 d) for each distance d.
LH_DEVICE u32 thread_sum(const u32* words, u64 num_words, u32 thread, u32 num_threads, const u32* tables, const u32* powers) {
    if (thread >= num_words) return 0;
    u64 at = thread;
    u32 sum = words[at];
    while (at + num_threads < num_words) {
        at += num_threads;
        sum = tables[sum & 255] ^ tables[256 + (sum >> 8 & 255)] ^ tables[512 + (sum >> 16 & 255)] ^ tables[768 + (sum >> 24)]
            ^ words[at];
    }
    return multiply(sum, powers[num_words - at]);
}

#ifdef __CUDACC__
// One row of the grid for each block of the pool; sums are 0 before.
extern "C" __global__ void leasehold_crc32(
    const u64* addresses, u64 num_words, const u32* tables, const u32* powers, u32* sums) {
    const u32* words = reinterpret_cast<const u32*>(addresses[blockIdx.y]);
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    u32 sum = thread_sum(words, num_words, thread, gridDim.x * blockDim.x, tables, powers);
    for (int lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(0xFFFFFFFFu, sum, lane);
    if (threadIdx.x % 32 == 0) atomicXor(&sums[blockIdx.y], sum);
}
#endif
