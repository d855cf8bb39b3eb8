// Products of quantised (or bf16) weights with rows of the step.
//
// One accumulation order for every output, whatever the number of rows: the inputs are cut into splits of fixed length, a split is
// summed unit by unit on the tensor cores, and the splits are added in their order.
namespace lh {

// Scale and bias of a group: two bf16 where the checkpoint has bf16, else two floats.
#if LH_WIDE_SCALES
typedef float2 Scale;
__device__ __forceinline__ float2 widen(Scale s) { return s; }
#else
typedef u32 Scale;
__device__ __forceinline__ float2 widen(Scale s) { return make_float2(__uint_as_float(s << 16), __uint_as_float(s & 0xFFFF0000u)); }
#endif

// Weights of one unit as they come from memory: BITS / 4 vectors of 16 bytes a thread.
template <int BITS> struct Raw {
    uint4 v[BITS / 4];
    Scale low, high; // of rows g and g + 8
};

__device__ __forceinline__ u64 unit_vectors(u64 bits) { return bits * 8; } // uint4 of a unit: 16 * 64 * bits / 128

template <int BITS> __device__ __forceinline__ Raw<BITS> load_unit(const Linear& w, u64 unit) {
    const int lane = threadIdx.x & 31;
    Raw<BITS> raw;
    const uint4* at = w.tiles + unit * (BITS * 8) + lane;
#pragma unroll
    for (int i = 0; i < BITS / 4; ++i) raw.v[i] = load_weights(at + i * 32);
    if (BITS < 16) {
        raw.low = __ldg(reinterpret_cast<const Scale*>(w.scales) + unit * 16 + (lane >> 2));
        raw.high = __ldg(reinterpret_cast<const Scale*>(w.scales) + unit * 16 + (lane >> 2) + 8);
    }
    return raw;
}

__device__ __forceinline__ __nv_bfloat162 as_pair(u32 bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }
__device__ __forceinline__ u32 as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<u32*>(&pair); }

// Nibbles j and j + 4 of a word as bf16 of scale * q + bias, rounded once: 128 + q is exact, and so is q.
__device__ __forceinline__ u32 dequant4(u32 word, int j, Scale scale) {
    const u32 magic = ((word >> (4 * j)) & 0x000F000Fu) | 0x43004300u;
#if LH_WIDE_SCALES
    const float q0 = __uint_as_float(magic << 16) - 128.0f, q1 = __uint_as_float(magic & 0xFFFF0000u) - 128.0f;
    return pack(fmaf(q0, scale.x, scale.y), fmaf(q1, scale.x, scale.y));
#else
    const u32 s = __byte_perm(scale, 0, 0x1010), b = __byte_perm(scale, 0, 0x3232);
    return as_bits(__hfma2(__hsub2(as_pair(magic), as_pair(0x43004300u)), as_pair(s), as_pair(b)));
#endif
}

__device__ __forceinline__ u32 dequant8(u32 first, u32 second, int j, Scale scale) {
    const float2 s = widen(scale);
    const float q0 = __uint_as_float(__byte_perm(first, 0x4B000000u, 0x7540 | j)) - 8388608.0f;
    const float q1 = __uint_as_float(__byte_perm(second, 0x4B000000u, 0x7540 | j)) - 8388608.0f;
    return pack(fmaf(q0, s.x, s.y), fmaf(q1, s.x, s.y));
}

// The two A fragments (16 inputs each) of half `span` of a unit.
template <int BITS> __device__ __forceinline__ void fragments(const Raw<BITS>& raw, int span, u32 (&a)[2][4]) {
    if constexpr (BITS == 4) {
        const u32 w0 = span ? raw.v[0].z : raw.v[0].x, w1 = span ? raw.v[0].w : raw.v[0].y;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            a[j >> 1][(j & 1) * 2] = dequant4(w0, j, raw.low);
            a[j >> 1][(j & 1) * 2 + 1] = dequant4(w1, j, raw.high);
        }
    } else if constexpr (BITS == 8) {
        const uint4 w = raw.v[span];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            a[j >> 1][(j & 1) * 2] = dequant8(w.x, w.y, j, raw.low);
            a[j >> 1][(j & 1) * 2 + 1] = dequant8(w.z, w.w, j, raw.high);
        }
    } else {
        const uint4 w0 = raw.v[span * 2], w1 = raw.v[span * 2 + 1];
        a[0][0] = w0.x, a[0][1] = w1.x, a[0][2] = w0.y, a[0][3] = w1.y;
        a[1][0] = w0.z, a[1][1] = w1.z, a[1][2] = w0.w, a[1][3] = w1.w;
    }
}

