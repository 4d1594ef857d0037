// Sparsified: of the numbers of a token and head the larger half, as they are; the others are zero.
//
// A head is a bitmap [head_dim] bits, lowest first, and the numbers that it marks, in order. Pruned
// by magnitude per token, as Mustafar does it (arXiv 2505.22913).
#include "methods.h"

namespace penstock {
namespace {

constexpr int64_t HEAD_DIM_MAX = 1024;

// The size of a number: its bits without the sign, in a type that is signed all the same,
// since most machines compare nothing else.
template <class T>
struct Number;
template <>
struct Number<uint16_t> {
    using Size = int16_t;
};
template <>
struct Number<uint32_t> {
    using Size = int32_t;
};

// How many sizes reach a limit; `count` is a multiple of 16.
template <class Size>
inline int64_t count_from(const Size* sizes, int64_t count, Size limit) {
    typedef Size Some __attribute__((vector_size(32)));
    Some reached{};
    for (int64_t i = 0; i < count; i += 32 / (int64_t)sizeof(Size)) {
        Some some;
        memcpy(&some, sizes + i, sizeof some);
        reached -= some >= limit;  // a true comparison is -1
    }
    // Lanes are small, so that they can be added four or two at a time.
    uint64_t lanes[sizeof reached / 8], sum = 0;
    memcpy(lanes, &reached, sizeof reached);
    for (uint64_t some : lanes) sum += some;
    return sizeof(Size) == 2 ? sum * 0x0001000100010001ull >> 48 : (sum + (sum >> 32)) & 0xffffffff;
}

// The keep-th largest of the sizes.
template <class Size>
Size threshold(const Size* sizes, int64_t count, int64_t keep) {
    Size found = 0;
    for (int bit = 8 * sizeof(Size) - 2; bit >= 0; bit--) {
        const Size next = found | (Size)1 << bit;
        if (count_from(sizes, count, next) >= keep) found = next;
    }
    return found;
}

// Eight bytes of 0 or 1 as the bits of one, the first the lowest.
inline uint8_t gather_bits(const uint8_t* marks) {
    uint64_t bytes = 0;
    for (int i = 0; i < 8; i++) bytes |= (uint64_t)marks[i] << (8 * i);
    return bytes * 0x0102040810204080ull >> 56;
}

template <class Bits>
void encode_head(const uint8_t* head, int64_t size, uint8_t* encoded) {
    using Size = typename Number<Bits>::Size;
    const int64_t keep = size / 2;
    Bits bits[HEAD_DIM_MAX], kept[HEAD_DIM_MAX + 1];
    Size sizes[HEAD_DIM_MAX];
    uint8_t marks[HEAD_DIM_MAX];
    memcpy(bits, head, size * sizeof(Bits));
    for (int64_t i = 0; i < size; i++) sizes[i] = bits[i] & ((Bits)-1 >> 1);
    const Size limit = threshold(sizes, size, keep);
    for (int64_t i = 0; i < size; i++) marks[i] = sizes[i] >= limit;
    // Of those at the limit the first are kept, as many as there is room for.
    int64_t surplus = count_from(sizes, size, limit) - keep;
    for (int64_t i = size - 1; surplus; i--) {
        const bool is_dropped = sizes[i] == limit;
        marks[i] &= !is_dropped;
        surplus -= is_dropped;
    }
    int64_t num_kept = 0;
    for (int64_t i = 0; i < size; i++) {
        kept[num_kept] = bits[i];
        num_kept += marks[i];
    }
    for (int64_t i = 0; i < size; i += 8) encoded[i / 8] = gather_bits(marks + i);
    memcpy(encoded + size / 8, kept, keep * sizeof(Bits));
}

// Never reads more numbers than there are, whatever the bitmap says.
template <class Bits>
void decode_head(const uint8_t* encoded, int64_t size, uint8_t* head) {
    const int64_t keep = size / 2;
    Bits kept[HEAD_DIM_MAX], bits[HEAD_DIM_MAX];
    memcpy(kept, encoded + size / 8, keep * sizeof(Bits));
    kept[keep] = 0;
    int64_t taken = 0;
    for (int64_t i = 0; i < size; i += 8) {
        uint8_t byte = encoded[i / 8];
        while (__builtin_popcount(byte) > keep - taken) byte &= ~(1u << (31 - __builtin_clz(byte)));
        for (int64_t j = 0; j < 8; j++) {
            const Bits is_kept = byte >> j & 1;
            bits[i + j] = kept[taken] & (Bits)-is_kept;
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
