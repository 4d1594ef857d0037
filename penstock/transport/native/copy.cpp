// Copies blocks between two pools that are both mapped here.
//
// A small move is a memcpy for each span: what it lands in stays in the cache for whoever reads it
// next. A big one goes around the cache: a store that need not read its line first saves a third of
// the memory traffic, and while a span is copied the beginning of the next is fetched, which no
// hardware prefetcher can guess. Measured against memcpy: bench/transfer.py.
#include <cstring>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PENSTOCK_STREAMS 1
#endif

namespace {

constexpr int64_t kStreamFrom = 4 << 20;  // bytes of a move; below it the cache is the better place

#if PENSTOCK_STREAMS
constexpr int64_t kLine = 64;

inline void stream_line(uint8_t* to, const uint8_t* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < kLine; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    for (int i = 0; i < kLine; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
}

// Copies `size` bytes around the cache; `next` will be read after it, `ahead` bytes of it at once.
void stream(uint8_t* to, const uint8_t* from, int64_t size, const uint8_t* next, int64_t ahead) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
    if (size < head + kLine) {
        std::memcpy(to, from, size);
        return;
    }
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + 4 * kLine <= size; i += 4 * kLine) {
        if (i < ahead)
            for (int64_t j = 0; j < 4; ++j)
                _mm_prefetch(reinterpret_cast<const char*>(next + i + j * kLine), _MM_HINT_T0);
        for (int64_t j = 0; j < 4; ++j) stream_line(to + i + j * kLine, from + i + j * kLine);
    }
    for (; i + kLine <= size; i += kLine) stream_line(to + i, from + i);
    std::memcpy(to + i, from + i, size - i);
}
#endif

}  // namespace

int64_t penstock_copy(const uint8_t* source, uint8_t* destination, int64_t block_bytes,
                      const int64_t* spans, int64_t num_spans) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; ++i) total += spans[3 * i + 2] * block_bytes;
#if PENSTOCK_STREAMS
    if (total >= kStreamFrom) {
        for (int64_t i = 0; i < num_spans; ++i) {
            const int64_t* span = spans + 3 * i;
            const int64_t* next = i + 1 < num_spans ? span + 3 : nullptr;
            stream(destination + span[1] * block_bytes, source + span[0] * block_bytes,
                   span[2] * block_bytes, next ? source + next[0] * block_bytes : nullptr,
                   next ? next[2] * block_bytes : 0);
        }
        _mm_sfence();  // streamed stores are not ordered with what the caller does next
        return total;
    }
#endif
    for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t* span = spans + 3 * i;
        std::memcpy(destination + span[1] * block_bytes, source + span[0] * block_bytes,
                    span[2] * block_bytes);
    }
    return total;
}
