// Cuts staged blocks of a peer into blocks of another size, dtype or share of the KV heads.
//
// A block is [planes, tokens, heads, head_dim], a plane being the keys or the values of one layer.
// A piece is a run of tokens in every plane; where both sides hold the same heads it is contiguous.
// Numbers are rounded to nearest even, as `penstock.transfer.reshape.convert` does it. Not with the
// processor's own bfloat16 instructions, which take the smallest numbers for zero.
// What comes out is read when the request runs, so it goes around the cache where runs are long.
#include <cstring>
#include <type_traits>

#include "api.h"
#include "stream.h"

namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline void widen(const bfloat16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits((uint32_t)from[i].bits << 16);
}

inline void narrow(const float* from, bfloat16* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = to_bits(from[i]);
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        to[i].bits = is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

#if defined(__F16C__)
inline void widen(const float16* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
    for (; i < count; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

inline void narrow(const float* from, float16* to, int64_t count) {
    constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearestEven));
    for (; i < count; ++i) to[i].bits = _cvtss_sh(from[i], kNearestEven);
}
#else
inline void widen(const float16* from, float* to, int64_t count) {
    const _Float16* halves = reinterpret_cast<const _Float16*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = (float)halves[i];
}

inline void narrow(const float* from, float16* to, int64_t count) {
    _Float16* halves = reinterpret_cast<_Float16*>(to);
    for (int64_t i = 0; i < count; ++i) halves[i] = (_Float16)from[i];
}
#endif

// From one dtype to another by way of float, some at a time so that they stay in the first cache.
template <typename To, typename From>
void convert_run(uint8_t* to, const uint8_t* from, int64_t count) {
    constexpr int64_t kAtOnce = 1024;
    alignas(64) float wide[kAtOnce];
    alignas(64) uint8_t result[kAtOnce * sizeof(To)];
    for (int64_t left = count; left > 0; left -= kAtOnce) {
        const int64_t size = left < kAtOnce ? left : kAtOnce;
        const uint8_t* out = reinterpret_cast<const uint8_t*>(wide);
        const float* in = reinterpret_cast<const float*>(from);
        if constexpr (!std::is_same_v<From, float>) {
            widen(reinterpret_cast<const From*>(from), wide, size);
            in = wide;
        }
        if constexpr (!std::is_same_v<To, float>) {
            narrow(in, reinterpret_cast<To*>(result), size);
            out = result;
        }
        stream(to, out, size * sizeof(To));
        from += size * sizeof(From);
        to += size * sizeof(To);
    }
}

template <int64_t kBytes>
void copy_run(uint8_t* to, const uint8_t* from, int64_t count) {
    stream(to, from, count * kBytes);
}

using Run = void (*)(uint8_t*, const uint8_t*, int64_t);

// By the dtypes of `library.DTYPES`: from, to.
constexpr Run kRuns[3][3] = {
    {copy_run<4>, convert_run<bfloat16, float>, convert_run<float16, float>},
    {convert_run<float, bfloat16>, copy_run<2>, convert_run<float16, bfloat16>},
    {convert_run<float, float16>, convert_run<bfloat16, float16>, copy_run<2>},
};

// Where the shared heads lie in the blocks of one side; strides in bytes.
struct Blocks {
    int64_t head_offset, token, plane, block;

    Blocks(const penstock_side& side, int64_t num_planes, int64_t head_dim) {
        const int64_t head = head_dim * (side.dtype == 0 ? 4 : 2);
        head_offset = side.first_head * head;
        token = side.num_heads * head;
        plane = side.block_size * token;
        block = num_planes * plane;
    }

    int64_t at(int64_t index, int64_t slot) const {
        return index * block + slot * token + head_offset;
    }
};

}  // namespace

void penstock_cut(const penstock_cutting* cutting, const int64_t* pieces, int64_t num_pieces) {
    const penstock_side &theirs = cutting->theirs, &ours = cutting->ours;
    const Blocks from(theirs, cutting->num_planes, cutting->head_dim);
    const Blocks to(ours, cutting->num_planes, cutting->head_dim);
    const Run run = kRuns[theirs.dtype][ours.dtype];
    const bool is_whole = theirs.num_heads == cutting->num_heads && ours.num_heads == cutting->num_heads;
    const int64_t row = cutting->num_heads * cutting->head_dim;
    for (int64_t i = 0; i < num_pieces; ++i) {
        const int64_t* piece = pieces + 5 * i;
        const uint8_t* in = theirs.blocks + from.at(piece[0], piece[1]);
        uint8_t* out = ours.blocks + to.at(piece[2], piece[3]);
        for (int64_t plane = 0; plane < cutting->num_planes; ++plane) {
            if (is_whole)
                run(out, in, piece[4] * row);
            else
                for (int64_t token = 0; token < piece[4]; ++token)
                    run(out + token * to.token, in + token * from.token, row);
            in += from.plane;
            out += to.plane;
        }
    }
    end_stream();
}
