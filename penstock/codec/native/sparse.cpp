// Sparsified: of the numbers of a token and head the larger half, as they are; the others are zero.
//
// A head is a bitmap [head_dim] bits, lowest first, and the numbers that it marks, in order. Pruned
// by magnitude per token, as Mustafar does it (arXiv 2505.22913).
#include "methods.h"

namespace penstock {
namespace {

constexpr int64_t HEAD_DIM_MAX = 1024;

// The bits of `count` numbers without their signs, as many as a number has.
template <class Bits>
inline Bits size_of(Bits bits) {
    return bits & (Bits)~((Bits)1 << (8 * sizeof(Bits) - 1));
}

// The keep-th largest of the sizes.
template <class Bits>
Bits threshold(const Bits* sizes, int64_t count, int64_t keep) {
    Bits found = 0;
    for (int bit = 8 * sizeof(Bits) - 2; bit >= 0; bit--) {
        const Bits next = found | (Bits)1 << bit;
        Bits larger = 0;
        for (int64_t i = 0; i < count; i++) larger += sizes[i] >= next;
        if (larger >= keep) found = next;
    }
    return found;
}

template <class Bits>
void encode_head(const uint8_t* head, int64_t size, uint8_t* encoded) {
    const int64_t keep = size / 2;
    Bits bits[HEAD_DIM_MAX], sizes[HEAD_DIM_MAX], kept[HEAD_DIM_MAX + 1];
    uint8_t marks[HEAD_DIM_MAX];
    memcpy(bits, head, size * sizeof(Bits));
    for (int64_t i = 0; i < size; i++) sizes[i] = size_of(bits[i]);
    const Bits limit = threshold(sizes, size, keep);
    Bits larger = 0;
    for (int64_t i = 0; i < size; i++) larger += sizes[i] > limit;
    // Of those at the limit the first are kept, as many as there is room for.
    int64_t equal = keep - larger, num_kept = 0;
    for (int64_t i = 0; i < size; i++) {
        const bool is_equal = sizes[i] == limit && equal > 0;
        equal -= is_equal;
        marks[i] = sizes[i] > limit || is_equal;
        kept[num_kept] = bits[i];
        num_kept += marks[i];
    }
    for (int64_t i = 0; i < size; i += 8) {
        uint8_t byte = 0;
        for (int64_t j = 0; j < 8; j++) byte |= marks[i + j] << j;
        encoded[i / 8] = byte;
    }
    memcpy(encoded + size / 8, kept, keep * sizeof(Bits));
}

// Never reads more numbers than there are, whatever the bitmap says.
template <class Bits>
void decode_head(const uint8_t* encoded, int64_t size, uint8_t* head) {
    const int64_t keep = size / 2;
    Bits kept[HEAD_DIM_MAX], bits[HEAD_DIM_MAX];
    memcpy(kept, encoded + size / 8, keep * sizeof(Bits));
    int64_t taken = 0;
    for (int64_t i = 0; i < size; i += 8) {
        const uint8_t byte = encoded[i / 8];
        for (int64_t j = 0; j < 8; j++) {
            const bool is_kept = byte >> j & 1 && taken < keep;
            bits[i + j] = kept[taken < keep ? taken : 0] & (Bits)-(Bits)is_kept;
            taken += is_kept;
        }
    }
    memcpy(head, bits, size * sizeof(Bits));
}

int64_t head_bytes(const Shape& shape) {
    return shape.head_dim / 8 + shape.head_dim / 2 * element_bytes(shape);
}

int64_t encoded_bytes(const Shape& shape) {
    return num_elements(shape) / shape.head_dim * head_bytes(shape);
}

int64_t encode(const Shape& shape, const uint8_t* block, uint8_t* encoded, Scratch&) {
    const auto each = shape.dtype == 0 ? encode_head<uint32_t> : encode_head<uint16_t>;
    const int64_t num_heads = num_elements(shape) / shape.head_dim;
    for (int64_t i = 0; i < num_heads; i++)
        each(block + i * shape.head_dim * element_bytes(shape), shape.head_dim,
             encoded + i * head_bytes(shape));
    return encoded_bytes(shape);
}

bool decode(const Shape& shape, const uint8_t* encoded, int64_t, uint8_t* block, Sink, Scratch&) {
    const auto each = shape.dtype == 0 ? decode_head<uint32_t> : decode_head<uint16_t>;
    const int64_t num_heads = num_elements(shape) / shape.head_dim;
    for (int64_t i = 0; i < num_heads; i++)
        each(encoded + i * head_bytes(shape), shape.head_dim,
             block + i * shape.head_dim * element_bytes(shape));
    return true;
}

}  // namespace

const Method kSparse{encoded_bytes, encode, decode};

}  // namespace penstock
