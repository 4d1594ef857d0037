// What a method has to provide; one file each. A block is what `api.h` says.
#pragma once

#include <type_traits>
#include <vector>

#include "api.h"
#include "vector.h"

namespace penstock {

using Shape = penstock_shape;

inline int64_t element_bytes(const Shape& shape) {
    return shape.dtype == 0 ? 4 : 2;
}
inline int64_t num_elements(const Shape& shape) {
    return shape.num_planes * shape.block_size * shape.width;
}
inline int64_t block_bytes(const Shape& shape) {
    return num_elements(shape) * element_bytes(shape);
}

struct Scratch {
    std::vector<uint16_t> words;
    std::vector<uint8_t> symbols;
};

struct Method {
    int64_t (*encoded_bytes)(const Shape&);
    // Returns the bytes written.
    int64_t (*encode)(const Shape&, const uint8_t* block, uint8_t* encoded, Scratch&);
    // Reads no more than `size` bytes; false when they cannot have been encoded.
    bool (*decode)(const Shape&, const uint8_t* encoded, int64_t size, uint8_t* block, Sink,
                   Scratch&);
};

extern const Method kInt8, kInt4, kFp8, kSparse, kLossless;

// Calls `function` with a null pointer of the shape's element type.
template <class Function>
auto with_type(const Shape& shape, Function function) {
    if (shape.dtype == 0) return function((float*)nullptr);
    if (shape.dtype == 1) return function((bfloat16*)nullptr);
    return function((float16*)nullptr);
}

}  // namespace penstock
