// The C interface of the codecs; `library.py` declares the same to Python.
#pragma once

#include <cstdint>

// Shape of a group's blocks: [num_planes, block_size, width] elements, width = heads * head_dim.
// Even planes are keys, odd ones values.
struct penstock_shape {
    int64_t num_planes;
    int64_t block_size;
    int64_t width;
    int64_t head_dim;
    int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
};

extern "C" {

// Bytes that a block of this shape takes at most, by the method's number in `library.METHODS`.
int64_t penstock_encoded_bytes(int64_t method, const penstock_shape* shape);

// Encodes block ids[i] of a pool to encoded + i * stride, and says in lengths[i] how many bytes
// that are.
void penstock_encode(int64_t method, const penstock_shape* shape, const uint8_t* pool,
                     const int64_t* ids, int64_t num_blocks, uint8_t* encoded, int64_t stride,
                     int64_t* lengths);

// Decodes encoded + i * stride, of which `stride` bytes may be read, into block ids[i] of a pool.
// Returns the first i that cannot have been encoded, whose block then holds anything, or -1.
int64_t penstock_decode(int64_t method, const penstock_shape* shape, const uint8_t* encoded,
                        int64_t stride, int64_t num_blocks, uint8_t* pool, const int64_t* ids);
}
