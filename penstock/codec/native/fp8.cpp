// fp8: a float8 (e4m3: sign, 4 bits of exponent, 3 of mantissa) times the scale of its token and
// head, which takes the largest number to 448.
//
// A plane is scale [block_size, heads] in float16, then codes [block_size, width].
#include "methods.h"

namespace penstock {
namespace {

constexpr float LARGEST = 448.f;
constexpr float SMALLEST_NORMAL = 1.f / 64;
// The distance of neighbours from 2^14 on is that of the numbers below the smallest normal one.
constexpr float SUBNORMAL_MAGIC = 16384.f, SUBNORMAL_STEP = 1.f / 512;
constexpr uint32_t EXPONENT_SHIFT = 120;  // of float's bias to e4m3's

// Rounds to the nearest, ties to even.
inline Word to_e4m3(Float value) {
    value = min(max(value, splat(-LARGEST)), splat(LARGEST));
    const Float size = magnitude(value);
    Word normal = (Word)size;
    normal = ((normal + 0x7ffffu + ((normal >> 20) & 1u)) >> 20) - (EXPONENT_SHIFT << 3);
    const Word subnormal = (Word)(size + SUBNORMAL_MAGIC) - (Word)splat(SUBNORMAL_MAGIC);
    const Word code = size < SMALLEST_NORMAL ? subnormal : normal;
    return code | ((Word)value >> 24 & 0x80u);
}

inline Float from_e4m3(Word code) {
    const Word size = code & 0x7fu;
    const Float normal = (Float)((size << 20) + (EXPONENT_SHIFT << 23));
    const Float subnormal = __builtin_convertvector((Int)size, Float) * SUBNORMAL_STEP;
    const Float result = (Int)size < 8 ? subnormal : normal;
    return (Float)((Word)result | (code & 0x80u) << 24);
}

template <class T>
void encode_plane(const Shape& shape, const T* rows, uint8_t* encoded) {
    const int64_t num_groups = shape.block_size * shape.width / shape.head_dim;
    uint8_t* codes = encoded + 2 * num_groups;
    for (int64_t done = 0; done < num_groups; done += UNIT) {
        const int64_t count = num_groups - done < UNIT ? num_groups - done : UNIT;
        const T* from = rows + done * shape.head_dim;
        Float largest_of{};
        for (int64_t i = 0; i < count; i++) {
            Float most{};
            for (int64_t c = 0; c < shape.head_dim; c += UNIT)
                most = max(most, magnitude(load(from + i * shape.head_dim + c)));
            largest_of[i] = largest(most);
        }
        alignas(LINE) float16 rounded[UNIT];
        store(rounded, min(largest_of / LARGEST, splat(65504.f)));
        const Float scale = load(rounded);
        store_some((float16*)encoded + done, scale, count);
        const Float inverse = scale > 0.f ? 1.f / scale : splat(0.f);
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = i * shape.head_dim; c < (i + 1) * shape.head_dim; c += UNIT)
                store_bytes(codes + done * shape.head_dim + c,
                            to_e4m3(load(from + c) * splat(inverse[i])));
    }
}

template <class T>
void decode_plane(const Shape& shape, const uint8_t* encoded, T* rows, Sink sink) {
    const int64_t num_groups = shape.block_size * shape.width / shape.head_dim;
    const uint8_t* codes = encoded + 2 * num_groups;
    const int64_t size = shape.head_dim;
    for (int64_t done = 0; done < num_groups; done += UNIT) {
        const int64_t count = num_groups - done < UNIT ? num_groups - done : UNIT;
        alignas(LINE) float scales[UNIT];
        store(scales, load_some((const float16*)encoded + done, count));
        const uint8_t* from = codes + done * size;
        T* to = rows + done * size;
        // Units in pairs, so that a line is whole; their heads may differ.
        int64_t c = 0;
        for (; c + 2 * UNIT <= count * size; c += 2 * UNIT)
            sink.put(to + c, from_e4m3(load_bytes(from + c)) * scales[c / size],
                     from_e4m3(load_bytes(from + c + UNIT)) * scales[(c + UNIT) / size]);
        if (c < count * size) store(to + c, from_e4m3(load_bytes(from + c)) * scales[c / size]);
    }
}

int64_t plane_bytes(const Shape& shape) {
    return shape.block_size * shape.width + 2 * shape.block_size * shape.width / shape.head_dim;
}

int64_t encoded_bytes(const Shape& shape) {
    return shape.num_planes * plane_bytes(shape);
}

int64_t encode(const Shape& shape, const uint8_t* block, uint8_t* encoded, Scratch&) {
    with_type(shape, [&](auto* type) {
        auto* rows = (decltype(type))block;
        for (int64_t i = 0; i < shape.num_planes; i++)
            encode_plane(shape, rows + i * shape.block_size * shape.width,
                         encoded + i * plane_bytes(shape));
    });
    return encoded_bytes(shape);
}

bool decode(const Shape& shape, const uint8_t* encoded, int64_t, uint8_t* block, Sink sink,
            Scratch&) {
    with_type(shape, [&](auto* type) {
        auto* rows = (decltype(type))block;
        for (int64_t i = 0; i < shape.num_planes; i++)
            decode_plane(shape, encoded + i * plane_bytes(shape),
                         rows + i * shape.block_size * shape.width, sink);
    });
    return true;
}

}  // namespace

const Method kFp8{encoded_bytes, encode, decode};

}  // namespace penstock