// Where each thread finds its columns: column g of tile n is row `row[n]` of shuffled inputs. One that is not there repeats another,
// because columns do not mix, and nobody reads its product.
struct Columns {
    const bf16* inputs;
    int width, tiles;
    int row[SMALL_ROWS / 8];
};

__device__ __forceinline__ uint4 load_column(const Columns& x, int n, int at) {
    return *reinterpret_cast<const uint4*>(x.inputs + u64(x.row[n]) * x.width + at);
}

// Brings the lines of a split's columns into the first-level cache while the weights are on their way: units one after the other
// would wait for the second level each time.
__device__ __forceinline__ void touch(const Columns& x, int n, int first, int count) {
    for (int unit = threadIdx.x & 3; unit < count; unit += 4) {
        u32 unused;
        asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(unused) : "l"(x.inputs + u64(x.row[n]) * x.width + (first + unit) * UNIT));
    }
}

// c += one unit's product, for all columns.
template <int BITS, int TILES>
__device__ __forceinline__ void unit_product(const Raw<BITS>& raw, const Columns& x, int unit, float (&c)[TILES][4]) {
    const int quad = (threadIdx.x & 3) * 8;
#pragma unroll
    for (int span = 0; span < 2; ++span) {
        u32 a[2][4];
        fragments<BITS>(raw, span, a);
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const uint4 b = load_column(x, n, unit * UNIT + span * 32 + quad);
            mma(c[n], a[0], b.x, b.y);
            mma(c[n], a[1], b.z, b.w);
        }
    }
}

// One split of one tile, its weights straight into registers: where a warp has many short splits.
template <int BITS, int TILES>
__device__ __forceinline__ void direct_product(const Linear& w, u64 base, int first, int count, const Columns& x, float4* out) {
    constexpr int AHEAD = 32 / BITS;
    const int lane = threadIdx.x & 31;
    float c[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
        touch(x, n, first, count);
    }
    for (int from = 0; from < count; from += AHEAD) {
        Raw<BITS> raw[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (from + i < count) raw[i] = load_unit<BITS>(w, base + from + i);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (from + i >= count) break;
            asm volatile("" ::: "memory"); // columns of later units are not loaded yet: their registers are needed
            unit_product<BITS, TILES>(raw[i], x, first + from + i, c);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) out[n * 32 + lane] = make_float4(c[n][0], c[n][1], c[n][2], c[n][3]);
}

template <int WIDTHS>
__device__ __forceinline__ void direct_product_any(const Linear& w, u64 base, int first, int count, const Columns& x, float4* out) {
    if constexpr (WIDTHS & (WIDTHS - 1)) {
        constexpr int LOWEST = WIDTHS & -WIDTHS;
        if (w.bits == LOWEST) direct_product_any<LOWEST>(w, base, first, count, x, out);
        else direct_product_any<WIDTHS - LOWEST>(w, base, first, count, x, out);
    } else {
        if (x.tiles == 1) direct_product<WIDTHS, 1>(w, base, first, count, x, out);
        else if (x.tiles == 2) direct_product<WIDTHS, 2>(w, base, first, count, x, out);
        else direct_product<WIDTHS, 4>(w, base, first, count, x, out);
    }
}

// Shared memory in which each warp's next weights arrive, and their scales.
constexpr int WEIGHT_BYTES = 4096 + 8 * 16 * int(sizeof(Scale));
__device__ __forceinline__ char* weight_area();

__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from) : "memory");
}

