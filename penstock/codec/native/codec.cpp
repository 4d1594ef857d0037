// The entry points: many blocks in one call.
#include "methods.h"

namespace {

using namespace penstock;

constexpr int64_t kStreamFrom = 4 << 20;  // bytes of a call; below it the cache is the better place

const Method& method_of(int64_t number) {
    static const Method* const kMethods[] = {&kLossless, &kFp8, &kInt8, &kInt4, &kSparse};
    return *kMethods[number];
}

}  // namespace

int64_t penstock_encoded_bytes(int64_t method, const penstock_shape* shape) {
    return method_of(method).encoded_bytes(*shape);
}

void penstock_encode(int64_t method, const penstock_shape* shape, const uint8_t* pool,
                     const int64_t* ids, int64_t num_blocks, uint8_t* encoded, int64_t stride,
                     int64_t* lengths) {
    const Method& chosen = method_of(method);
    const int64_t bytes = block_bytes(*shape);
    Scratch scratch;
    for (int64_t i = 0; i < num_blocks; i++)
        lengths[i] = chosen.encode(*shape, pool + ids[i] * bytes, encoded + i * stride, scratch);
}

int64_t penstock_decode(int64_t method, const penstock_shape* shape, const uint8_t* encoded,
                        int64_t stride, int64_t num_blocks, uint8_t* pool, const int64_t* ids) {
    const Method& chosen = method_of(method);
    const int64_t bytes = block_bytes(*shape);
    // A row must begin with a line for its lines to be aligned.
    const int64_t alignment = (int64_t)pool | bytes | shape->width * element_bytes(*shape);
    const Sink sink{num_blocks * bytes >= kStreamFrom && alignment % LINE == 0};
    Scratch scratch;
    for (int64_t i = 0; i < num_blocks; i++) {
        const uint8_t* from = encoded + i * stride;
        if (!chosen.decode(*shape, from, stride, pool + ids[i] * bytes, sink, scratch)) {
            sink.end();
            return i;
        }
    }
    sink.end();
    return -1;
}
