// Copies blocks between two pools that are both mapped here.
//
// A small move is a memcpy for each span: what it lands in stays in the cache for whoever reads it
// next. A big one goes around the cache, and while a span is copied the beginning of the next is
// fetched, which no hardware prefetcher can guess. Two threads share the bytes of a very big one: a
// core alone does not fill the memory's bandwidth, least of all where every block is on another
// page. Measured against memcpy: bench/transfer.py.
#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>

#include "api.h"
#include "stream.h"

namespace {

constexpr int64_t kStreamFrom = 4 << 20;   // bytes of a move; below it the cache is the better place
constexpr int64_t kShareFrom = 16 << 20;  // a thread costs what copying half a MiB does
constexpr int64_t kLineMask = -64;

struct Move {
    const uint8_t* source;
    uint8_t* destination;
    int64_t block_bytes;
    const int64_t* spans;
    int64_t num_spans;
};

// Copies the bytes `from` to `until` of all that the spans name, around the cache.
void stream_bytes(const Move& move, int64_t from, int64_t until) {
    int64_t begin = 0;
    for (int64_t i = 0; i < move.num_spans && begin < until; ++i) {
        const int64_t* span = move.spans + 3 * i;
        const int64_t size = span[2] * move.block_bytes;
        const int64_t first = std::max(from - begin, int64_t{0});
        const int64_t last = std::min(until - begin, size);
        begin += size;
        if (first >= last) continue;
        const int64_t* next = i + 1 < move.num_spans ? span + 3 : nullptr;
        stream(move.destination + span[1] * move.block_bytes + first,
               move.source + span[0] * move.block_bytes + first, last - first,
               next ? move.source + next[0] * move.block_bytes : nullptr,
               next ? next[2] * move.block_bytes : 0);
    }
    end_stream();
}

void stream_all(const Move& move, int64_t total) {
    int64_t shared = total >= kShareFrom ? total / 2 & kLineMask : 0;
    std::thread other;
    try {
        if (shared) other = std::thread([&] { stream_bytes(move, 0, shared); });
    } catch (const std::system_error&) {
        shared = 0;  // no thread to be had
    }
    stream_bytes(move, shared, total);
    if (shared) other.join();
}

}  // namespace

int64_t penstock_copy(const uint8_t* source, uint8_t* destination, int64_t block_bytes,
                      const int64_t* spans, int64_t num_spans) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; ++i) total += spans[3 * i + 2] * block_bytes;
    if (total >= kStreamFrom) {
        stream_all({source, destination, block_bytes, spans, num_spans}, total);
        return total;
    }
    for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t* span = spans + 3 * i;
        std::memcpy(destination + span[1] * block_bytes, source + span[0] * block_bytes,
                    span[2] * block_bytes);
    }
    return total;
}
