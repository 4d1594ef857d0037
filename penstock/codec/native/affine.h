// What int8 and int4 share with their wide forms: planes, groups, and how a group is settled.
#pragma once

#include "methods.h"

namespace penstock {
namespace {

constexpr int64_t GROUP = 32;
constexpr int64_t CHUNK = 1024;  // groups whose parameters are kept as floats
constexpr int64_t AHEAD = 4096;  // bytes of codes
constexpr float LARGEST = 65504.f;

inline int64_t group_of(int64_t size) {
    return size % 32 == 0 ? 32 : size % 16 == 0 ? 16 : size & -size;
}

struct Plane {
    int64_t group, num_groups, bytes;
    bool is_key;

    Plane(const Shape& shape, int64_t bits, bool is_key) : is_key(is_key) {
        group = group_of(is_key ? shape.block_size : shape.head_dim);
        num_groups = shape.block_size * shape.width / group;
        bytes = 4 * num_groups + shape.block_size * shape.width * bits / 8;
    }
};

struct Range {
    Float low, inverse;
};

// Stores low and scale of UNIT groups as float16, `count` of them, and returns what to encode with.
inline Range settle(Float low, Float high, float levels, float16* lows, float16* scales,
                    int64_t count) {
    alignas(LINE) float16 rounded[UNIT];
    // Adding zero makes one of the two zeros.
    store(rounded, min(max(low, splat(-LARGEST)), splat(LARGEST)) + 0.f);
    low = load(rounded);
    store_some(lows, low, count);
    store(rounded, min(max((high - low) / levels, splat(0.f)), splat(LARGEST)));
    const Float scale = load(rounded);
    store_some(scales, scale, count);
    return {low, scale > 0.f ? 1.f / scale : splat(0.f)};
}

}  // namespace
}  // namespace penstock
