// The model's geometry, which the host defines as LH_* before this text, and the table that it fills once.
namespace lh {

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

// Shared memory begins with a copy of the table, because each stage begins with its addresses.
constexpr int TABLE_BYTES = (sizeof(Table) + 127) / 128 * 128;

__device__ __forceinline__ const Table& fetch_table(const void* from) {
    const uint2* words = static_cast<const uint2*>(from);
    for (int i = threadIdx.x; i < int(sizeof(Table) / 8); i += THREADS) reinterpret_cast<uint2*>(shared_bytes)[i] = words[i];
    __syncthreads();
    return *reinterpret_cast<const Table*>(shared_bytes);
}

} // namespace lh