// One split of one tile: the sum over units [first, first + count) for all columns. Copies of its first 4 KiB are started early, so
// that they are on their way while a warp finishes its last tile or waits for other blocks; they take no registers.
template <int BITS> struct Split {
    static constexpr int AHEAD = 32 / BITS, VECTORS = BITS / 4;

    __device__ __forceinline__ void load(const Linear& w, u64 base, int count) {
        const int lane = threadIdx.x & 31;
        char* area = weight_area();
        __syncwarp(); // the warp has read what was there
        const uint4* from = w.tiles + base * (BITS * 8) + lane;
#pragma unroll
        for (int i = 0; i < AHEAD * VECTORS; ++i)
            if (i < count * VECTORS) copy16(area + (i * 32 + lane) * 16, from + i * 32);
        if constexpr (BITS < 16) {
            const int here = (count < AHEAD ? count : AHEAD) * int(sizeof(Scale)); // vectors of 16 bytes
            const uint4* scales = reinterpret_cast<const uint4*>(reinterpret_cast<const Scale*>(w.scales) + base * 16);
            for (int i = lane; i < here; i += 32) copy16(area + 4096 + i * 16, scales + i);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ __forceinline__ Raw<BITS> unit(int index) const {
        const int lane = threadIdx.x & 31;
        const char* area = weight_area();
        Raw<BITS> raw;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) raw.v[i] = reinterpret_cast<const uint4*>(area)[(index * VECTORS + i) * 32 + lane];
        if (BITS < 16) {
            const Scale* scales = reinterpret_cast<const Scale*>(area + 4096) + index * 16;
            raw.low = scales[lane >> 2], raw.high = scales[(lane >> 2) + 8];
        }
        return raw;
    }

    // Leaves the sum at `out` as fragments, a vector a thread and column tile.
    template <int TILES>
    __device__ __forceinline__ void product(const Linear& w, u64 base, int first, int count, const Columns& x, float4* out) {
        const int lane = threadIdx.x & 31;
        float c[TILES][4];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
            touch(x, n, first, count);
        }
        for (int from = 0; from < count; from += AHEAD) {
            if (from) load(w, base + from, count - from);
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncwarp();
            // Hardly unrolled: the whole step must stay in the instruction cache, for each stage runs once a layer.
#pragma unroll(TILES == 1 ? 2 : 1)
            for (int i = 0; i < AHEAD && from + i < count; ++i) {
                unit_product<BITS, TILES>(unit(i), x, first + from + i, c);
            }
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n) out[n * 32 + lane] = make_float4(c[n][0], c[n][1], c[n][2], c[n][3]);
    }

    __device__ __forceinline__ void product(const Linear& w, u64 base, int first, int count, const Columns& x, float4* out) {
        if (x.tiles == 1) product<1>(w, base, first, count, x, out);
        else if (x.tiles == 2) product<2>(w, base, first, count, x, out);
        else product<4>(w, base, first, count, x, out);
    }
};

// Any of the widths that the checkpoint has in this place: WIDTHS is their sum, 4, 8 and 16. Loads start early where there is one.
template <int WIDTHS> struct AnySplit {
    static constexpr bool IS_ONE = (WIDTHS & (WIDTHS - 1)) == 0;
    static constexpr int LOWEST = WIDTHS & -WIDTHS;
    Split<LOWEST> split;

    __device__ __forceinline__ void load(const Linear& w, u64 base, int count) {
        if constexpr (IS_ONE) split.load(w, base, count);
    }

    __device__ __forceinline__ void product(const Linear& w, u64 base, int first, int count, const Columns& x, float4* out) {
        if constexpr (IS_ONE) {
            split.product(w, base, first, count, x, out);
        } else if (w.bits == LOWEST) {
            split.load(w, base, count);
            split.product(w, base, first, count, x, out);
        } else {
            AnySplit<WIDTHS - LOWEST> rest;
            if constexpr (AnySplit<WIDTHS - LOWEST>::IS_ONE) rest.load(w, base, count);
            rest.product(w, base, first, count, x, out);
        }
    }
};

// How the inputs of a layer are cut: by its width alone. No more splits than a block has warps.
struct Splits {
    int units, count, length;
    __device__ constexpr Splits(int inputs, int longest) : units(inputs / UNIT), count(0), length(0) {
        const int most = (units + WARPS - 1) / WARPS > longest ? (units + WARPS - 1) / WARPS : longest;
        count = (units + most - 1) / most;
        length = (units + count - 1) / count;
    }
};

constexpr int LONG_SPLIT = 8, ROUTER_SPLIT = 2;

} // namespace lh
