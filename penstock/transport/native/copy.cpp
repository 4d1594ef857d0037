// Copies blocks between two pools that are both mapped here.
//
// A small move is a memcpy for each span: what it lands in stays in the cache for whoever reads it
// next. A big one goes around the cache, and while a span is copied the beginning of the next is
// fetched, which no hardware prefetcher can guess. Measured against memcpy: bench/transfer.py.
#include <cstring>

#include "api.h"
#include "stream.h"

namespace {

constexpr int64_t kStreamFrom = 4 << 20;  // bytes of a move; below it the cache is the better place

}  // namespace

int64_t penstock_copy(const uint8_t* source, uint8_t* destination, int64_t block_bytes,
                      const int64_t* spans, int64_t num_spans) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; ++i) total += spans[3 * i + 2] * block_bytes;
    if (total >= kStreamFrom) {
        for (int64_t i = 0; i < num_spans; ++i) {
            const int64_t* span = spans + 3 * i;
            const int64_t* next = i + 1 < num_spans ? span + 3 : nullptr;
            stream(destination + span[1] * block_bytes, source + span[0] * block_bytes,
                   span[2] * block_bytes, next ? source + next[0] * block_bytes : nullptr,
                   next ? next[2] * block_bytes : 0);
        }
        end_stream();
        return total;
    }
    for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t* span = spans + 3 * i;
        std::memcpy(destination + span[1] * block_bytes, source + span[0] * block_bytes,
                    span[2] * block_bytes);
    }
    return total;
}
